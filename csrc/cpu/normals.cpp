#include "normals.h"

#include "philox_words.h"

namespace proxt2i {
namespace {

template <Isa isa>
inline __attribute__((always_inline)) void draw(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z) {
  uint32_t w0[max_normal_blocks], w1[max_normal_blocks], w2[max_normal_blocks], w3[max_normal_blocks];
  float z0[max_normal_blocks], z1[max_normal_blocks], z2[max_normal_blocks], z3[max_normal_blocks];
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

}  // namespace

void draw_normals_baseline(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z) {
  draw<Isa::baseline>(seed, step, first_block, num_blocks, z);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void draw_normals_avx2(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks,
                                                           float* z) {
  draw<Isa::avx2>(seed, step, first_block, num_blocks, z);
}
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))) void draw_normals_avx512(uint64_t seed, uint64_t step,
                                                                                          uint64_t first_block, int64_t num_blocks,
                                                                                          float* z) {
  draw<Isa::avx512>(seed, step, first_block, num_blocks, z);
}
#endif

}  // namespace proxt2i
