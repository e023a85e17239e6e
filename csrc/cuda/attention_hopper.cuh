// Attention's forward for sm_90a: as attention_forward.cu, with the products of whole warp groups. A block takes 64 queries a warp group.
// Tiles lie in shared memory as wgmma reads them without swizzling: units of 8 columns one after another, each with all rows of the tile,
// 16 bytes a row. After each unit 16 bytes are left free, so that the units of a row lie in different banks. For q k^T the depth of 72 is
// filled up to 80 with zeros; p v costs 72.
#pragma once

#include <cmath>

#include "attention.cuh"
#include "hopper.cuh"

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
  if constexpr (D % 16 != 0) {
    for (int row = static_cast<int>(threadIdx.x); row < rows; row += threads) {
      *reinterpret_cast<uint4*>(tile + D / 8 * unit_size<rows> + 8 * row) = {0, 0, 0, 0};
    }
  }
}

template <int D, int groups, int keys>
struct HopperTiles {
  static constexpr int rows = 64 * groups, threads = 128 * groups;
  static constexpr int q = depth_units<D> * unit_size<rows>, k = depth_units<D> * unit_size<keys>, v = D / 8 * unit_size<keys>;
  static constexpr int bytes = 2 * (q + 2 * k + 2 * v);
};

// A row's maximum follows its scores only where it has grown by more than this, in powers of two: until then the weights are at most
// 256, and out and sum need no new factor.
constexpr float stale_maximum = 8;

// A lane's two rows, lane / 4 and lane / 4 + 8 of its warp's: the maximum of the scores in powers of two, and the sum of the lane's weights.
struct HopperRows {
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  // Scores of a tile, of which the first `left` keys exist, to weights. Where `factor` must be applied to what was summed before, true.
  template <int N>
  __device__ __forceinline__ bool soften(float (&s)[N][4], int left, float scale, float (&factor)[2]) {
    mask_keys(s, left);
    float next[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = s[0][2 * half];
#pragma unroll
      for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      next[half] = row_max(top) * scale;  // finite: a tile has at least one key
    }
    const bool grown = __any_sync(0xFFFFFFFFu, next[0] > maximum[0] + stale_maximum || next[1] > maximum[1] + stale_maximum) != 0;
    factor[0] = factor[1] = 1;
    if (grown) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        next[half] = fmaxf(maximum[half], next[half]);
        factor[half] = exp2_fast(maximum[half] - next[half]);
        maximum[half] = next[half];
        sum[half] *= factor[half];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sums[2] = {};  // two, so that an addition need not wait for the one before it
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          s[n][2 * half + i] = exp2_fast(fma(s[n][2 * half + i], scale, -maximum[half]));
          sums[i] += s[n][2 * half + i];
        }
      }
      sum[half] += sums[0] + sums[1];
    }
    return grown;
  }
};

// overlapped: the next tile's scores are multiplied before the weights of this one are used, so that the softmax of the one runs beside
// the product of the other (as in FlashAttention-3: Shah et al., 2024).
template <typename T, int D, int groups, int tile_keys, int blocks, bool overlapped>
__global__ void __launch_bounds__(128 * groups, blocks) attention_hopper_kernel(const AttentionArgs<T> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PROXT2I_EMULATE)
  using Tiles = HopperTiles<D, groups, tile_keys>;
  const AttentionHead<T, D> head(args);
  T* const q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const k_tiles = q_tile + Tiles::q;
  T* const v_tiles = k_tiles + 2 * Tiles::k;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x / 32), first_query = static_cast<int>(blockIdx.x) * Tiles::rows;

  const int num_tiles = (head.keys + tile_keys - 1) / tile_keys;
  const auto load_k = [&](int tile) {
    if (tile < num_tiles) {
      load_units<D, tile_keys, Tiles::threads>(k_tiles + tile % 2 * Tiles::k, head.k, head.pitch, tile * tile_keys, head.keys);
    }
  };
  const auto load_v = [&](int tile) {
    if (tile < num_tiles) {
      load_units<D, tile_keys, Tiles::threads>(v_tiles + tile % 2 * Tiles::v, head.v, head.pitch, tile * tile_keys, head.keys);
    }
  };
  const auto arrived = [] {
    cp_async_wait<0>();
    fence_shared_for_products();
    __syncthreads();  // all that was loaded is there, and nobody works on the tiles before it any more
  };
  load_units<D, Tiles::rows, Tiles::threads>(q_tile, head.q, head.pitch, first_query, args.queries);
  load_k(0);
  if (!overlapped) load_v(0);
  cp_async_commit();
  clear_padding<D, Tiles::rows, Tiles::threads>(q_tile);
  clear_padding<D, tile_keys, Tiles::threads>(k_tiles);
  clear_padding<D, tile_keys, Tiles::threads>(k_tiles + Tiles::k);

  const int group = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);  // the same in all lanes, as the compiler then knows
  constexpr uint64_t q_strides = matrix_strides(2 * unit_size<Tiles::rows>, 128), k_strides = matrix_strides(2 * unit_size<tile_keys>, 128);
  constexpr uint64_t v_strides = matrix_strides(128, 2 * unit_size<tile_keys>);
  const uint64_t q_matrix = matrix_at(q_tile + group * 64 * 8, q_strides), k_matrix = matrix_at(k_tiles, k_strides);
  const uint64_t v_matrix = matrix_at(v_tiles, v_strides);
  float s[tile_keys / 8][4], out[D / 8][4] = {}, factor[2];
