// The fused proximal step on CUDA: a thread takes a Philox block, four neighbouring elements of one image, and does everything
// for them. *Unverified*: compiled and emulated in every CI run, but not yet run on a GPU.
#include "../common/prox_step.h"

#include "elements.cuh"

namespace proxt2i {
namespace {

template <typename T, typename E>
struct Step : StepArgs<T, E> {
  template <bool aligned>
  __device__ __forceinline__ void run(int64_t image, int64_t first, int count) const {
    const int64_t at = image * this->per_image + first;
    const StepRow<T> row = this->row(image);
    const Vec4<T> y = load4<aligned>(this->y, at, count);
    const Vec4<E> eps_cond = load4<aligned>(this->eps_cond, at, count);
    Vec4<T> eps, x;
    for (int i = 0; i < 4; ++i) eps.v[i] = static_cast<T>(widen(eps_cond.v[i]));
    if (this->eps_uncond != nullptr) {
      const Vec4<E> eps_uncond = load4<aligned>(this->eps_uncond, at, count);
      for (int i = 0; i < 4; ++i) eps.v[i] = guide(eps.v[i], static_cast<T>(widen(eps_uncond.v[i])), row.guidance_scale);
    }
    for (int i = 0; i < 4; ++i) x.v[i] = prox(y.v[i], eps.v[i], row.sqrt_lam);
    if (this->x != nullptr) store4<aligned>(this->x, at, count, x);
    Vec4<T> clean{};
    if (this->clean_next != nullptr || this->remembers()) {
      for (int i = 0; i < 4; ++i) clean.v[i] = clean_image(y.v[i], eps.v[i], row.clean_y, row.clean_eps);
      if (this->clean_next != nullptr) store4<aligned>(this->clean_next, at, count, clean);
    }
    if (this->y_next == nullptr) return;

    Vec4<T> y_next;
    if (row.b == 0 || (this->noise == nullptr && this->seeds == nullptr)) {
      for (int i = 0; i < 4; ++i) y_next.v[i] = row.a * x.v[i];
    } else {
      const Vec4<T> z = this->noise != nullptr ? load4<aligned>(this->noise, at, count)
                                               : normals4<T>(this->seeds[image], static_cast<int64_t>(row.draw), first);
      for (int i = 0; i < 4; ++i) y_next.v[i] = renoise(x.v[i], z.v[i], row.a, row.b);
    }
    if (this->remembers()) {
      const Vec4<T> before = load4<aligned>(this->clean, at, count);
      for (int i = 0; i < 4; ++i) y_next.v[i] = remember(y_next.v[i], clean.v[i], before.v[i], row.memory);
    }
    store4<aligned>(this->y_next, at, count, y_next);
  }
};

struct Normals : NormalArgs {
  template <bool aligned>
  __device__ __forceinline__ void run(int64_t image, int64_t first, int count) const {
    store4<aligned>(out, image * per_image + first, count, normals4<float>(seeds[image], step, first));
  }
};

struct Cuda {
  cudaStream_t stream;

  template <typename T, typename E>
  void step(const StepArgs<T, E>& args) const {
    const bool aligned = is_aligned(args.y) && is_aligned(args.eps_cond) && is_aligned(args.eps_uncond) && is_aligned(args.clean) &&
                         is_aligned(args.noise) && is_aligned(args.x) && is_aligned(args.y_next) && is_aligned(args.clean_next);
    for_elements(Step<T, E>{args}, aligned, stream);
  }
  void normals(const NormalArgs& args) const { for_elements(Normals{args}, is_aligned(args.out), stream); }
};

using Optional = const std::optional<Tensor>&;

std::tuple<Tensor, Tensor, Tensor> prox_step_cuda(const Tensor& y, const Tensor& eps_cond, Optional eps_uncond, Optional clean,
                                                  Optional noise, Optional seeds, const Tensor& coefficients, bool want_x,
                                                  bool want_next, bool want_clean) {
  const OnDeviceOf device(y);
  return prox_step(Cuda{device.stream}, {y, eps_cond, eps_uncond, clean, noise, seeds, coefficients, want_x, want_next, want_clean});
}

Tensor philox_normal_cuda(const Tensor& seeds, int64_t step, int64_t count) {
  const OnDeviceOf device(seeds);
  return philox_normal(Cuda{device.stream}, seeds, step, count);
}

}  // namespace
}  // namespace proxt2i

PROXT2I_CUDA_IMPL(m) {
  m.impl("prox_step", TORCH_BOX(&proxt2i::prox_step_cuda));
  m.impl("philox_normal", TORCH_BOX(&proxt2i::philox_normal_cuda));
}
