// Training pairs and their errors on CUDA.
#include "../common/matching.h"

#include "elements.cuh"

namespace proxt2i {
namespace {

template <typename T>
struct Noise : PairArgs<T> {
  template <bool aligned>
  __device__ __forceinline__ void run(int64_t image, int64_t first, int count) const {
    const int64_t at = image * this->per_image + first;
    const auto c = coefficients_of(this->coefficients, image);
    Vec4<T> y = load4<aligned>(this->x0, at, count);
    for (int i = 0; i < 4; ++i) y.v[i] = c.signal * y.v[i];
    add_normals(image, 0, c.noise, first, y);
    add_normals(image, 1, c.prox, first, y);
    store4<aligned>(this->y, at, count, y);
  }

  // Noise without weight (e at t = 0, n for a score network) is not drawn.
  __device__ __forceinline__ void add_normals(int64_t image, int64_t draw, T factor, int64_t first, Vec4<T>& y) const {
    if (factor == 0) return;
    const Vec4<T> z = normals4<T>(this->seeds[image], draw, first);
    for (int i = 0; i < 4; ++i) y.v[i] = fma(factor, z.v[i], y.v[i]);
  }
};

// eps - target.
template <bool aligned, typename T, typename E>
__device__ __forceinline__ Vec4<T> errors4(const MatchingArgs<T, E>& in, int64_t image, int64_t first, int count) {
  const int64_t at = image * in.per_image + first;
  const Vec4<E> eps = load4<aligned>(in.eps, at, count);
  Vec4<T> target;
  if (in.x0 == nullptr) {
    target = normals4<T>(in.seeds[image], in.draw, first);
  } else {
    const auto c = coefficients_of(in.coefficients, image);
    const T factor = expected_factor(c);
    const Vec4<T> x0 = load4<aligned>(in.x0, at, count), y = load4<aligned>(in.y, at, count);
    for (int i = 0; i < 4; ++i) target.v[i] = expected_target(x0.v[i], y.v[i], c.signal, factor);
  }
  Vec4<T> error;
  for (int i = 0; i < 4; ++i) error.v[i] = static_cast<T>(widen(eps.v[i])) - target.v[i];
  return error;
}

template <typename T, typename E>
struct Errors : MatchingArgs<T, E> {
  template <bool aligned>
  __device__ __forceinline__ void terms(int64_t image, int64_t first, int count, Vec4<T>& squares, Vec4<T>& magnitudes) const {
    const Vec4<T> error = errors4<aligned>(*this, image, first, count);
    for (int i = 0; i < 4; ++i) {
      squares.v[i] = error.v[i] * error.v[i];
      magnitudes.v[i] = magnitude(error.v[i]);
    }
  }
};

template <typename T, typename E>
struct ErrorsBackward : MatchingArgs<T, E> {
  MatchingGradients<T, E> grads;

  template <bool aligned>
  __device__ __forceinline__ void run(int64_t image, int64_t first, int count) const {
    const Vec4<T> error = errors4<aligned>(*this, image, first, count);
    const T size = static_cast<T>(this->per_image);
    const T mse_factor = 2 * grads.grad_mse[image] / size, mae_factor = grads.grad_mae[image] / size;
    Vec4<E> grad;
    for (int i = 0; i < 4; ++i) narrow(matching_gradient(error.v[i], mse_factor, mae_factor), grad.v[i]);
    store4<aligned>(grads.grad_eps, image * this->per_image + first, count, grad);
  }
};

template <typename T, typename E>
bool all_aligned(const MatchingArgs<T, E>& in) {
  return is_aligned(in.eps) && is_aligned(in.x0) && is_aligned(in.y);
}

struct Cuda {
  cudaStream_t stream;

  template <typename T>
  void noise(const PairArgs<T>& args) const {
    for_elements(Noise<T>{args}, is_aligned(args.x0) && is_aligned(args.y), stream);
  }
  template <typename T, typename E>
  void errors(const MatchingArgs<T, E>& in, T* partials) const {
    partial_sums(Errors<T, E>{in}, all_aligned(in), partials, stream);
  }
  template <typename T, typename E>
  void errors_backward(const MatchingArgs<T, E>& in, const MatchingGradients<T, E>& grads) const {
    for_elements(ErrorsBackward<T, E>{in, grads}, all_aligned(in) && is_aligned(grads.grad_eps), stream);
  }
  template <typename T>
  void sum(const SumArgs<T>& args) const {
    sum_partials(args, stream);
  }
};

using Optional = const std::optional<Tensor>&;

Tensor noised_pair_cuda(const Tensor& x0, const Tensor& seeds, const Tensor& coefficients) {
  const OnDeviceOf device(x0);
  return noised_pair(Cuda{device.stream}, x0, seeds, coefficients);
}

std::tuple<Tensor, Tensor> matching_errors_cuda(const Tensor& eps, Optional x0, Optional y, const Tensor& seeds,
                                                const Tensor& coefficients, std::optional<int64_t> draw) {
  const OnDeviceOf device(eps);
  return matching_errors(Cuda{device.stream}, {eps, x0, y, seeds, coefficients, draw});
}

Tensor matching_errors_backward_cuda(const Tensor& grad_mse, const Tensor& grad_mae, const Tensor& eps, Optional x0, Optional y,
                                     const Tensor& seeds, const Tensor& coefficients, std::optional<int64_t> draw) {
  const OnDeviceOf device(eps);
  return matching_errors_backward(Cuda{device.stream}, grad_mse, grad_mae, {eps, x0, y, seeds, coefficients, draw});
}

}  // namespace
}  // namespace proxt2i

PROXT2I_CUDA_IMPL(m) {
  m.impl("noised_pair", TORCH_BOX(&proxt2i::noised_pair_cuda));
  m.impl("matching_errors", TORCH_BOX(&proxt2i::matching_errors_cuda));
  m.impl("matching_errors_backward", TORCH_BOX(&proxt2i::matching_errors_backward_cuda));
}
