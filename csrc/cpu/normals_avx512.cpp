// Noise in vectors of 512 bits; compiled with AVX-512.
#if defined(__AVX512F__)

#include <immintrin.h>

#include "normals_lanes.h"

namespace proxt2i {
namespace {

struct Avx512 {
  using Lanes = __m512i;
  static constexpr int lanes = 8, chains = 4;

  static Lanes all(uint64_t word) { return _mm512_set1_epi64(static_cast<int64_t>(word)); }
  static Lanes all32(uint32_t word) { return _mm512_set1_epi32(static_cast<int32_t>(word)); }
  // The masked forms of these draw no false -Wmaybe-uninitialized from GCC 12.
  static Lanes multiply(Lanes a, Lanes b) { return _mm512_maskz_mul_epu32(0xFF, a, b); }
  static Lanes high(Lanes a) { return _mm512_maskz_shuffle_epi32(0xFFFF, a, _MM_PERM_DDBB); }  // the shifter is the multiplier's port
  static Lanes exclusive_or(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
  static Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

  // Blocks of vector i: two vectors' lanes in turns are the 32-bit lanes of a group, and 32-bit lane 4 j + k of it is block 4 k + j.
  static Lanes blocks(uint32_t first, int i) {
    const Lanes order = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    return _mm512_add_epi32(all(first + static_cast<uint32_t>(16 * (i / 2) + 4 * (i % 2))), order);
  }
  static Lanes low_halves(Lanes even, Lanes odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }
  static Lanes high_halves(Lanes even, Lanes odd) { return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB); }
  static void store(uint32_t* to, Lanes words) { _mm512_store_si512(to, words); }

  // z0 ... z3 of the blocks of a group, block by block.
  static void interleave(const float* z0, const float* z1, const float* z2, const float* z3, float* out) {
    const __m512i a = load(z0), b = load(z1), c = load(z2), d = load(z3);
    const __m512i ab = _mm512_maskz_unpacklo_epi32(0xFFFF, a, b), cd = _mm512_maskz_unpacklo_epi32(0xFFFF, c, d);
    const __m512i ab_high = _mm512_maskz_unpackhi_epi32(0xFFFF, a, b), cd_high = _mm512_maskz_unpackhi_epi32(0xFFFF, c, d);
    _mm512_storeu_si512(out, _mm512_maskz_unpacklo_epi64(0xFF, ab, cd));
    _mm512_storeu_si512(out + 16, _mm512_maskz_unpackhi_epi64(0xFF, ab, cd));
    _mm512_storeu_si512(out + 32, _mm512_maskz_unpacklo_epi64(0xFF, ab_high, cd_high));
    _mm512_storeu_si512(out + 48, _mm512_maskz_unpackhi_epi64(0xFF, ab_high, cd_high));
  }
  static __m512i load(const float* from) { return _mm512_load_si512(from); }
};

}  // namespace

void draw_normals_avx512(uint64_t seed, uint64_t step, uint64_t first_block, int64_t num_blocks, float* z, const Ahead& ahead) {
  draw_in_vectors<Avx512>(seed, step, first_block, num_blocks, z, ahead);
}

}  // namespace proxt2i

#endif
