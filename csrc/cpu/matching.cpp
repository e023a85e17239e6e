// Training pairs and their errors on a CPU: noise is drawn where it is used, and the target never exists as a tensor.
#include "../common/matching.h"

#include "chunks.h"

namespace proxt2i {
namespace {

template <typename T>
struct Noise : PairArgs<T> {
  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t offset, int64_t length) const {
    const int64_t at = image * this->per_image + offset;
    const auto c = coefficients_of(this->coefficients, image);
    T y[chunk_size];
    const T* x0 = this->x0 + at;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) y[i] = c.signal * x0[i];
    add_normals<isa>(image, 0, c.noise, offset, length, y);
    add_normals<isa>(image, 1, c.prox, offset, length, y);
    __builtin_memcpy(this->y + at, y, sizeof(T) * static_cast<size_t>(length));
  }

  // Noise without weight (e at t = 0, n for a score network) is not drawn.
  template <Isa isa>
  PROXT2I_INLINE void add_normals(int64_t image, int64_t draw, T factor, int64_t offset, int64_t length, T* y) const {
    if (factor == 0) return;
    T z[chunk_size];
    draw_chunk<isa>(this->seeds[image], draw, offset, length, z);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) y[i] = fma(factor, z[i], y[i]);
  }
};

// eps - target.
template <Isa isa, typename T, typename E>
PROXT2I_INLINE void error_chunk(const MatchingArgs<T, E>& in, int64_t image, int64_t offset, int64_t length, T* error) {
  const int64_t at = image * in.per_image + offset;
  const E* eps = in.eps + at;
  if (in.x0 == nullptr) {
    T target[chunk_size];
    draw_chunk<isa>(in.seeds[image], in.draw, offset, length, target);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) error[i] = static_cast<T>(widen(eps[i])) - target[i];
    return;
  }
  const auto c = coefficients_of(in.coefficients, image);
  const T signal = c.signal, factor = expected_factor(c);
  const T *x0 = in.x0 + at, *y = in.y + at;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) error[i] = static_cast<T>(widen(eps[i])) - expected_target(x0[i], y[i], signal, factor);
}

template <typename T, typename E>
struct Errors : MatchingArgs<T, E> {
  T* partials;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t offset, int64_t length) const {
    T error[chunk_size], squares[chunk_size];
    error_chunk<isa>(*this, image, offset, length, error);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      squares[i] = error[i] * error[i];
      error[i] = magnitude(error[i]);
    }
    store_sums(squares, error, this->per_image, image, offset, length, partials);
  }
};

template <typename T, typename E>
struct ErrorsBackward : MatchingArgs<T, E> {
  MatchingGradients<T, E> grads;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t offset, int64_t length) const {
    T error[chunk_size];
    error_chunk<isa>(*this, image, offset, length, error);
    const T size = static_cast<T>(this->per_image);
    const T mse_factor = 2 * grads.grad_mse[image] / size, mae_factor = grads.grad_mae[image] / size;
    E* out = grads.grad_eps + image * this->per_image + offset;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) narrow(matching_gradient(error[i], mse_factor, mae_factor), out[i]);
  }
};

struct Cpu {
  template <typename T>
  void noise(const PairArgs<T>& args) const {
    run_parallel(Noise<T>{args});
  }
  template <typename T, typename E>
  void errors(const MatchingArgs<T, E>& in, T* partials) const {
    run_parallel(Errors<T, E>{in, partials});
  }
  template <typename T, typename E>
  void errors_backward(const MatchingArgs<T, E>& in, const MatchingGradients<T, E>& grads) const {
    run_parallel(ErrorsBackward<T, E>{in, grads});
  }
  template <typename T>
  void sum(const SumArgs<T>& args) const {
    sum_chunks(args);
  }
};

using Optional = const std::optional<Tensor>&;

Tensor noised_pair_cpu(const Tensor& x0, const Tensor& seeds, const Tensor& coefficients) {
  return noised_pair(Cpu{}, x0, seeds, coefficients);
}

std::tuple<Tensor, Tensor> matching_errors_cpu(const Tensor& eps, Optional x0, Optional y, const Tensor& seeds,
                                               const Tensor& coefficients, std::optional<int64_t> draw) {
  return matching_errors(Cpu{}, {eps, x0, y, seeds, coefficients, draw});
}

Tensor matching_errors_backward_cpu(const Tensor& grad_mse, const Tensor& grad_mae, const Tensor& eps, Optional x0, Optional y,
                                    const Tensor& seeds, const Tensor& coefficients, std::optional<int64_t> draw) {
  return matching_errors_backward(Cpu{}, grad_mse, grad_mae, {eps, x0, y, seeds, coefficients, draw});
}

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY_IMPL(proxt2i, CPU, m) {
  m.impl("noised_pair", TORCH_BOX(&proxt2i::noised_pair_cpu));
  m.impl("matching_errors", TORCH_BOX(&proxt2i::matching_errors_cpu));
  m.impl("matching_errors_backward", TORCH_BOX(&proxt2i::matching_errors_backward_cpu));
}
