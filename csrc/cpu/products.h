// Products of matrices that lie in the cache, for attention, linear layers and Muon on a CPU, and the memory that they are worked on in.
#pragma once

#include <memory>
#include <type_traits>
#include <vector>

#include "chunks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace proxt2i {
namespace {

constexpr int64_t lanes = 16;  // it divides the width of a product: attention pads its rows to it, and it divides the width of a head

constexpr int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// At least `size` elements that belong to this thread until its next call, where a line of the cache begins.
template <typename T>
T* workspace(int64_t size) {
  static thread_local std::vector<T> memory;
  constexpr int64_t line = 64;
  const size_t needed = static_cast<size_t>(size + line / static_cast<int64_t>(sizeof(T)));
  if (memory.size() < needed) memory.resize(needed);
  void* start = memory.data();
  size_t space = memory.size() * sizeof(T);
  return static_cast<T*>(std::align(line, static_cast<size_t>(size) * sizeof(T), start, space));
}

// What the sums of a product begin with: rows of numbers `stride` apart (0: one row for all); without rows 0.
template <typename T>
struct Start {
  const T* rows = nullptr;
  int64_t stride = 0;
};

// c [R, W] = start + a [R, depth] b [depth, W]; a's elements lie row_stride and depth_stride apart, rows of b and c b_stride and c_stride.
template <int R, int W, typename T>
PROXT2I_INLINE void product_tile(const T* a, int64_t row_stride, int64_t depth_stride, const T* b, int64_t b_stride, int64_t depth, T* c,
                                 int64_t c_stride, Start<T> start = {}) {
  T sums[R][W] = {};
  if (start.rows != nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma omp simd
      for (int w = 0; w < W; ++w) sums[r][w] = start.rows[r * start.stride + w];
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T factor = a[r * row_stride + k * depth_stride];
#pragma omp simd
      for (int w = 0; w < W; ++w) sums[r][w] = fma(factor, b[k * b_stride + w], sums[r][w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma omp simd
    for (int w = 0; w < W; ++w) c[r * c_stride + w] = sums[r][w];
  }
}

// The same for a panel: b [depth, panel_width] without gaps. R is even.
constexpr int64_t panel_width = 32;

#if defined(__x86_64__)
// (The sums of product_tile go over the stack before and after its loop.)
template <int R>
__attribute__((target("avx512f,fma"))) inline void panel_tile_avx512(const float* a, int64_t row_stride, int64_t depth_stride, const float* panel, int64_t depth,
                                                                     float* c, int64_t c_stride, Start<float> start) {
  __m512 sums[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v) sums[r][v] = start.rows == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(start.rows + r * start.stride + 16 * v);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const __m512 row[2] = {_mm512_loadu_ps(panel + k * panel_width), _mm512_loadu_ps(panel + k * panel_width + 16)};
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512 factor = _mm512_set1_ps(a[r * row_stride + k * depth_stride]);
      for (int v = 0; v < 2; ++v) sums[r][v] = _mm512_fmadd_ps(factor, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + r * c_stride + 16 * v, sums[r][v]);
  }
}
#endif

template <Isa isa, int R, typename T>
PROXT2I_INLINE void panel_tile(const T* a, int64_t row_stride, int64_t depth_stride, const T* panel, int64_t depth, T* c, int64_t c_stride,
                               Start<T> start = {}) {
#if defined(__x86_64__)
  if constexpr (isa >= Isa::avx512 && std::is_same_v<T, float>) return panel_tile_avx512<R>(a, row_stride, depth_stride, panel, depth, c, c_stride, start);
#endif
  for (int r = 0; r < R; r += R / 2) {
    for (int64_t w = 0; w < panel_width; w += lanes) {
      const Start<T> its{start.rows == nullptr ? nullptr : start.rows + r * start.stride + w, start.stride};
      product_tile<R / 2, lanes>(a + r * row_stride, row_stride, depth_stride, panel + w, panel_width, depth, c + r * c_stride + w, c_stride, its);
    }
  }
}

template <int R, typename T>
PROXT2I_INLINE void product_rows(const T* a, int64_t row_stride, int64_t depth_stride, const T* b, int64_t b_stride, int64_t columns,
                                 int64_t depth, T* c, int64_t c_stride) {
  int64_t w = 0;
  for (; w + 2 * lanes <= columns; w += 2 * lanes) {
    product_tile<R, 2 * lanes>(a, row_stride, depth_stride, b + w, b_stride, depth, c + w, c_stride);
  }
  if (w < columns) product_tile<R, lanes>(a, row_stride, depth_stride, b + w, b_stride, depth, c + w, c_stride);
}

// c [rows, columns] = a [rows, depth] b [depth, columns], columns a multiple of `lanes`.
template <typename T>
PROXT2I_INLINE void product(const T* a, int64_t row_stride, int64_t depth_stride, const T* b, int64_t b_stride, int64_t rows,
                            int64_t columns, int64_t depth, T* c, int64_t c_stride) {
  constexpr int many = std::is_same_v<T, float> ? 6 : 3;
  int64_t r = 0;
  for (; r + many <= rows; r += many) {
    product_rows<many>(a + r * row_stride, row_stride, depth_stride, b, b_stride, columns, depth, c + r * c_stride, c_stride);
  }
  for (; r < rows; ++r) product_rows<1>(a + r * row_stride, row_stride, depth_stride, b, b_stride, columns, depth, c + r * c_stride, c_stride);
}

}  // namespace
}  // namespace proxt2i
