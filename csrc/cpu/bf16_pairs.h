// Matrices of bfloat16 for AVX-512's vdpbf16ps, which multiplies pairs and adds both products to a sum in float. A word holds a pair: two
// numbers that lie one after the other along the depth of a product, the first in the low half. Functions with the target attribute, not a
// file with compiler flags: what they call inline must have the attribute too, and what has it not stays free of these instructions.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include "products.h"
#include "transpose.h"

#define PROXT2I_PAIRS __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")))

namespace proxt2i {
namespace {
namespace pairs {

using Word = uint32_t;
using AnyWord __attribute__((may_alias, aligned(2))) = Word;  // a word of memory that holds 16-bit numbers

constexpr int64_t lanes = 16;  // words of a vector

// (As everywhere here in the masked form where the other draws a false -Wmaybe-uninitialized from GCC 12.)
PROXT2I_PAIRS inline __m512i shifted_up(__m512i words) { return _mm512_maskz_slli_epi32(0xFFFF, words, 16); }
PROXT2I_PAIRS inline __m512 low(__m512i words) { return _mm512_castsi512_ps(shifted_up(words)); }
PROXT2I_PAIRS inline __m512 high(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

// Words of a low and a high half each.
PROXT2I_PAIRS inline __m512i joined(__m512 low, __m512 high) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(0xFFFFFFFFu, _mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

PROXT2I_PAIRS inline __m512 sum_of_products(__m512 sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }

// 16 numbers of bfloat16 at the low halves of words.
PROXT2I_PAIRS inline __m512i halves(const bfloat16* x) {
  return _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
PROXT2I_PAIRS inline __m512 widened(const bfloat16* x) { return low(halves(x)); }

PROXT2I_PAIRS inline float sum_of(__m512 x) {
  const __m256 by_8 = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xFF, x, 0), _mm512_maskz_extractf32x8_ps(0xFF, x, 1));
  const __m128 by_4 = _mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
  const __m128 by_2 = _mm_add_ps(by_4, _mm_movehl_ps(by_4, by_4));
  return _mm_cvtss_f32(_mm_add_ss(by_2, _mm_movehdup_ps(by_2)));
}

PROXT2I_PAIRS inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
PROXT2I_PAIRS inline void store(bfloat16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// columns [dim / 2, width] of words = rows [count, dim] transposed, and 0 beyond `count`.
PROXT2I_INLINE void transpose_pairs(const bfloat16* rows, int64_t stride, int64_t count, int64_t dim, Word* columns, int64_t width) {
  transpose_blocks(reinterpret_cast<const float*>(rows), stride / 2, count, dim / 2, reinterpret_cast<float*>(columns), width);
}

// In place: columns [dim / 2, width] *= inverse * weight, where inverse [width] = factor / rms of a column (without weights: factor).
PROXT2I_PAIRS inline void normalize_columns(Word* columns, int64_t dim, int64_t width, const float* weight, float factor, float eps, float* inverse) {
  for (int64_t j = 0; j < width; j += lanes) {
    __m512 f = _mm512_set1_ps(factor);
    if (weight != nullptr) {
      __m512 sums = _mm512_setzero_ps();
      for (int64_t d = 0; d < dim / 2; ++d) {
        const __m512i x = _mm512_loadu_si512(columns + d * width + j);
        sums = sum_of_products(sums, x, x);
      }
      const __m512 mean = _mm512_div_ps(sums, _mm512_set1_ps(static_cast<float>(dim)));
      f = _mm512_div_ps(f, _mm512_maskz_sqrt_ps(0xFFFF, _mm512_add_ps(mean, _mm512_set1_ps(eps))));
    }
    _mm512_storeu_ps(inverse + j, f);
    for (int64_t d = 0; d < dim / 2; ++d) {
      const __m512i x = _mm512_loadu_si512(columns + d * width + j);
      const __m512 first = weight == nullptr ? f : _mm512_mul_ps(f, _mm512_set1_ps(weight[2 * d]));
      const __m512 second = weight == nullptr ? f : _mm512_mul_ps(f, _mm512_set1_ps(weight[2 * d + 1]));
      _mm512_storeu_si512(columns + d * width + j, joined(_mm512_mul_ps(low(x), first), _mm512_mul_ps(high(x), second)));
    }
  }
}

// words [count / 2 rounded up, dim]: rows 2 i and 2 i + 1 of x as pairs; a row that is missing is 0.
PROXT2I_PAIRS inline void pair_rows(const bfloat16* x, int64_t stride, int64_t count, int64_t dim, Word* words) {
  for (int64_t i = 0; i < count; i += 2, words += dim) {
    for (int64_t d = 0; d < dim; d += lanes) {
      const __m512i second = i + 1 < count ? shifted_up(halves(x + (i + 1) * stride + d)) : _mm512_setzero_si512();
      _mm512_storeu_si512(words + d, _mm512_or_si512(halves(x + i * stride + d), second));
    }
  }
}
PROXT2I_PAIRS inline void pair_rows(const float* x, int64_t stride, int64_t count, int64_t dim, Word* words) {
  for (int64_t i = 0; i < count; i += 2, words += dim) {
    for (int64_t d = 0; d < dim; d += lanes) {
      const __m512 second = i + 1 < count ? _mm512_loadu_ps(x + (i + 1) * stride + d) : _mm512_setzero_ps();
      _mm512_storeu_si512(words + d, joined(_mm512_loadu_ps(x + i * stride + d), second));
    }
  }
}

// The same of rows times inverse * weight, as normalize_columns rounds them.
PROXT2I_PAIRS inline void pair_normalized_rows(const bfloat16* x, int64_t stride, int64_t count, int64_t dim, const float* weight, const float* inverse,
                                        Word* words) {
  for (int64_t i = 0; i < count; i += 2, words += dim) {
    for (int64_t d = 0; d < dim; d += lanes) {
      const __m512 w = weight == nullptr ? _mm512_set1_ps(1.0f) : _mm512_loadu_ps(weight + d);
      const __m512 first = _mm512_mul_ps(widened(x + i * stride + d), _mm512_mul_ps(_mm512_set1_ps(inverse[i]), w));
      __m512 second = _mm512_setzero_ps();
      if (i + 1 < count) second = _mm512_mul_ps(widened(x + (i + 1) * stride + d), _mm512_mul_ps(_mm512_set1_ps(inverse[i + 1]), w));
      _mm512_storeu_si512(words + d, joined(first, second));
    }
  }
}

// rounded [all, width] = x [count, width], and 0 beyond `count` rows or `columns`.
PROXT2I_PAIRS inline void round_rows(const float* x, int64_t count, int64_t all, int64_t columns, int64_t width, bfloat16* rounded) {
  for (int64_t i = 0; i < all; ++i) {
    for (int64_t d = 0; d < width; d += lanes) {
      const int64_t there = i < count ? std::clamp<int64_t>(columns - d, 0, lanes) : 0;
      store(rounded + i * width + d, _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << there) - 1), x + i * width + d));
    }
  }
}

// c [R, 16 V] = start + a [R, depth] b [depth, 16 V] of pairs; a's words lie row_stride and depth_stride apart, rows of b and c b_stride and c_stride.
template <int R, int V, typename Out>
PROXT2I_PAIRS inline void product_tile(const AnyWord* a, int64_t row_stride, int64_t depth_stride, const Word* b, int64_t b_stride, int64_t depth, Out* c,
                                       int64_t c_stride, Start<float> start = {}) {
  __m512 sums[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sums[r][v] = start.rows == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(start.rows + r * start.stride + v * lanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    __m512i row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = _mm512_loadu_si512(b + k * b_stride + v * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Word factor = a[r * row_stride + k * depth_stride];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = sum_of_products(sums[r][v], _mm512_set1_epi32(static_cast<int>(factor)), row[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * lanes, sums[r][v]);
  }
}

template <int R, typename Out>
PROXT2I_PAIRS inline void product_rows(const AnyWord* a, int64_t row_stride, int64_t depth_stride, const Word* b, int64_t b_stride, int64_t columns,
                                       int64_t depth, Out* c, int64_t c_stride) {
  int64_t w = 0;
  for (; columns - w >= 5 * lanes || columns - w == 3 * lanes; w += 3 * lanes) {
    product_tile<R, 3>(a, row_stride, depth_stride, b + w, b_stride, depth, c + w, c_stride);
  }
  for (; columns - w >= 2 * lanes; w += 2 * lanes) product_tile<R, 2>(a, row_stride, depth_stride, b + w, b_stride, depth, c + w, c_stride);
  if (w < columns) product_tile<R, 1>(a, row_stride, depth_stride, b + w, b_stride, depth, c + w, c_stride);
}

// c [rows, columns] = a [rows, depth] b [depth, columns] of pairs, columns a multiple of `lanes`; depth: of pairs.
template <typename Out>
PROXT2I_PAIRS inline void product(const AnyWord* a, int64_t row_stride, int64_t depth_stride, const Word* b, int64_t b_stride, int64_t rows, int64_t columns,
                           int64_t depth, Out* c, int64_t c_stride) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) {
    product_rows<6>(a + r * row_stride, row_stride, depth_stride, b, b_stride, columns, depth, c + r * c_stride, c_stride);
  }
  for (; r + 2 <= rows; r += 2) {
    product_rows<2>(a + r * row_stride, row_stride, depth_stride, b, b_stride, columns, depth, c + r * c_stride, c_stride);
  }
  if (r < rows) product_rows<1>(a + r * row_stride, row_stride, depth_stride, b, b_stride, columns, depth, c + r * c_stride, c_stride);
}

// The gradient of normalised rows x: from `grads` [count, dim], that of inverse * weight * x, to that of x and of the weight.
// pulls: memory for `count` numbers; pull_factor: 1 / (dim factor^2), see normalize_columns.
PROXT2I_PAIRS inline void unnormalize_rows(const bfloat16* x, int64_t stride, int64_t count, int64_t dim, const float* weight, float pull_factor,
                                    const float* inverse, const float* grads, float* pulls, bfloat16* grad, float* of_weight) {
  for (int64_t i = 0; i < count && weight != nullptr; ++i) {
    __m512 dot = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += lanes) {
      dot = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_loadu_ps(grads + i * dim + d), _mm512_loadu_ps(weight + d)), widened(x + i * stride + d), dot);
    }
    pulls[i] = inverse[i] * inverse[i] * inverse[i] * pull_factor * sum_of(dot);
  }
  for (int64_t d = 0; d < dim; d += lanes) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; ++i) {
      const __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(inverse[i]), _mm512_loadu_ps(grads + i * dim + d));
      if (weight == nullptr) {
        store(grad + i * stride + d, scaled);
        continue;
      }
      const __m512 of_x = widened(x + i * stride + d);
      store(grad + i * stride + d, _mm512_fnmadd_ps(_mm512_set1_ps(pulls[i]), of_x, _mm512_mul_ps(scaled, _mm512_loadu_ps(weight + d))));
      sums = _mm512_fmadd_ps(scaled, of_x, sums);
    }
    if (weight != nullptr) _mm512_storeu_ps(of_weight + d, sums);
  }
}

}  // namespace pairs
}  // namespace
}  // namespace proxt2i

#endif
