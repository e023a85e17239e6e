// The fused proximal step on a CPU: one pass over memory, noise included. Work is cut into chunks that never cross an image, so
// that a chunk has one seed; within a chunk each stage is a plain loop over arrays that stay in the L1 cache.
#include <algorithm>

#include "../common/op.h"
#include "isa.h"
#include "philox_words.h"

namespace proxt2i {
namespace {

constexpr int64_t chunk_size = 256;               // elements
constexpr int64_t chunk_blocks = chunk_size / 4;  // Philox blocks
constexpr int64_t chunks_per_thread = 32;         // at least, so that small calls stay on one thread

#define PROXT2I_INLINE static inline __attribute__((always_inline))

template <Isa isa>
PROXT2I_INLINE void draw_normals(uint64_t seed, uint64_t step, uint64_t first_block, int64_t length, float* z) {
  uint32_t w0[chunk_blocks], w1[chunk_blocks], w2[chunk_blocks], w3[chunk_blocks];
  float z0[chunk_blocks], z1[chunk_blocks], z2[chunk_blocks], z3[chunk_blocks];
  const int64_t num_blocks = (length + 3) / 4;
  philox_words<isa>(seed, step, first_block, num_blocks, {w0, w1, w2, w3});
#pragma omp simd
  for (int64_t i = 0; i < num_blocks; ++i) {
    box_muller(w0[i], w1[i], z0[i], z1[i]);
    box_muller(w2[i], w3[i], z2[i], z3[i]);
  }
  for (int64_t i = 0; i < num_blocks; ++i) {
    z[4 * i] = z0[i];
    z[4 * i + 1] = z1[i];
    z[4 * i + 2] = z2[i];
    z[4 * i + 3] = z3[i];
  }
}

// Asks for the cache lines of the chunk after this one, so that they arrive while this one's noise is computed.
template <typename T>
PROXT2I_INLINE void prefetch_next(const T* chunk) {
  for (int64_t i = 0; i < chunk_size; i += 64 / sizeof(T)) __builtin_prefetch(chunk + chunk_size + i);
}

template <Isa isa, typename T, typename E>
PROXT2I_INLINE void step_chunk(const StepArgs<T, E>& args, int64_t image, int64_t offset, int64_t length) {
  const int64_t at = image * args.per_image + offset;
  prefetch_next(args.y + at);
  prefetch_next(args.eps_cond + at);
  if (args.eps_uncond != nullptr) prefetch_next(args.eps_uncond + at);
  if (args.y_next != nullptr) prefetch_next(args.y_next + at);
  const StepRow<T> row = step_row(args, image);
  const T* y = args.y + at;
  const E* eps_cond = args.eps_cond + at;
  T eps[chunk_size], x[chunk_size], clean[chunk_size];
  if (args.eps_uncond != nullptr) {
    const E* eps_uncond = args.eps_uncond + at;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      eps[i] = guide(static_cast<T>(widen(eps_cond[i])), static_cast<T>(widen(eps_uncond[i])), row.guidance_scale);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) eps[i] = static_cast<T>(widen(eps_cond[i]));
  }
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) x[i] = prox(y[i], eps[i], row.sqrt_lam);
  if (args.x != nullptr) __builtin_memcpy(args.x + at, x, sizeof(T) * length);
  const bool remembers = args.clean != nullptr && args.y_next != nullptr;
  if (args.clean_next != nullptr || remembers) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) clean[i] = clean_image(y[i], eps[i], row.clean_y, row.clean_eps);
    if (args.clean_next != nullptr) __builtin_memcpy(args.clean_next + at, clean, sizeof(T) * length);
  }
  if (args.y_next == nullptr) return;
  T* y_next = args.y_next + at;
  if (row.b == 0 || (args.noise == nullptr && args.seeds == nullptr)) {
    for (int64_t i = 0; i < length; ++i) y_next[i] = row.a * x[i];
  } else if (args.noise != nullptr) {
    const T* z = args.noise + at;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) y_next[i] = renoise(x[i], z[i], row.a, row.b);
  } else {
    float z[chunk_size];
    draw_normals<isa>(static_cast<uint64_t>(args.seeds[image]), row.draw, offset / 4, length, z);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) y_next[i] = renoise(x[i], static_cast<T>(z[i]), row.a, row.b);
  }
  if (!remembers) return;
  const T* before = args.clean + at;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) y_next[i] = remember(y_next[i], clean[i], before[i], row.memory);
}

