// Attention's forward for sm_90a: as attention_forward.cu, with the products of whole warp groups. A block takes 64 queries a warp group.
#pragma once

#include <cmath>

#include "attention.cuh"
#include "units.cuh"

namespace proxt2i {

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
  load_units<D, Tiles::rows, Tiles::threads>(q_tile, head.q, head.pitch, first_query, args.queries);
  load_k(0);
  if (!overlapped) load_v(0);
  cp_async_commit();
  clear_padding<D, Tiles::rows, Tiles::threads>(q_tile);
  clear_padding<D, tile_keys, Tiles::threads>(k_tiles);
  clear_padding<D, tile_keys, Tiles::threads>(k_tiles + Tiles::k);

  const int group = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);  // the same in all lanes, as the compiler then knows
  const uint64_t q_matrix = matrix_at(q_tile + group * 64 * 8, k_major<Tiles::rows>), k_matrix = matrix_at(k_tiles, k_major<tile_keys>);
  const uint64_t v_matrix = matrix_at(v_tiles, mn_major<tile_keys>);
  float s[tile_keys / 8][4], out[D / 8][4] = {}, factor[2];
#pragma unroll
  for (int n = 0; n < tile_keys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
  HopperRows state;
  const float scale = args.scale * log2_e;
  const auto begin_scores = [&](int tile) {
    begin_dots<T, D, Tiles::rows, tile_keys>(s, q_matrix, matrix_after(k_matrix, tile % 2 * 2 * Tiles::k));
  };
  const auto begin_out = [&](const Weights16<tile_keys>& weights, int tile) {
    begin_sums<T, D, tile_keys>(out, weights, matrix_after(v_matrix, tile % 2 * 2 * Tiles::v));
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
      wait_for_tiles();
      load_k(1);
      load_v(0);
      cp_async_commit();
      products_begin();
      begin_scores(0);
      products_wait<0>(s);
      soften(0);
      auto weights = round_to<T, tile_keys>(s);
      for (int tile = 0; tile + 1 < num_tiles; ++tile) {
        wait_for_tiles();
        products_begin();
        begin_scores(tile + 1);
        begin_out(weights, tile);
        load_k(tile + 2);
        load_v(tile + 1);
        cp_async_commit();
        products_wait<1>(s);
        const bool grown = soften(tile + 1);
        products_wait<0>(out);
        if (grown) shrink();
        weights = round_to<T, tile_keys>(s);
      }
      wait_for_tiles();
      products_begin();
      begin_out(weights, num_tiles - 1);
      products_wait<0>(out);
    }
  } else {
    for (int tile = 0; tile < num_tiles; ++tile) {
      wait_for_tiles();
      products_begin();
      begin_scores(tile);
      load_k(tile + 1);
      load_v(tile + 1);
      cp_async_commit();
      products_wait<0>(s);
      if (soften(tile)) shrink();
      const auto weights = round_to<T, tile_keys>(s);
      products_begin();
      begin_out(weights, tile);
      products_wait<0>(out);
    }
  }
  cp_async_wait<0>();  // with no keys at all, q is still on its way
  __syncthreads();     // nobody reads q any more: out takes its place on the way to memory

  const int first_row = first_query + warp * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = sum_over<4>(state.sum[half]);
    factor[half] = total > 0 ? 1 / total : 0.0f;
    const int row = first_row + lane / 4 + 8 * half;
    if (lane % 4 == 0 && row < args.queries) {
      args.lse[head.lse_offset + row] = total > 0 ? state.maximum[half] / log2_e + logf(total) : -INFINITY;
    }
  }
  store_units16<D, Tiles::rows>(out, factor, q_tile + warp * 16 * 8, args.out + head.out_offset + first_row * head.out_pitch,
                                head.out_pitch, args.queries - first_row);
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
