// Likelihood ratios of Gaussian transitions on CUDA.
#include "../common/transition.h"

#include "elements.cuh"

namespace proxt2i {
namespace {

template <bool aligned, typename T, typename E>
__device__ __forceinline__ Vec4<T> guide4(const E* eps_cond, const E* eps_uncond, T guidance_scale, int64_t first, int count) {
  const Vec4<E> cond = load4<aligned>(eps_cond, first, count);
  Vec4<T> eps;
  for (int i = 0; i < 4; ++i) eps.v[i] = static_cast<T>(widen(cond.v[i]));
  if (eps_uncond != nullptr) {
    const Vec4<E> uncond = load4<aligned>(eps_uncond, first, count);
    for (int i = 0; i < 4; ++i) eps.v[i] = guide(eps.v[i], static_cast<T>(widen(uncond.v[i])), guidance_scale);
  }
  return eps;
}

// z, d and q of up to four elements; q is zero without eps_ref.
template <typename T>
struct Shifts {
  Vec4<T> z, d, q;
};

template <bool aligned, typename T, typename E>
__device__ __forceinline__ Shifts<T> shifts4(const TransitionArgs<T, E>& in, int64_t image, int64_t first, int count) {
  const int64_t at = image * in.per_image + first;
  const T scale = in.scale[image];
  const Vec4<T> eps = guide4<aligned>(in.eps_cond, in.eps_uncond, in.guidance_scale, at, count);
  const Vec4<T> old = load4<aligned>(in.eps_old, at, count);
  const Vec4<T> ref = in.eps_ref != nullptr ? load4<aligned>(in.eps_ref, at, count) : eps;
  Shifts<T> result;
  result.z = in.noise != nullptr ? load4<aligned>(in.noise, at, count) : normals4<T>(in.seeds[image], in.steps[image], first);
  for (int i = 0; i < 4; ++i) {
    result.d.v[i] = shift(eps.v[i], old.v[i], scale);
    result.q.v[i] = shift(eps.v[i], ref.v[i], scale);
  }
  return result;
}

template <typename T, typename E>
struct LogRatio : TransitionArgs<T, E> {
  template <bool aligned>
  __device__ __forceinline__ void terms(int64_t image, int64_t first, int count, Vec4<T>& ratio, Vec4<T>& squares) const {
    const Shifts<T> s = shifts4<aligned>(*this, image, first, count);
    for (int i = 0; i < 4; ++i) {
      ratio.v[i] = log_ratio_term(s.z.v[i], s.d.v[i]);
      squares.v[i] = s.q.v[i] * s.q.v[i];
    }
  }
};

template <typename T, typename E>
struct LogRatioBackward : TransitionArgs<T, E> {
  TransitionGradients<T, E> grads;

  template <bool aligned>
  __device__ __forceinline__ void run(int64_t image, int64_t first, int count) const {
    const Shifts<T> s = shifts4<aligned>(*this, image, first, count);
    const T scale = this->scale[image], of_ratio = grads.grad_log_ratio[image], of_kl = grads.grad_kl[image];
    const T w = grads.grad_uncond != nullptr ? this->guidance_scale : 1;
    Vec4<E> cond, uncond;
    for (int i = 0; i < 4; ++i) {
      const T grad = transition_gradient(s.z.v[i], s.d.v[i], s.q.v[i], scale, of_ratio, of_kl);
      narrow(w * grad, cond.v[i]);
      narrow((1 - w) * grad, uncond.v[i]);
    }
    const int64_t at = image * this->per_image + first;
    store4<aligned>(grads.grad_cond, at, count, cond);
    if (grads.grad_uncond != nullptr) store4<aligned>(grads.grad_uncond, at, count, uncond);
  }
};

template <typename T, typename E>
struct Guide : GuideArgs<T, E> {
  template <bool aligned>
  __device__ __forceinline__ void run(int64_t image, int64_t first, int count) const {
    const int64_t at = image * this->per_image + first;
    store4<aligned>(this->eps, at, count, guide4<aligned>(this->eps_cond, this->eps_uncond, this->guidance_scale, at, count));
  }
};

template <typename T, typename E>
bool all_aligned(const TransitionArgs<T, E>& in) {
  return is_aligned(in.eps_cond) && is_aligned(in.eps_uncond) && is_aligned(in.eps_old) && is_aligned(in.eps_ref) &&
         is_aligned(in.noise);
}

struct Cuda {
  cudaStream_t stream;

  template <typename T, typename E>
  void log_ratio(const TransitionArgs<T, E>& in, T* partials) const {
    partial_sums(LogRatio<T, E>{in}, all_aligned(in), partials, stream);
  }
  template <typename T, typename E>
  void log_ratio_backward(const TransitionArgs<T, E>& in, const TransitionGradients<T, E>& grads) const {
    const bool aligned = all_aligned(in) && is_aligned(grads.grad_cond) && is_aligned(grads.grad_uncond);
    for_elements(LogRatioBackward<T, E>{in, grads}, aligned, stream);
  }
  template <typename T, typename E>
  void guide(const GuideArgs<T, E>& args) const {
    for_elements(Guide<T, E>{args}, is_aligned(args.eps_cond) && is_aligned(args.eps_uncond) && is_aligned(args.eps), stream);
  }
  template <typename T>
  void sum(const SumArgs<T>& args) const {
    sum_partials(args, stream);
  }
};

using Optional = const std::optional<Tensor>&;

std::tuple<Tensor, Tensor> log_ratio_cuda(const Tensor& eps_cond, Optional eps_uncond, const Tensor& eps_old, Optional eps_ref,
                                          Optional noise, Optional seeds, Optional steps, const Tensor& scale, double guidance_scale) {
  const OnDeviceOf device(eps_cond);
  return transition_log_ratio(Cuda{device.stream}, {eps_cond, eps_uncond, eps_old, eps_ref, noise, seeds, steps, scale, guidance_scale});
}

std::tuple<Tensor, Tensor> log_ratio_backward_cuda(const Tensor& grad_log_ratio, const Tensor& grad_kl, const Tensor& eps_cond,
                                                   Optional eps_uncond, const Tensor& eps_old, Optional eps_ref, Optional noise,
                                                   Optional seeds, Optional steps, const Tensor& scale, double guidance_scale) {
  const OnDeviceOf device(eps_cond);
  return transition_log_ratio_backward(Cuda{device.stream}, grad_log_ratio, grad_kl,
                                       {eps_cond, eps_uncond, eps_old, eps_ref, noise, seeds, steps, scale, guidance_scale});
}

Tensor guided_eps_cuda(const Tensor& eps_cond, const Tensor& eps_uncond, double guidance_scale) {
  const OnDeviceOf device(eps_cond);
  return guided_eps(Cuda{device.stream}, eps_cond, eps_uncond, guidance_scale);
}

}  // namespace
}  // namespace proxt2i

PROXT2I_CUDA_IMPL(m) {
  m.impl("transition_log_ratio", TORCH_BOX(&proxt2i::log_ratio_cuda));
  m.impl("transition_log_ratio_backward", TORCH_BOX(&proxt2i::log_ratio_backward_cuda));
  m.impl("guided_eps", TORCH_BOX(&proxt2i::guided_eps_cuda));
}
