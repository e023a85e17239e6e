// Likelihood ratios of Gaussian transitions on a CPU: one pass over memory forward, one backward, noise drawn on the way.
#include "../common/transition.h"

#include "chunks.h"

namespace proxt2i {
namespace {

template <typename T, typename E>
PROXT2I_INLINE void guide_chunk(const E* eps_cond, const E* eps_uncond, T guidance_scale, int64_t length, T* eps) {
  if (eps_uncond == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) eps[i] = static_cast<T>(widen(eps_cond[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      eps[i] = guide(static_cast<T>(widen(eps_cond[i])), static_cast<T>(widen(eps_uncond[i])), guidance_scale);
    }
  }
}

// What both directions need of a chunk. Without eps_ref, `ref` is eps itself, so that q is zero.
template <typename T>
struct Chunk {
  T eps[chunk_size], drawn[chunk_size];
  const T *old, *ref, *z;
  T scale;
};

template <Isa isa, typename T, typename E>
PROXT2I_INLINE void load_chunk(const TransitionArgs<T, E>& in, int64_t image, int64_t offset, int64_t length, Chunk<T>& chunk) {
  const int64_t at = image * in.per_image + offset;
  guide_chunk(in.eps_cond + at, in.eps_uncond != nullptr ? in.eps_uncond + at : nullptr, in.guidance_scale, length, chunk.eps);
  chunk.old = in.eps_old + at;
  chunk.ref = in.eps_ref != nullptr ? in.eps_ref + at : chunk.eps;
  chunk.z = in.noise != nullptr ? in.noise + at : chunk.drawn;
  if (in.noise == nullptr) draw_chunk<isa>(in.seeds[image], in.steps[image], offset, length, chunk.drawn);
  chunk.scale = in.scale[image];
}

template <typename T, typename E>
struct LogRatio : TransitionArgs<T, E> {
  T* partials;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t offset, int64_t length) const {
    Chunk<T> c;
    load_chunk<isa>(*this, image, offset, length, c);
    T terms[chunk_size], squares[chunk_size];
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      terms[i] = log_ratio_term(c.z[i], shift(c.eps[i], c.old[i], c.scale));
      const T q = shift(c.eps[i], c.ref[i], c.scale);
      squares[i] = q * q;
    }
    store_sums(terms, squares, this->per_image, image, offset, length, partials);
  }
};

template <typename T, typename E>
struct LogRatioBackward : TransitionArgs<T, E> {
  TransitionGradients<T, E> grads;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t offset, int64_t length) const {
    Chunk<T> c;
    load_chunk<isa>(*this, image, offset, length, c);
    const T of_ratio = grads.grad_log_ratio[image], of_kl = grads.grad_kl[image];
    T grad[chunk_size];
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      grad[i] = transition_gradient(c.z[i], shift(c.eps[i], c.old[i], c.scale), shift(c.eps[i], c.ref[i], c.scale), c.scale,
                                    of_ratio, of_kl);
    }
    const int64_t at = image * this->per_image + offset;
    if (grads.grad_uncond == nullptr) return store(grad, static_cast<T>(1), length, grads.grad_cond + at);
    store(grad, this->guidance_scale, length, grads.grad_cond + at);
    store(grad, 1 - this->guidance_scale, length, grads.grad_uncond + at);
  }

  static PROXT2I_INLINE void store(const T* grad, T factor, int64_t length, E* out) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) narrow(factor * grad[i], out[i]);
  }
};

template <typename T, typename E>
struct Guide : GuideArgs<T, E> {
  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t offset, int64_t length) const {
    const int64_t at = image * this->per_image + offset;
    guide_chunk(this->eps_cond + at, this->eps_uncond + at, this->guidance_scale, length, this->eps + at);
  }
};

struct Cpu {
  template <typename T, typename E>
  void log_ratio(const TransitionArgs<T, E>& in, T* partials) const {
    run_parallel(LogRatio<T, E>{in, partials});
  }
  template <typename T, typename E>
  void log_ratio_backward(const TransitionArgs<T, E>& in, const TransitionGradients<T, E>& grads) const {
    run_parallel(LogRatioBackward<T, E>{in, grads});
  }
  template <typename T, typename E>
  void guide(const GuideArgs<T, E>& args) const {
    run_parallel(Guide<T, E>{args});
  }
  template <typename T>
  void sum(const SumArgs<T>& args) const {
    sum_chunks(args);
  }
};

using Optional = const std::optional<Tensor>&;

std::tuple<Tensor, Tensor> log_ratio_cpu(const Tensor& eps_cond, Optional eps_uncond, const Tensor& eps_old, Optional eps_ref,
                                         Optional noise, Optional seeds, Optional steps, const Tensor& scale, double guidance_scale) {
  return transition_log_ratio(Cpu{}, {eps_cond, eps_uncond, eps_old, eps_ref, noise, seeds, steps, scale, guidance_scale});
}

std::tuple<Tensor, Tensor> log_ratio_backward_cpu(const Tensor& grad_log_ratio, const Tensor& grad_kl, const Tensor& eps_cond,
                                                  Optional eps_uncond, const Tensor& eps_old, Optional eps_ref, Optional noise,
                                                  Optional seeds, Optional steps, const Tensor& scale, double guidance_scale) {
  return transition_log_ratio_backward(Cpu{}, grad_log_ratio, grad_kl,
                                       {eps_cond, eps_uncond, eps_old, eps_ref, noise, seeds, steps, scale, guidance_scale});
}

Tensor guided_eps_cpu(const Tensor& eps_cond, const Tensor& eps_uncond, double guidance_scale) {
  return guided_eps(Cpu{}, eps_cond, eps_uncond, guidance_scale);
}

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY_IMPL(proxt2i, CPU, m) {
  m.impl("transition_log_ratio", TORCH_BOX(&proxt2i::log_ratio_cpu));
  m.impl("transition_log_ratio_backward", TORCH_BOX(&proxt2i::log_ratio_backward_cpu));
  m.impl("guided_eps", TORCH_BOX(&proxt2i::guided_eps_cpu));
}
