#include "normals.h"

#include "philox_words.h"

namespace proxt2i {
namespace {

constexpr int64_t cache_line = 64;  // bytes

template <Isa isa>
inline __attribute__((always_inline)) void draw(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z,
                                                const Ahead& ahead) {
  constexpr int64_t num_batches = max_normal_blocks / normal_batch;
  for (int64_t first = 0, batch = 0; first < num_blocks; first += normal_batch, ++batch) {
    for (int run = 0; run < ahead.num_runs; ++run) {
      const int64_t share = (ahead.bytes[run] / num_batches + cache_line - 1) / cache_line * cache_line;
      for (int64_t at = batch * share; at < (batch + 1) * share; at += cache_line) __builtin_prefetch(ahead.runs[run] + at);
    }
    uint32_t w0[normal_batch], w1[normal_batch], w2[normal_batch], w3[normal_batch];
    float z0[normal_batch], z1[normal_batch], z2[normal_batch], z3[normal_batch];
    philox_words<isa>(seed, step, first_block + static_cast<uint64_t>(first), {w0, w1, w2, w3});
#pragma omp simd
    for (int64_t i = 0; i < normal_batch; ++i) {
      box_muller(w0[i], w1[i], z0[i], z1[i]);
      box_muller(w2[i], w3[i], z2[i], z3[i]);
    }
    float* out = z + 4 * first;
    for (int64_t i = 0; i < normal_batch; ++i) {
      out[4 * i] = z0[i];
      out[4 * i + 1] = z1[i];
      out[4 * i + 2] = z2[i];
      out[4 * i + 3] = z3[i];
    }
  }
}

}  // namespace

void draw_normals_baseline(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z, const Ahead& ahead) {
  draw<Isa::baseline>(seed, step, first_block, num_blocks, z, ahead);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void draw_normals_avx2(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks,
                                                           float* z, const Ahead& ahead) {
  draw<Isa::avx2>(seed, step, first_block, num_blocks, z, ahead);
}
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))) void draw_normals_avx512(uint64_t seed, uint64_t step,
                                                                                          uint64_t first_block, int64_t num_blocks,
                                                                                          float* z, const Ahead& ahead) {
  draw<Isa::avx512>(seed, step, first_block, num_blocks, z, ahead);
}
#endif

}  // namespace proxt2i
