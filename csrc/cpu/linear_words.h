// What the products of linear layers are made of, a word at a time: a number, or two bfloat16 ones that lie one after the other along the depth of a
// product (bf16_pairs.h). A tile is `tile_rows` x `panel_width`; one factor is staged by rows or by columns, the other lies in panels [depth, panel_width].
#pragma once

#include "../common/narrow.h"
#include "bf16_pairs.h"
#include "products.h"
#include "transpose.h"

namespace proxt2i {
namespace {

constexpr int64_t tile_rows = 12;  // 24 of AVX-512's 32 registers hold sums

// T: of the computation; E: of what is stored.
template <Isa isa, typename T, typename E>
struct Words {
  using Word = T;
  static constexpr int64_t numbers = 1;  // of a word

  // words [count, dim] = rows of x; rows of words lie `to_stride` apart.
  static PROXT2I_INLINE void rows(const E* x, int64_t stride, int64_t count, int64_t dim, T* words, int64_t to_stride) {
    for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) words[i * to_stride + d] = widen(x[i * stride + d]);
    }
  }
  // words [count, dim], the rows being the depth.
  template <typename From>
  static PROXT2I_INLINE void deep_rows(const From* x, int64_t stride, int64_t count, int64_t dim, T* words) {
    for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) words[i * dim + d] = widen(x[i * stride + d]);
    }
  }
  // panel [dim, panel_width] = rows of x transposed.
  static PROXT2I_INLINE void transposed(const T* x, int64_t stride, int64_t dim, T* panel) {
    transpose<isa>(x, stride, panel_width, dim, panel, panel_width);
  }

  static PROXT2I_INLINE void tile(const T* a, int64_t row_stride, int64_t depth_stride, const T* panel, int64_t depth, T* c, int64_t c_stride, Start<T> start) {
    panel_tile<isa, tile_rows>(a, row_stride, depth_stride, panel, depth, c, c_stride, start);
  }
  // The same for results that are stored as another type.
  template <typename Out>
  static PROXT2I_INLINE void tile(const T* a, int64_t row_stride, int64_t depth_stride, const T* panel, int64_t depth, Out* c, int64_t c_stride, Start<T> start) {
    T wide[tile_rows * panel_width];
    tile(a, row_stride, depth_stride, panel, depth, wide, panel_width, start);
    for (int64_t r = 0; r < tile_rows; ++r) {
#pragma omp simd
      for (int64_t w = 0; w < panel_width; ++w) narrow(wide[r * panel_width + w], c[r * c_stride + w]);
    }
  }
};

#if defined(__x86_64__)
template <>
struct Words<Isa::avx512_bf16, float, bfloat16> {
  using Word = pairs::Word;
  static constexpr int64_t numbers = 2;

  static PROXT2I_INLINE void rows(const bfloat16* x, int64_t stride, int64_t count, int64_t dim, Word* words, int64_t to_stride) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(words + i * to_stride, x + i * stride, sizeof(bfloat16) * static_cast<size_t>(dim));
  }
  template <typename From>
  static PROXT2I_INLINE void deep_rows(const From* x, int64_t stride, int64_t count, int64_t dim, Word* words) {
    pairs::pair_rows(x, stride, count, dim, words);
  }
  static PROXT2I_INLINE void transposed(const float* x, int64_t stride, int64_t dim, Word* panel) {
    bfloat16* rounded = workspace<bfloat16>(panel_width * dim);
    for (int64_t i = 0; i < panel_width; ++i) pairs::round_rows(x + i * stride, 1, 1, dim, dim, rounded + i * dim);
    pairs::transpose_pairs(rounded, dim, panel_width, dim, panel, panel_width);
  }
  template <typename Out>
  static PROXT2I_INLINE void tile(const Word* a, int64_t row_stride, int64_t depth_stride, const Word* panel, int64_t depth, Out* c, int64_t c_stride,
                                  Start<float> start) {
    pairs::product_tile<tile_rows, panel_width / pairs::lanes>(a, row_stride, depth_stride, panel, panel_width, depth, c, c_stride, start);
  }
};
#endif

}  // namespace
}  // namespace proxt2i
