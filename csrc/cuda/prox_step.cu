// The fused proximal step on CUDA: a thread takes a Philox block, four neighbouring elements of one image, and does everything
// for them. *Unverified*: compiled for sm_80 and sm_90a in every CI run, but not yet run on a GPU.
#include <algorithm>
#include <cstdint>

#include "../common/op.h"
#include "device.cuh"

namespace proxt2i {
namespace {

constexpr int threads_per_block = 256;

template <bool aligned, typename T, typename E>
__device__ __forceinline__ void step4(const StepArgs<T, E>& args, const StepRow<T>& coefficients, int64_t image, int64_t block,
                                      uint64_t seed) {
  const int64_t row = image * args.per_image;
  const int64_t first = 4 * block;
  const int64_t left = args.per_image - first;
  const int count = left < 4 ? static_cast<int>(left) : 4;
  const Vec4<T> y = load4<aligned>(args.y + row, first, count);
  const Vec4<E> eps_cond = load4<aligned>(args.eps_cond + row, first, count);
  Vec4<T> eps;
  if (args.eps_uncond != nullptr) {
    const Vec4<E> eps_uncond = load4<aligned>(args.eps_uncond + row, first, count);
    for (int i = 0; i < 4; ++i) {
      eps.v[i] = guide(static_cast<T>(widen(eps_cond.v[i])), static_cast<T>(widen(eps_uncond.v[i])), coefficients.guidance_scale);
    }
  } else {
    for (int i = 0; i < 4; ++i) eps.v[i] = static_cast<T>(widen(eps_cond.v[i]));
  }
  Vec4<T> x;
  for (int i = 0; i < 4; ++i) x.v[i] = prox(y.v[i], eps.v[i], coefficients.sqrt_lam);
  if (args.x != nullptr) store4<aligned>(args.x + row, first, count, x);
  const bool remembers = args.clean != nullptr && args.y_next != nullptr;
  Vec4<T> clean{};
  if (args.clean_next != nullptr || remembers) {
    for (int i = 0; i < 4; ++i) clean.v[i] = clean_image(y.v[i], eps.v[i], coefficients.clean_y, coefficients.clean_eps);
    if (args.clean_next != nullptr) store4<aligned>(args.clean_next + row, first, count, clean);
  }
  if (args.y_next == nullptr) return;

  Vec4<T> y_next;
  if (coefficients.b == 0 || (args.noise == nullptr && args.seeds == nullptr)) {
    for (int i = 0; i < 4; ++i) y_next.v[i] = coefficients.a * x.v[i];
  } else if (args.noise != nullptr) {
    const Vec4<T> z = load4<aligned>(args.noise + row, first, count);
    for (int i = 0; i < 4; ++i) y_next.v[i] = renoise(x.v[i], z.v[i], coefficients.a, coefficients.b);
  } else {
    float z[4];
    philox_normal4(seed, coefficients.draw, static_cast<uint64_t>(block), z[0], z[1], z[2], z[3]);
    for (int i = 0; i < 4; ++i) y_next.v[i] = renoise(x.v[i], static_cast<T>(z[i]), coefficients.a, coefficients.b);
  }
  if (remembers) {
    const Vec4<T> before = load4<aligned>(args.clean + row, first, count);
    for (int i = 0; i < 4; ++i) y_next.v[i] = remember(y_next.v[i], clean.v[i], before.v[i], coefficients.memory);
  }
  store4<aligned>(args.y_next + row, first, count, y_next);
}

template <bool aligned, typename T, typename E>
__global__ void __launch_bounds__(threads_per_block) prox_step_kernel(const StepArgs<T, E> args) {
  const int64_t num_blocks = (args.per_image + 3) / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t image = blockIdx.y; image < args.num_images; image += gridDim.y) {
    const uint64_t seed = args.seeds != nullptr ? static_cast<uint64_t>(args.seeds[image]) : 0;
    const StepRow<T> coefficients = step_row(args, image);
    for (int64_t block = start; block < num_blocks; block += stride) step4<aligned>(args, coefficients, image, block, seed);
  }
}

template <bool aligned>
__global__ void __launch_bounds__(threads_per_block)
    philox_normal_kernel(const int64_t* seeds, float* out, int64_t num_images, int64_t per_image, uint64_t step) {
  const int64_t num_blocks = (per_image + 3) / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t image = blockIdx.y; image < num_images; image += gridDim.y) {
    const uint64_t seed = static_cast<uint64_t>(seeds[image]);
    for (int64_t block = start; block < num_blocks; block += stride) {
      Vec4<float> z;
      philox_normal4(seed, step, static_cast<uint64_t>(block), z.v[0], z.v[1], z.v[2], z.v[3]);
      const int64_t left = per_image - 4 * block;
      store4<aligned>(out + image * per_image, 4 * block, left < 4 ? static_cast<int>(left) : 4, z);
    }
  }
}

