// Noise for the chunks of CPU kernels: a function for each instruction set, in normals.cpp, so that the generator is not compiled into
// every kernel again.
#pragma once

#include <cstdint>

#include "isa.h"

namespace proxt2i {

constexpr int64_t max_normal_blocks = 128;  // a call's num_blocks, at most

// The normals of Philox blocks first_block ... first_block + num_blocks - 1 of an image: 4 num_blocks numbers.
void draw_normals_baseline(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z);
#if defined(__x86_64__)
void draw_normals_avx2(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z);
void draw_normals_avx512(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z);
#endif

template <Isa isa>
inline __attribute__((always_inline)) void draw_normals(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::avx512) return draw_normals_avx512(seed, step, first_block, num_blocks, z);
  if constexpr (isa == Isa::avx2) return draw_normals_avx2(seed, step, first_block, num_blocks, z);
#endif
  draw_normals_baseline(seed, step, first_block, num_blocks, z);
}

}  // namespace proxt2i
