// Tiles in shared memory as wgmma reads them without swizzling, and a warp group's products of them: units of 8 columns one after another,
// each with all rows of the tile, 16 bytes a row. After each unit 16 bytes are left free, so that the units of a row lie in different
// banks. Where a row is the depth of a product, 72 is filled up to 80 with zeros; where it is the width, it costs 72.
#pragma once

#include "hopper.cuh"
#include "tiles.cuh"

namespace proxt2i {

template <int rows>
constexpr int unit_size = 8 * rows + 8;  // elements
template <int D>
constexpr int depth_units = (D + 15) / 16 * 2;

// Starts copying rows first ... first + rows - 1 of source (row pitch in elements) to a tile; rows from `limit` on become zeros. A thread
// keeps to one unit and takes every step-th row of it.
template <int D, int rows, int threads, typename T>
__device__ __forceinline__ void load_units(T* tile, const T* source, int64_t pitch, int first, int limit) {
  constexpr int units = D / 8, step = threads / units;
  const int thread = static_cast<int>(threadIdx.x), begin = thread / units, unit = thread % units;
  T* const to = tile + unit * unit_size<rows> + 8 * begin;
  const T* const from = source + (first + begin) * pitch + 8 * unit;
#pragma unroll
  for (int row = 0; row < rows; row += step) {
    const bool mine = (threads % units == 0 || begin < step) && (row + step <= rows || row + begin < rows);
    if (mine) cp_async_16(to + 8 * row, from + row * pitch, first + begin + row < limit);
  }
}

// Zeros in the unit that fills up the depth, if there is one.
template <int D, int rows, int threads, typename T>
__device__ __forceinline__ void clear_padding(T* tile) {
  static_assert(rows <= threads);
  if (D % 16 != 0 && threadIdx.x < rows) *reinterpret_cast<uint4*>(tile + D / 8 * unit_size<rows> + 8 * threadIdx.x) = {0, 0, 0, 0};
}

// A tile's strides as a matrix: of rows that are multiplied with one another, and of rows that are summed.
template <int rows>
constexpr uint64_t k_major = matrix_strides(2 * unit_size<rows>, 128);
template <int rows>
constexpr uint64_t mn_major = matrix_strides(128, 2 * unit_size<rows>);

// Begins c = a b^T, dot products of length D: a 64 rows of a tile of `rows`, b a tile of N rows, both K-major.
template <typename T, int D, int rows, int N>
__device__ __forceinline__ void begin_dots(float (&c)[N / 8][4], uint64_t a, uint64_t b) {
#pragma unroll
  for (int unit = 0; unit < depth_units<D>; unit += 2) {
    wgmma_shared<T, N>(c, matrix_after(a, unit * 2 * unit_size<rows>), matrix_after(b, unit * 2 * unit_size<N>), unit > 0);
  }
  products_commit();
}

// Begins c += a b: the K rows of b, an MN-major tile, summed with the weights a.
template <typename T, int D, int K>
__device__ __forceinline__ void begin_sums(float (&c)[D / 8][4], const Weights16<K>& a, uint64_t b) {
#pragma unroll
  for (int step = 0; step < K / 16; ++step) wgmma_registers<T, D>(c, a.k16[step], matrix_after(b, step * 256));
  products_commit();
}

// All that was loaded is there for the products, and nobody works on the tiles before it any more.
__device__ __forceinline__ void wait_for_tiles() {
  cp_async_wait<0>();
  fence_shared_for_products();
  __syncthreads();
}

// A warp's 16 x D accumulator, times `factor` of each row half, by way of its own 16 rows of a tile to rows of target below `limit`.
template <int D, int rows, typename T>
__device__ __forceinline__ void store_units16(const float (&acc)[D / 8][4], const float (&factor)[2], T* tile, T* target, int64_t pitch,
                                              int limit) {
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      const uint32_t pair = pack2<T>(acc[d][2 * half] * factor[half], acc[d][2 * half + 1] * factor[half]);
      *reinterpret_cast<uint32_t*>(tile + d * unit_size<rows> + 8 * (lane / 4 + 8 * half) + 2 * (lane % 4)) = pair;
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * (D / 8); i += 32) {
    const int row = i / (D / 8), unit = i % (D / 8);
    if (row < limit) {
      *reinterpret_cast<uint4*>(target + row * pitch + 8 * unit) = *reinterpret_cast<const uint4*>(tile + unit * unit_size<rows> + 8 * row);
    }
  }
}

}  // namespace proxt2i