dim3 grid_for(int64_t num_images, int64_t per_image) {
  const int64_t num_blocks = (per_image + 3) / 4;
  const int64_t x = std::min(max_grid_x, (num_blocks + threads_per_block - 1) / threads_per_block);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::min(max_grid_y, num_images)));
}

template <typename T, typename E>
void launch_step(const StepArgs<T, E>& args, cudaStream_t stream) {
  if (args.num_images * args.per_image == 0) return;
  const bool aligned = args.per_image % 4 == 0 && is_aligned(args.y) && is_aligned(args.eps_cond) && is_aligned(args.eps_uncond) &&
                       is_aligned(args.clean) && is_aligned(args.noise) && is_aligned(args.x) && is_aligned(args.y_next) &&
                       is_aligned(args.clean_next);
  const dim3 grid = grid_for(args.num_images, args.per_image);
  if (aligned) {
    launch(prox_step_kernel<true, T, E>, grid, threads_per_block, 0, stream, args);
  } else {
    launch(prox_step_kernel<false, T, E>, grid, threads_per_block, 0, stream, args);
  }
}

std::tuple<Tensor, Tensor, Tensor> prox_step_cuda(const Tensor& y, const Tensor& eps_cond, const std::optional<Tensor>& eps_uncond,
                                                  const std::optional<Tensor>& clean, const std::optional<Tensor>& noise,
                                                  const std::optional<Tensor>& seeds, const Tensor& coefficients, bool want_x,
                                                  bool want_next, bool want_clean) {
  const OnDeviceOf device(y);
  const StepTensors t = prepare(y, eps_cond, eps_uncond, clean, noise, seeds, coefficients, want_x, want_next, want_clean);
  dispatch(t, [&](const auto& args) { launch_step(args, device.stream); });
  return {t.x, t.y_next, t.clean_next};
}

Tensor philox_normal_cuda(const Tensor& seeds, int64_t step, int64_t count) {
  check_philox(seeds, step, count);
  const OnDeviceOf device(seeds);
  const Tensor keys = torch::stable::contiguous(seeds);
  const int64_t shape[] = {seeds.size(0), count};
  const Tensor out = torch::stable::new_empty(seeds, {shape, 2}, ScalarType::Float);
  if (out.numel() == 0) return out;
  const auto* key = static_cast<const int64_t*>(keys.const_data_ptr());
  auto* z = static_cast<float*>(out.mutable_data_ptr());
  const dim3 grid = grid_for(seeds.size(0), count);
  if (count % 4 == 0 && is_aligned(z)) {
    launch(philox_normal_kernel<true>, grid, threads_per_block, 0, device.stream, key, z, seeds.size(0), count, uint64_t(step));
  } else {
    launch(philox_normal_kernel<false>, grid, threads_per_block, 0, device.stream, key, z, seeds.size(0), count, uint64_t(step));
  }
  return out;
}

}  // namespace
}  // namespace proxt2i

PROXT2I_CUDA_IMPL(m) {
  m.impl("prox_step", TORCH_BOX(&proxt2i::prox_step_cuda));
  m.impl("philox_normal", TORCH_BOX(&proxt2i::philox_normal_cuda));
}
