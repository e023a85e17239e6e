// Transposition of 32-bit words, in blocks of 8 x 8 where the machine has AVX2.
#pragma once

#include <cstring>
#include <type_traits>

#include "chunks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace proxt2i {
namespace {

#if defined(__x86_64__)
// columns [8, 8] = rows [8, 8] transposed; rows lie `stride` and columns `width` apart.
__attribute__((target("avx2"))) inline void transpose_block(const float* rows, int64_t stride, float* columns, int64_t width) {
  for (int half = 0; half < 2; ++half, rows += 4, columns += 4 * width) {
    __m256 x[4];  // row i beside row i + 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows + i * stride)), _mm_loadu_ps(rows + (i + 4) * stride), 1);
    }
    const __m256d low[2] = {_mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1])), _mm256_castps_pd(_mm256_unpacklo_ps(x[2], x[3]))};
    const __m256d high[2] = {_mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1])), _mm256_castps_pd(_mm256_unpackhi_ps(x[2], x[3]))};
    _mm256_storeu_ps(columns, _mm256_castpd_ps(_mm256_unpacklo_pd(low[0], low[1])));
    _mm256_storeu_ps(columns + width, _mm256_castpd_ps(_mm256_unpackhi_pd(low[0], low[1])));
    _mm256_storeu_ps(columns + 2 * width, _mm256_castpd_ps(_mm256_unpacklo_pd(high[0], high[1])));
    _mm256_storeu_ps(columns + 3 * width, _mm256_castpd_ps(_mm256_unpackhi_pd(high[0], high[1])));
  }
}

// columns [dim, width] = rows [count, dim] transposed, and 0 beyond `count`; dim and width are multiples of 8.
__attribute__((target("avx2"), noinline)) void transpose_blocks(const float* rows, int64_t stride, int64_t count, int64_t dim, float* columns,
                                                                int64_t width) {
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int64_t d = 0; d < dim; d += 8) transpose_block(rows + j * stride + d, stride, columns + d * width + j, width);
  }
  for (; j < width; j += 8) {
    alignas(32) float block[8][8] = {};
    for (int64_t d = 0; d < dim; d += 8) {
      for (int i = 0; i < 8; ++i) {
        if (j + i < count) std::memcpy(block[i], rows + (j + i) * stride + d, sizeof(block[0]));
      }
      transpose_block(block[0], 8, columns + d * width + j, width);
    }
  }
}
#endif

// The same for any type and machine.
template <Isa isa, typename T>
PROXT2I_INLINE void transpose(const T* rows, int64_t stride, int64_t count, int64_t dim, T* columns, int64_t width) {
#if defined(__x86_64__)
  if constexpr (isa != Isa::baseline && std::is_same_v<T, float>) return transpose_blocks(rows, stride, count, dim, columns, width);
#endif
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t j = 0; j < count; ++j) columns[d * width + j] = rows[j * stride + d];
    for (int64_t j = count; j < width; ++j) columns[d * width + j] = 0;
  }
}

}  // namespace
}  // namespace proxt2i
