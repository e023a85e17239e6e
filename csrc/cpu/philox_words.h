// Philox4x32-10 over a batch of blocks of one image: words w0 ... w3 of block first, first + 1, ... The generic loop is the scalar
// function of common/math.h; the x86 versions hold one block in each 64-bit lane, because there one widening multiplication
// (vpmuludq, which reads the low halves alone) gives both halves of the product. Compilers do not find that form by themselves:
// vectorised from the scalar code, the words cost four times as much as the rest of the noise.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/math.h"
#include "isa.h"

namespace proxt2i {

struct PhiloxWords {
  uint32_t *w0, *w1, *w2, *w3;
};

constexpr int64_t normal_batch = 32;  // blocks

static inline __attribute__((always_inline)) void philox_words_scalar(uint64_t seed, uint64_t step, uint64_t first,
                                                                      const PhiloxWords& out) {
  for (int64_t i = 0; i < normal_batch; ++i) {
    const uint64_t block = first + static_cast<uint64_t>(i);
    uint32_t words[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(step),
                         static_cast<uint32_t>(step >> 32)};
    philox4x32_10(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    out.w0[i] = words[0], out.w1[i] = words[1], out.w2[i] = words[2], out.w3[i] = words[3];
  }
}

#if defined(__x86_64__)

// Upper halves of the lanes hold rubbish after the first round; the multiplication and the final truncation ignore them.
// The plain intrinsics of these two draw a false -Wmaybe-uninitialized from GCC 12.
__attribute__((target("avx512f"))) static inline __m512i high_halves(__m512i lanes) {  // a shuffle: the shifter is the multiplier's port
  return _mm512_maskz_shuffle_epi32(0xFFFF, lanes, _MM_PERM_DDBB);
}
__attribute__((target("avx512f"))) static inline __m512i multiply(__m512i a, __m512i b) {
  return _mm512_maskz_mul_epu32(0xFF, a, b);
}
__attribute__((target("avx512f"))) static inline void store_low_halves(uint32_t* to, __m512i first, __m512i second) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi32(first, even, second));
}

struct Lanes512 {
  __m512i c0, c1, c2, c3;
};

// Eight blocks.
__attribute__((target("avx512f"))) static inline Lanes512 philox_lanes_avx512(uint64_t seed, uint64_t step, uint64_t first) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), lane);
  __m512i c1 = high_halves(c0);
  __m512i c2 = _mm512_set1_epi64(static_cast<int64_t>(step));
  __m512i c3 = high_halves(c2);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i product0 = multiply(c0, m0), product1 = multiply(c2, m1);
    c0 = high_halves(product1) ^ c1 ^ _mm512_set1_epi64(key0);
    c2 = high_halves(product0) ^ c3 ^ _mm512_set1_epi64(key1);
    c1 = product1;
    c3 = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Sixteen blocks to a store, so that what is loaded next is what was stored: a load across two fresh stores has to wait for both.
__attribute__((target("avx512f"))) static inline void philox_words_avx512(uint64_t seed, uint64_t step, uint64_t first,
                                                                          const PhiloxWords& out) {
  for (int64_t i = 0; i < normal_batch; i += 16) {
    const uint64_t block = first + static_cast<uint64_t>(i);
    const Lanes512 a = philox_lanes_avx512(seed, step, block), b = philox_lanes_avx512(seed, step, block + 8);
    store_low_halves(out.w0 + i, a.c0, b.c0);
    store_low_halves(out.w1 + i, a.c1, b.c1);
    store_low_halves(out.w2 + i, a.c2, b.c2);
    store_low_halves(out.w3 + i, a.c3, b.c3);
  }
}

__attribute__((target("avx2"))) static inline void store_low_halves(uint32_t* to, __m256i lanes) {
  const __m256i packed = _mm256_permutevar8x32_epi32(lanes, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

__attribute__((target("avx2"))) static inline void philox_words_avx2(uint64_t seed, uint64_t step, uint64_t first,
                                                                     const PhiloxWords& out) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  for (int64_t i = 0; i < normal_batch; i += 4) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first + static_cast<uint64_t>(i))), lane);
    __m256i c1 = _mm256_srli_epi64(c0, 32);
    __m256i c2 = _mm256_set1_epi64x(static_cast<int64_t>(step));
    __m256i c3 = _mm256_srli_epi64(c2, 32);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i product0 = _mm256_mul_epu32(c0, m0), product1 = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1), _mm256_set1_epi64x(key0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3), _mm256_set1_epi64x(key1));
      c1 = product1;
      c3 = product0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    store_low_halves(out.w0 + i, c0);
    store_low_halves(out.w1 + i, c1);
    store_low_halves(out.w2 + i, c2);
    store_low_halves(out.w3 + i, c3);
  }
}

#endif  // __x86_64__

template <Isa isa>
static inline __attribute__((always_inline)) void philox_words(uint64_t seed, uint64_t step, uint64_t first,
                                                               const PhiloxWords& out) {
#if defined(__x86_64__)
  if constexpr (isa == Isa::avx512) return philox_words_avx512(seed, step, first, out);
  if constexpr (isa == Isa::avx2) return philox_words_avx2(seed, step, first, out);
#endif
  philox_words_scalar(seed, step, first, out);
}

}  // namespace proxt2i
