// Matrix products of 16-bit tiles in shared memory, by warps: the parts that attention's kernels are made of. A tile is `rows` rows of D
// elements; a warp's accumulator is 16 rows by N columns in fp32, acc[n][i] holding column tile n's
//     row lane / 4 + 8 (i / 2), column 8 n + 2 (lane % 4) + i % 2        (the layout of mma.m16n8)
// D = 72 costs 72: four steps of depth 16 and one of depth 8.
#pragma once

#include "ptx.cuh"

namespace proxt2i {

// Elements from one row of a tile to the next: an odd number of 16-byte units, so that the eight rows of an ldmatrix lie in different
// banks.
template <int D>
constexpr int tile_stride = (D / 8) % 2 == 1 ? D : D + 8;

template <int D, int rows>
constexpr int tile_size = rows * tile_stride<D>;  // elements

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }

// Starts copying rows first ... first + rows - 1 of source (row pitch in elements) to a tile; rows from `limit` on become zeros.
template <int D, int rows, int threads, typename T>
__device__ __forceinline__ void load_tile(T* tile, const T* source, int64_t pitch, int first, int limit) {
  constexpr int chunks = D / 8;
  for (int i = static_cast<int>(threadIdx.x); i < rows * chunks; i += threads) {
    const int row = i / chunks, column = 8 * (i % chunks);
    const bool valid = first + row < limit;
    cp_async_16(tile + row * tile_stride<D> + column, valid ? source + (first + row) * pitch + column : source, valid);
  }
}

// A warp's 16 rows of a tile as the left operand; in registers, where they are used again and again ...
template <int D>
struct Rows16 {
  static constexpr int unroll = D / 16;
  uint32_t k16[D / 16][4];
  uint32_t k8[2];  // where D is not a multiple of 16

  template <typename T>
  __device__ __forceinline__ void load(const T* rows) {
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ldmatrix_x4(k16[k], rows + (lane % 16) * tile_stride<D> + 16 * k + 8 * (lane / 16));
    if constexpr (D % 16 != 0) ldmatrix_x2(k8, rows + (lane % 16) * tile_stride<D> + D - 8);
  }
  __device__ __forceinline__ void step16(int k, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = k16[k][i];
  }
  __device__ __forceinline__ void step8(uint32_t (&a)[2]) const { a[0] = k8[0], a[1] = k8[1]; }
};

// ... or left in shared memory, where registers are short.
template <int D, typename T>
struct SharedRows16 {
  static constexpr int unroll = 2;
  const T* rows;

  __device__ __forceinline__ void step16(int k, uint32_t (&a)[4]) const {
    ldmatrix_x4(a, rows + (lane_id() % 16) * tile_stride<D> + 16 * k + 8 * (lane_id() / 16));
  }
  __device__ __forceinline__ void step8(uint32_t (&a)[2]) const { ldmatrix_x2(a, rows + (lane_id() % 16) * tile_stride<D> + D - 8); }
};

// acc += a b^T, b a tile of N rows: 16 x N dot products of length D. a: Rows16 or SharedRows16.
template <typename T, int D, int N, typename Rows>
__device__ __forceinline__ void multiply_transposed(float (&acc)[N / 8][4], const Rows& rows, const T* b) {
  const int lane = lane_id();
  const T* at = b + (lane % 8 + 8 * (lane / 16)) * tile_stride<D> + 8 * (lane / 8 % 2);
#pragma unroll (Rows::unroll)
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4];
    rows.step16(k, a);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t r[4];
      ldmatrix_x4(r, at + 16 * n * tile_stride<D> + 16 * k);
      mma_16816<T>(acc[2 * n], a, {r[0], r[1]});
      mma_16816<T>(acc[2 * n + 1], a, {r[2], r[3]});
    }
  }
  if constexpr (D % 16 != 0) {
    uint32_t a[2];
    rows.step8(a);
#pragma unroll
    for (int n = 0; n < N / 32; ++n) {
      uint32_t r[4];
      ldmatrix_x4(r, b + (32 * n + lane) * tile_stride<D> + D - 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_1688<T>(acc[4 * n + i], a, r[i]);
    }
  }
}

// An accumulator of 16 x K, rounded to T, as the left operand of the next product.
template <int K>
struct Weights16 {
  uint32_t k16[K / 16][4];
};

template <typename T, int K>
__device__ __forceinline__ Weights16<K> round_to(const float (&acc)[K / 8][4]) {
  Weights16<K> a;
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&tile)[4] = acc[2 * k + i / 2];
      a.k16[k][i] = pack2<T>(tile[2 * (i % 2)], tile[2 * (i % 2) + 1]);
    }
  }
  return a;
}

// acc += a b, b a tile of K rows: the rows of b summed with the weights a.
template <typename T, int D, int K>
__device__ __forceinline__ void multiply(float (&acc)[D / 8][4], const Weights16<K>& a, const T* b) {
  const int lane = lane_id();
  const T* at = b + (lane % 16) * tile_stride<D> + 8 * (lane / 16);
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, at + 16 * k * tile_stride<D> + 16 * d);
      mma_16816<T>(acc[2 * d], a.k16[k], {r[0], r[1]});
      mma_16816<T>(acc[2 * d + 1], a.k16[k], {r[2], r[3]});
    }
    if constexpr (D % 16 != 0) {
      uint32_t r[2];
      ldmatrix_x2_trans(r, b + (16 * k + lane % 16) * tile_stride<D> + D - 8);
      mma_16816<T>(acc[D / 8 - 1], a.k16[k], r);
    }
  }
}

// A warp's 16 x D accumulator, times `factor` of each row half, to its own 16 rows of a tile.
template <int D, typename T>
__device__ __forceinline__ void put_rows16(const float (&acc)[D / 8][4], const float (&factor)[2], T* rows) {
  const int lane = lane_id();
#pragma unroll
  for (int d = 0; d < D / 8; ++d) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = pack2<T>(acc[d][2 * half] * factor[half], acc[d][2 * half + 1] * factor[half]);
      *reinterpret_cast<uint32_t*>(rows + (lane / 4 + 8 * half) * tile_stride<D> + 8 * d + 2 * (lane % 4)) = pair;
    }
  }
}

// The same, and from there to rows of target below `limit`, in whole 16-byte units.
template <int D, typename T>
__device__ __forceinline__ void store_rows16(const float (&acc)[D / 8][4], const float (&factor)[2], T* rows, T* target, int64_t pitch,
                                             int limit) {
  const int lane = lane_id();
  put_rows16<D>(acc, factor, rows);
  __syncwarp();
  constexpr int chunks = D / 8;
  for (int i = lane; i < 16 * chunks; i += 32) {
    const int row = i / chunks, column = 8 * (i % chunks);
    if (row < limit) {
      *reinterpret_cast<uint4*>(target + row * pitch + column) = *reinterpret_cast<const uint4*>(rows + row * tile_stride<D> + column);
    }
  }
  __syncwarp();
}

}  // namespace proxt2i
