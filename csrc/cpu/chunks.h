// CPU kernels run chunk by chunk: a chunk never crosses an image, so that it has one seed, and what a kernel keeps of it stays in the
// L1 cache. A kernel is a struct with num_images, per_image and a member
//   template <Isa isa> void chunk(int64_t image, int64_t offset, int64_t length) const;   elements offset ... offset + length - 1
// which is compiled once for each instruction set: everything it calls must be PROXT2I_INLINE. avx512_bf16 is the same as avx512 to a kernel
// unless it has a member `has_bf16_products` that is true.
#pragma once

#include <algorithm>

#include "../common/reduce.h"
#include "isa.h"
#include "normals.h"

#define PROXT2I_INLINE inline __attribute__((always_inline))

namespace proxt2i {

constexpr int64_t chunks_per_thread = 16;  // at least, so that small calls stay on one thread; a kernel's own member of this name goes before

static_assert(chunk_size == 4 * max_normal_blocks);

// Draw `step` of a seed for a chunk at this offset of its image; the first `length` of z are wanted. ahead: memory to ask for meanwhile.
template <Isa isa>
static PROXT2I_INLINE void draw_chunk(int64_t seed, int64_t step, int64_t offset, int64_t length, float (&z)[chunk_size],
                                      const Ahead& ahead = {}) {
  draw_normals<isa>(static_cast<uint64_t>(seed), static_cast<uint64_t>(step), static_cast<uint64_t>(offset / 4), (length + 3) / 4, z,
                    ahead);
}
template <Isa isa>
static PROXT2I_INLINE void draw_chunk(int64_t seed, int64_t step, int64_t offset, int64_t length, double (&z)[chunk_size],
                                      const Ahead& ahead = {}) {
  float drawn[chunk_size];
  draw_chunk<isa>(seed, step, offset, length, drawn, ahead);
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) z[i] = drawn[i];
}

template <int64_t n, typename T>
static PROXT2I_INLINE T sum_by_halving(T* v) {
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) v[i] += v[i + n / 2];
  if constexpr (n > 2) return sum_by_halving<n / 2>(v);
  return v[0];
}

// The sum of the first `length` terms of a chunk in reduce.h's order; overwrites the terms.
template <typename T>
static PROXT2I_INLINE T chunk_sum(T (&terms)[chunk_size], int64_t length) {
  for (int64_t i = length; i < chunk_size; ++i) terms[i] = 0;
  return sum_by_halving<chunk_size>(terms);
}

// The two sums of a chunk at this offset of its image, to their place among SumArgs::partials.
template <typename T>
static PROXT2I_INLINE void store_sums(T (&first)[chunk_size], T (&second)[chunk_size], int64_t per_image, int64_t image, int64_t offset,
                                      int64_t length, T* partials) {
  T* partial = partials + 2 * (image * chunks_in(per_image) + offset / chunk_size);
  partial[0] = chunk_sum(first, length);
  partial[1] = chunk_sum(second, length);
}

template <Isa isa, typename Kernel>
static PROXT2I_INLINE void run_chunks(const Kernel& kernel, int64_t begin, int64_t end) {
  const int64_t chunks_per_image = chunks_in(kernel.per_image);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t offset = (chunk % chunks_per_image) * chunk_size;
    kernel.template chunk<isa>(chunk / chunks_per_image, offset, std::min(chunk_size, kernel.per_image - offset));
  }
}

#if defined(__x86_64__)
template <Isa isa, typename Kernel>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))) void run_chunks_avx512(const Kernel& kernel, int64_t begin,
                                                                                         int64_t end) {
  run_chunks<isa>(kernel, begin, end);
}
template <typename Kernel>
__attribute__((target("avx2,fma"))) void run_chunks_avx2(const Kernel& kernel, int64_t begin, int64_t end) {
  run_chunks<Isa::avx2>(kernel, begin, end);
}
#endif
template <typename Kernel>
void run_chunks_baseline(const Kernel& kernel, int64_t begin, int64_t end) {
  run_chunks<Isa::baseline>(kernel, begin, end);
}

template <typename Kernel>
void run_parallel(const Kernel& kernel) {
  const int64_t num_chunks = kernel.num_images * chunks_in(kernel.per_image);
  if (num_chunks == 0) return;
  auto* run = run_chunks_baseline<Kernel>;
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (isa >= Isa::avx512) run = run_chunks_avx512<Isa::avx512, Kernel>;
  if constexpr (requires { requires Kernel::has_bf16_products; }) {
    if (isa == Isa::avx512_bf16) run = run_chunks_avx512<Isa::avx512_bf16, Kernel>;
  }
  if (isa == Isa::avx2) run = run_chunks_avx2<Kernel>;
#endif
  int64_t grain = chunks_per_thread;
  if constexpr (requires { Kernel::chunks_per_thread; }) grain = Kernel::chunks_per_thread;
  torch::stable::parallel_for(0, num_chunks, grain, [&](int64_t begin, int64_t end) { run(kernel, begin, end); });
}

template <typename T>
void sum_chunks(const SumArgs<T>& args) {
  for (int64_t image = 0; image < args.num_images; ++image) {
    double first[sum_lanes] = {}, second[sum_lanes] = {};
    const T* row = args.partials + 2 * args.num_chunks * image;
    for (int64_t chunk = 0; chunk < args.num_chunks; ++chunk) {
      first[chunk % sum_lanes] += static_cast<double>(row[2 * chunk]);
      second[chunk % sum_lanes] += static_cast<double>(row[2 * chunk + 1]);
    }
    args.first[image] = static_cast<T>(sum_by_halving<sum_lanes>(first) / args.first_divisor);
    args.second[image] = static_cast<T>(sum_by_halving<sum_lanes>(second) / args.second_divisor);
  }
}

}  // namespace proxt2i
