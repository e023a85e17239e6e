// Noise for the chunks of CPU kernels: a function for each instruction set, in normals.cpp, so that the generator is not compiled into
// every kernel again.
#pragma once

#include <cstdint>

#include "isa.h"

namespace proxt2i {

constexpr int64_t max_normal_blocks = 128;  // a call's num_blocks, at most

// Memory that will be wanted soon. It is asked for a few lines at a time between the batches of normals, so that it arrives while they
// are computed: all at once, the requests would wait for each other, and the arithmetic for them.
struct Ahead {
  static constexpr int max_runs = 4;
  const char* runs[max_runs] = {};
  int64_t bytes[max_runs] = {};
  int num_runs = 0;

  template <typename T>
  void add(const T* run, int64_t length) {
    runs[num_runs] = reinterpret_cast<const char*>(run);
    bytes[num_runs++] = length * static_cast<int64_t>(sizeof(T));
  }
};

// The normals of Philox blocks first_block ... first_block + num_blocks - 1 of an image: 4 num_blocks numbers. z has room for those of
// max_normal_blocks; what is behind the last wanted one may be overwritten.
void draw_normals_baseline(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z, const Ahead& ahead);
#if defined(__x86_64__)
void draw_normals_avx2(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z, const Ahead& ahead);
void draw_normals_avx512(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z, const Ahead& ahead);
#endif

template <Isa isa>
inline __attribute__((always_inline)) void draw_normals(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z,
                                                        const Ahead& ahead) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::avx512) return draw_normals_avx512(seed, step, first_block, num_blocks, z, ahead);
  if constexpr (isa == Isa::avx2) return draw_normals_avx2(seed, step, first_block, num_blocks, z, ahead);
#endif
  draw_normals_baseline(seed, step, first_block, num_blocks, z, ahead);
}

}  // namespace proxt2i
