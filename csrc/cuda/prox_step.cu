// The fused proximal step on CUDA: a thread takes a Philox block, four neighbouring elements of one image, and does everything
// for them.
#include "../common/prox_step.h"

#include "elements.cuh"

namespace proxt2i {
namespace {

// What four elements always read.
template <typename T, typename E>
struct StepInputs4 {
  Vec4<T> y;
  Vec4<E> eps_cond, eps_uncond;
};

template <bool aligned, typename T, typename E>
__device__ __forceinline__ void load_inputs(const StepArgs<T, E>& in, int64_t at, int count, StepInputs4<T, E>& to) {
  to.y = load4<aligned>(in.y, at, count);
  to.eps_cond = load4<aligned>(in.eps_cond, at, count);
  if (in.eps_uncond != nullptr) to.eps_uncond = load4<aligned>(in.eps_uncond, at, count);
}

template <bool aligned, typename T, typename E>
__device__ __forceinline__ void take_step(const StepArgs<T, E>& out, const StepRow<T>& row, const StepInputs4<T, E>& in, int64_t image,
                                          int64_t first, int count) {
  const int64_t at = image * out.per_image + first;
  const bool renoised = out.y_next != nullptr && row.b != 0 && (out.noise != nullptr || out.seeds != nullptr);
  Vec4<T> z{};  // before anything that waits for memory: the inputs arrive meanwhile
  if (renoised) {
    z = out.noise != nullptr ? load4<aligned>(out.noise, at, count)
                             : normals4<T>(out.seeds[image], static_cast<int64_t>(row.draw), first);
  }

  Vec4<T> eps, x, clean{}, y_next;
  for (int i = 0; i < 4; ++i) eps.v[i] = static_cast<T>(widen(in.eps_cond.v[i]));
  if (out.eps_uncond != nullptr) {
    for (int i = 0; i < 4; ++i) eps.v[i] = guide(eps.v[i], static_cast<T>(widen(in.eps_uncond.v[i])), row.guidance_scale);
  }
  for (int i = 0; i < 4; ++i) x.v[i] = prox(in.y.v[i], eps.v[i], row.sqrt_lam);
  if (out.x != nullptr) store4<aligned>(out.x, at, count, x);
  if (out.clean_next != nullptr || out.remembers()) {
    for (int i = 0; i < 4; ++i) clean.v[i] = clean_image(in.y.v[i], eps.v[i], row.clean_y, row.clean_eps);
    if (out.clean_next != nullptr) store4<aligned>(out.clean_next, at, count, clean);
  }
  if (out.y_next == nullptr) return;
  for (int i = 0; i < 4; ++i) y_next.v[i] = renoised ? renoise(x.v[i], z.v[i], row.a, row.b) : row.a * x.v[i];
  if (out.remembers()) {
    const Vec4<T> before = load4<aligned>(out.clean, at, count);
    for (int i = 0; i < 4; ++i) y_next.v[i] = remember(y_next.v[i], clean.v[i], before.v[i], row.memory);
  }
  store4<aligned>(out.y_next, at, count, y_next);
}

// The image's coefficients are converted once a block, while the first inputs are on their way.
template <bool aligned, typename T, typename E>
__global__ void __launch_bounds__(element_threads, sizeof(T) == 8 ? 2 : aligned ? 5 : 4) step_kernel(const StepArgs<T, E> args) {
  __shared__ StepRow<T> row;
  const int64_t num_blocks = (args.per_image + 3) / 4, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto count_at = [&](int64_t block) { return args.per_image - 4 * block < 4 ? static_cast<int>(args.per_image - 4 * block) : 4; };
  for (int64_t image = blockIdx.y; image < args.num_images; image += gridDim.y) {
    StepInputs4<T, E> inputs{};
    if (start < num_blocks) load_inputs<aligned>(args, image * args.per_image + 4 * start, count_at(start), inputs);
    if (image != blockIdx.y) __syncthreads();  // the last image's row is not needed any more
    if (threadIdx.x < coefficient::draw) {
      (&row.guidance_scale)[threadIdx.x] = static_cast<T>(args.coefficients[image * args.row_stride + threadIdx.x]);
    } else if (threadIdx.x == coefficient::draw) {
      row.draw = static_cast<uint64_t>(args.coefficients[image * args.row_stride + coefficient::draw]);
    }
    __syncthreads();
    for (int64_t block = start; block < num_blocks; block += stride) {
      if (block != start) load_inputs<aligned>(args, image * args.per_image + 4 * block, count_at(block), inputs);
      take_step<aligned>(args, row, inputs, image, 4 * block, count_at(block));
    }
  }
}

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
    if (args.num_images * args.per_image == 0) return;
    const dim3 grid = element_grid(args.num_images, (args.per_image + 3) / 4, element_threads);
    const auto kernel = aligned && args.per_image % 4 == 0 ? step_kernel<true, T, E> : step_kernel<false, T, E>;
    launch(kernel, grid, element_threads, 0, stream, args);
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