#pragma unroll
  for (int n = 0; n < tile_keys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
  HopperRows state;
  const float scale = args.scale * log2_e;
  const auto begin_scores = [&](int tile) {
    const uint64_t k = matrix_after(k_matrix, tile % 2 * 2 * Tiles::k);
#pragma unroll
    for (int unit = 0; unit < depth_units<D>; unit += 2) {
      wgmma_shared<T, tile_keys>(s, matrix_after(q_matrix, unit * 2 * unit_size<Tiles::rows>),
                                 matrix_after(k, unit * 2 * unit_size<tile_keys>), unit > 0);
    }
    products_commit();
  };
  const auto begin_sums = [&](const Weights16<tile_keys>& weights, int tile) {
    const uint64_t v = matrix_after(v_matrix, tile % 2 * 2 * Tiles::v);
#pragma unroll
    for (int step = 0; step < tile_keys / 16; ++step) {
      wgmma_registers<T, D>(out, weights.k16[step], matrix_after(v, step * 256));
    }
    products_commit();
  };
  const auto soften = [&](int tile) { return state.soften(s, head.keys - tile * tile_keys, scale, factor); };
  const auto shrink = [&] {
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[d][i] *= factor[i / 2];
    }
  };

  if constexpr (overlapped) {
    if (num_tiles > 0) {
      arrived();
      load_k(1);
      load_v(0);
      cp_async_commit();
      products_begin();
      begin_scores(0);
      products_wait<0>(s);
      soften(0);
      auto weights = round_to<T, tile_keys>(s);
      for (int tile = 0; tile + 1 < num_tiles; ++tile) {
        arrived();
        products_begin();
        begin_scores(tile + 1);
        begin_sums(weights, tile);
        load_k(tile + 2);
        load_v(tile + 1);
        cp_async_commit();
        products_wait<1>(s);
        const bool grown = soften(tile + 1);
        products_wait<0>(out);
        if (grown) shrink();
        weights = round_to<T, tile_keys>(s);
      }
      arrived();
      products_begin();
      begin_sums(weights, num_tiles - 1);
      products_wait<0>(out);
    }
  } else {
    for (int tile = 0; tile < num_tiles; ++tile) {
      arrived();
      products_begin();
      begin_scores(tile);
      load_k(tile + 1);
      load_v(tile + 1);
      cp_async_commit();
      products_wait<0>(s);
      if (soften(tile)) shrink();
      const auto weights = round_to<T, tile_keys>(s);
      products_begin();
      begin_sums(weights, tile);
      products_wait<0>(out);
    }
  }
  cp_async_wait<0>();  // with no keys at all, q is still on its way
  __syncthreads();     // nobody reads q any more: out takes its place on the way to memory

  T* const rows = q_tile + warp * 16 * 8;
  const int first_row = first_query + warp * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = sum_over<4>(state.sum[half]);
    const float factor = total > 0 ? 1 / total : 0.0f;
    const int row = first_row + lane / 4 + 8 * half;
    if (lane % 4 == 0 && row < args.queries) {
      args.lse[head.lse_offset + row] = total > 0 ? state.maximum[half] / log2_e + logf(total) : -INFINITY;
    }
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      const uint32_t pair = pack2<T>(out[d][2 * half] * factor, out[d][2 * half + 1] * factor);
      *reinterpret_cast<uint32_t*>(rows + d * unit_size<Tiles::rows> + 8 * (lane / 4 + 8 * half) + 2 * (lane % 4)) = pair;
    }
  }
  __syncwarp();
  T* const target = args.out + head.out_offset + first_row * head.out_pitch;
  for (int i = lane; i < 16 * (D / 8); i += 32) {
    const int row = i / (D / 8), unit = i % (D / 8);
    if (first_row + row < args.queries) {
      *reinterpret_cast<uint4*>(target + row * head.out_pitch + 8 * unit) =
          *reinterpret_cast<const uint4*>(rows + unit * unit_size<Tiles::rows> + 8 * row);
    }
  }
#endif
}

template <typename T, int D>
void launch_hopper(const AttentionArgs<T>& args, cudaStream_t stream) {
  constexpr int groups = 2, keys = D > 96 ? 96 : 80, blocks = D > 96 ? 1 : 2;
  constexpr bool overlapped = true;
  using Tiles = HopperTiles<D, groups, keys>;
  const dim3 grid((args.queries + Tiles::rows - 1) / Tiles::rows, args.heads, args.batch);
  launch(attention_hopper_kernel<T, D, groups, keys, blocks, overlapped>, grid, Tiles::threads, Tiles::bytes, stream, args);
}

}  // namespace proxt2i