struct NormalArgs {
  const int64_t* seeds;
  float* out;
  int64_t num_images;
  int64_t per_image;
  uint64_t step;
};

template <Isa isa>
PROXT2I_INLINE void step_chunk(const NormalArgs& args, int64_t image, int64_t offset, int64_t length) {
  float z[chunk_size];
  draw_normals<isa>(static_cast<uint64_t>(args.seeds[image]), args.step, offset / 4, length, z);
  __builtin_memcpy(args.out + image * args.per_image + offset, z, sizeof(float) * length);
}

template <Isa isa, typename Args>
PROXT2I_INLINE void run_chunks(const Args& args, int64_t begin, int64_t end) {
  const int64_t chunks_per_image = (args.per_image + chunk_size - 1) / chunk_size;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t offset = (chunk % chunks_per_image) * chunk_size;
    step_chunk<isa>(args, chunk / chunks_per_image, offset, std::min(chunk_size, args.per_image - offset));
  }
}

#if defined(__x86_64__)
template <typename Args>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))) void run_avx512(const Args& args, int64_t begin, int64_t end) {
  run_chunks<Isa::avx512>(args, begin, end);
}
template <typename Args>
__attribute__((target("avx2,fma"))) void run_avx2(const Args& args, int64_t begin, int64_t end) {
  run_chunks<Isa::avx2>(args, begin, end);
}
#endif
template <typename Args>
void run_baseline(const Args& args, int64_t begin, int64_t end) {
  run_chunks<Isa::baseline>(args, begin, end);
}

template <typename Args>
void run_parallel(const Args& args) {
  const int64_t num_chunks = args.num_images * ((args.per_image + chunk_size - 1) / chunk_size);
  if (num_chunks == 0) return;
  auto* run = run_baseline<Args>;
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (isa == Isa::avx512) run = run_avx512<Args>;
  if (isa == Isa::avx2) run = run_avx2<Args>;
#endif
  torch::stable::parallel_for(0, num_chunks, chunks_per_thread,
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> prox_step_cpu(const Tensor& y, const Tensor& eps_cond, const std::optional<Tensor>& eps_uncond,
                                                 const std::optional<Tensor>& clean, const std::optional<Tensor>& noise,
                                                 const std::optional<Tensor>& seeds, const Tensor& coefficients, bool want_x,
                                                 bool want_next, bool want_clean) {
  const StepTensors t = prepare(y, eps_cond, eps_uncond, clean, noise, seeds, coefficients, want_x, want_next, want_clean);
  dispatch(t, [](const auto& args) { run_parallel(args); });
  return {t.x, t.y_next, t.clean_next};
}

Tensor philox_normal_cpu(const Tensor& seeds, int64_t step, int64_t count) {
  check_philox(seeds, step, count);
  const Tensor keys = torch::stable::contiguous(seeds);
  const int64_t shape[] = {seeds.size(0), count};
  const Tensor out = torch::stable::new_empty(seeds, {shape, 2}, ScalarType::Float);
  run_parallel(NormalArgs{static_cast<const int64_t*>(keys.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
                          seeds.size(0), count, static_cast<uint64_t>(step)});
  return out;
}

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY_IMPL(proxt2i, CPU, m) {
  m.impl("prox_step", TORCH_BOX(&proxt2i::prox_step_cpu));
  m.impl("philox_normal", TORCH_BOX(&proxt2i::philox_normal_cpu));
}
