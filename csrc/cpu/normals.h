// Noise for the chunks of CPU kernels: a function for each instruction set, in a file of its own, so that the generator is not compiled
// into every kernel again.
#pragma once

#include <cstdint>

#include "isa.h"

namespace proxt2i {

constexpr int64_t max_normal_blocks = 128;  // a call's num_blocks, at most
constexpr int64_t normal_batch = 32;        // blocks that are computed together

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

  // The lines whose turn it is before the batch of normals that begins with this block of the call.
  inline __attribute__((always_inline)) void ask(int64_t block) const {
    constexpr int64_t cache_line = 64, num_batches = max_normal_blocks / normal_batch;
    for (int run = 0; run < num_runs; ++run) {
      const int64_t share = (bytes[run] / num_batches + cache_line - 1) / cache_line * cache_line;
      const char* from = runs[run] + block / normal_batch * share;
      for (int64_t at = 0; at < share; at += cache_line) __builtin_prefetch(from + at);
    }
  }
};

// The normals of Philox blocks first_block ... first_block + num_blocks - 1 of an image: 4 num_blocks numbers. first_block is a multiple
// of max_normal_blocks. z has room for those of max_normal_blocks; what is behind the last wanted one may be overwritten.
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
