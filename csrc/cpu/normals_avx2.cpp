// Noise in vectors of 256 bits; compiled with AVX2 and FMA.
#if defined(__AVX2__)

#include <immintrin.h>

#include "normals_lanes.h"

namespace proxt2i {
namespace {

struct Avx2 {
  using Lanes = __m256i;
  static constexpr int lanes = 4, chains = 2;

  static Lanes all(uint64_t word) { return _mm256_set1_epi64x(static_cast<int64_t>(word)); }
  static Lanes all32(uint32_t word) { return _mm256_set1_epi32(static_cast<int32_t>(word)); }
  static Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
  static Lanes high(Lanes a) { return _mm256_shuffle_epi32(a, 0xF5); }  // the shifter is the multiplier's port
  static Lanes exclusive_or(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return exclusive_or(exclusive_or(a, b), c); }

  // Blocks of vector i: two vectors' lanes in turns are the 32-bit lanes of a group, and 32-bit lane 4 j + k of it is block 2 k + j.
  static Lanes blocks(uint32_t first, int i) {
    return _mm256_add_epi32(all(first + static_cast<uint32_t>(8 * (i / 2) + 2 * (i % 2))), _mm256_setr_epi64x(0, 4, 1, 5));
  }
  static Lanes low_halves(Lanes even, Lanes odd) { return _mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA); }
  static Lanes high_halves(Lanes even, Lanes odd) { return _mm256_blend_epi32(odd, _mm256_shuffle_epi32(even, 0xF5), 0x55); }
  static void store(uint32_t* to, Lanes words) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), words); }

  // z0 ... z3 of the blocks of a group, block by block.
  static void interleave(const float* z0, const float* z1, const float* z2, const float* z3, float* out) {
    const __m256i a = load(z0), b = load(z1), c = load(z2), d = load(z3);
    const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
    put(out, _mm256_unpacklo_epi64(ab, cd));
    put(out + 8, _mm256_unpackhi_epi64(ab, cd));
    put(out + 16, _mm256_unpacklo_epi64(ab_high, cd_high));
    put(out + 24, _mm256_unpackhi_epi64(ab_high, cd_high));
  }
  static __m256i load(const float* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
  static void put(float* to, __m256i four) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), four); }
};

}  // namespace

void draw_normals_avx2(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z, const Ahead& ahead) {
  draw_in_vectors<Avx2>(seed, step, first_block, num_blocks, z, ahead);
}

}  // namespace proxt2i

#endif
