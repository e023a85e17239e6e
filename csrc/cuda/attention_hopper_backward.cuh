// Attention's backward for sm_90a: the sums of attention_backward.cuh, with the products of whole warp groups. One kernel makes dQ, a warp
// group for 64 queries, and the queries' terms for the other, which makes dK and dV, a warp group for 64 keys. Nothing is added up across
// blocks.
#pragma once

#include <cmath>

#include "attention.cuh"
#include "units.cuh"

namespace proxt2i {

// A block keeps two tiles of 64 rows a warp group (dQ: q and grad_out; dK and dV: k and v), and two streams of tiles pass by: the first
// (k; q) is what is summed last.
template <int D, int groups, int tile, bool overlapped>
struct BackwardTiles {
  static constexpr int rows = 64 * groups, threads = 128 * groups;
  static constexpr int kept = depth_units<D> * unit_size<rows>, passing = depth_units<D> * unit_size<tile>;
  static constexpr int places = overlapped ? 3 : 2;  // of the first stream; the second has two
  static constexpr int dq_bytes = 2 * (2 * kept + (places + 2) * passing), dkv_bytes = dq_bytes + 4 * 2 * 2 * tile;

  template <typename T>
  static __device__ __forceinline__ void clear_paddings(T* tiles) {
    for (int i = 0; i < 2; ++i) clear_padding<D, rows, threads>(tiles + i * kept);
    for (int i = 0; i < places + 2; ++i) clear_padding<D, tile, threads>(tiles + 2 * kept + i * passing);
  }
};

// lse and delta of a lane's two queries, lane / 4 and lane / 4 + 8 of its warp's from first_row on, to registers and to args.terms.
template <typename T, int D>
__device__ __forceinline__ void make_terms(const AttentionArgs<T>& args, const AttentionHead<T, D>& head, int first_row, float (&lse)[2],
                                           float (&delta)[2]) {
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + 8 * half;
    lse[half] = delta[half] = 0;
    if (row < args.queries) {
      lse[half] = args.lse[head.lse_offset + row] * log2_e;
      const int64_t at = head.out_offset + row * head.out_pitch;
#pragma unroll
      for (int unit = lane % 4; unit < D / 8; unit += 4) {
        float out[8], grad[8];
        load8(out, args.out + at + 8 * unit);
        load8(grad, args.grad_out + at + 8 * unit);
#pragma unroll
        for (int i = 0; i < 8; ++i) delta[half] = fma(out[i], grad[i], delta[half]);
      }
    }
    delta[half] = sum_over<4>(delta[half]);
    if (lane % 4 == 0 && row < padded_queries(args.queries)) {
      args.terms[head.lse_terms + row] = lse[half];
      args.terms[head.delta_terms + row] = delta[half];
    }
  }
}

// weigh(tile, behind) all tiles and finish(tile) them; where overlapped, a tile is still to be finished when the next one is begun.
template <bool overlapped, typename Weigh, typename Finish>
__device__ __forceinline__ void for_tiles(int tiles, const Weigh& weigh, const Finish& finish) {
  if constexpr (overlapped) {
    if (tiles == 0) return;
    weigh(0, std::false_type());
    for (int tile = 1; tile < tiles; ++tile) weigh(tile, std::true_type());
    finish(tiles - 1);
  } else {
    for (int tile = 0; tile < tiles; ++tile) {
      weigh(tile, std::false_type());
      finish(tile);
    }
  }
}

// overlapped: a tile's last product is begun after the next tile's first one, and runs beside its exponentials.
template <typename T, int D, int groups, int tile_keys, int blocks, bool overlapped>
__global__ void __launch_bounds__(128 * groups, blocks) attention_hopper_dq_kernel(const AttentionArgs<T> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PROXT2I_EMULATE)
  using Tiles = BackwardTiles<D, groups, tile_keys, overlapped>;
  const AttentionHead<T, D> head(args);
  T* const q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const grad_tile = q_tile + Tiles::kept;
  T* const k_tiles = grad_tile + Tiles::kept;
  T* const v_tiles = k_tiles + Tiles::places * Tiles::passing;
  const int warp = static_cast<int>(threadIdx.x / 32), first_query = static_cast<int>(blockIdx.x) * Tiles::rows;
  const int first_row = first_query + warp * 16;

  const int num_tiles = (head.keys + tile_keys - 1) / tile_keys;
  const auto load = [&](int tile) {
    if (tile < num_tiles) {
      const int first = tile * tile_keys;
      load_units<D, tile_keys, Tiles::threads>(k_tiles + tile % Tiles::places * Tiles::passing, head.k, head.pitch, first, head.keys);
      load_units<D, tile_keys, Tiles::threads>(v_tiles + tile % 2 * Tiles::passing, head.v, head.pitch, first, head.keys);
    }
    cp_async_commit();
  };
  load_units<D, Tiles::rows, Tiles::threads>(q_tile, head.q, head.pitch, first_query, args.queries);
  load_units<D, Tiles::rows, Tiles::threads>(grad_tile, args.grad_out + head.out_offset, head.out_pitch, first_query, args.queries);
  load(0);
  Tiles::clear_paddings(q_tile);
  float lse[2], delta[2];
  make_terms(args, head, first_row, lse, delta);

  const int group = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);  // the same in all lanes, as the compiler then knows
  const uint64_t q = matrix_at(q_tile + group * 64 * 8, k_major<Tiles::rows>), grad = matrix_after(q, 2 * Tiles::kept);
  const uint64_t k = matrix_at(k_tiles, k_major<tile_keys>), v = matrix_at(v_tiles, k_major<tile_keys>);
  const uint64_t k_summed = matrix_at(k_tiles, mn_major<tile_keys>);
  float s[tile_keys / 8][4] = {}, dp[tile_keys / 8][4] = {}, dq[D / 8][4] = {};
  Weights16<tile_keys> ds{};
  const float scale = args.scale * log2_e;
  const auto add = [&](int tile) {
    begin_sums<T, D, tile_keys>(dq, ds, matrix_after(k_summed, tile % Tiles::places * 2 * Tiles::passing));
  };
  const auto weigh = [&](int tile, auto behind) {  // behind: the tile before is still to be added
    wait_for_tiles();
    products_begin();
    begin_dots<T, D, Tiles::rows, tile_keys>(s, q, matrix_after(k, tile % Tiles::places * 2 * Tiles::passing));
    if constexpr (behind) add(tile - 1);
    begin_dots<T, D, Tiles::rows, tile_keys>(dp, grad, matrix_after(v, tile % 2 * 2 * Tiles::passing));
    load(tile + 1);
    products_wait<behind ? 2 : 1>(s);
    mask_keys(s, head.keys - tile * tile_keys);
#pragma unroll
    for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = exp2_fast(fma(s[n][i], scale, -lse[i / 2]));
    }
    products_wait<0>(dp, ds.k16);
#pragma unroll
    for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= dp[n][i] - delta[i / 2];
    }
    ds = round_to<T, tile_keys>(s);
  };
  const auto finish = [&](int tile) {
    products_begin();
    add(tile);
    products_wait<0>(dq, ds.k16);
  };
  for_tiles<overlapped>(num_tiles, weigh, finish);
  cp_async_wait<0>();  // with no keys at all, q is still on its way
  __syncthreads();     // nobody reads q any more: dq takes its place on the way to memory

  const float factor[2] = {args.scale, args.scale};
  store_units16<D, Tiles::rows>(dq, factor, q_tile + warp * 16 * 8, args.grad_qkv + head.q_offset + first_row * head.pitch, head.pitch,
                                args.queries - first_row);
#endif
}

struct alignas(8) FloatPair {
  float of[2];
};

template <typename T, int D, int groups, int tile_queries, int blocks, bool overlapped>
__global__ void __launch_bounds__(128 * groups, blocks) attention_hopper_dkv_kernel(const AttentionArgs<T> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PROXT2I_EMULATE)
  using Tiles = BackwardTiles<D, groups, tile_queries, overlapped>;
  const AttentionHead<T, D> head(args);
  T* const k_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const v_tile = k_tile + Tiles::kept;
  T* const q_tiles = v_tile + Tiles::kept;
  T* const grad_tiles = q_tiles + Tiles::places * Tiles::passing;
  float* const terms = reinterpret_cast<float*>(grad_tiles + 2 * Tiles::passing);  // twice lse and delta of a tile's queries
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x / 32), first_key = static_cast<int>(blockIdx.x) * Tiles::rows;
  const int first_row = first_key + warp * 16;

  const int num_tiles = first_key < head.keys ? (args.queries + tile_queries - 1) / tile_queries : 0;  // keys nobody attends to: zeros
  const auto load = [&](int tile) {
    if (tile < num_tiles) {
      const int first = tile * tile_queries;
      load_units<D, tile_queries, Tiles::threads>(q_tiles + tile % Tiles::places * Tiles::passing, head.q, head.pitch, first, args.queries);
      load_units<D, tile_queries, Tiles::threads>(grad_tiles + tile % 2 * Tiles::passing, args.grad_out + head.out_offset, head.out_pitch,
                                                  first, args.queries);
      constexpr int units = tile_queries / 4;
      const int thread = static_cast<int>(threadIdx.x), query = first + 4 * (thread % units);
      if (thread < 2 * units) {
        const float* const from = args.terms + (thread < units ? head.lse_terms : head.delta_terms) + query;
        cp_async_16(terms + tile % 2 * 2 * tile_queries + 4 * thread, from, query < args.queries);
      }
    }
    cp_async_commit();
  };
  load_units<D, Tiles::rows, Tiles::threads>(k_tile, head.k, head.pitch, first_key, head.keys);
  load_units<D, Tiles::rows, Tiles::threads>(v_tile, head.v, head.pitch, first_key, head.keys);
  load(0);
  Tiles::clear_paddings(k_tile);

  const int group = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);  // the same in all lanes, as the compiler then knows
  const uint64_t k = matrix_at(k_tile + group * 64 * 8, k_major<Tiles::rows>), v = matrix_after(k, 2 * Tiles::kept);
  const uint64_t q = matrix_at(q_tiles, k_major<tile_queries>), grad = matrix_at(grad_tiles, k_major<tile_queries>);
  const uint64_t q_summed = matrix_at(q_tiles, mn_major<tile_queries>), grad_summed = matrix_at(grad_tiles, mn_major<tile_queries>);
  float p[tile_queries / 8][4] = {}, dp[tile_queries / 8][4] = {};  // transposed: a row is a key, a column a query
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  Weights16<tile_queries> ds{};
  const float scale = args.scale * log2_e;
  const auto add = [&](int tile) {
    begin_sums<T, D, tile_queries>(dk, ds, matrix_after(q_summed, tile % Tiles::places * 2 * Tiles::passing));
  };
  const auto weigh = [&](int tile, auto behind) {
    const int grad_at = tile % 2 * 2 * Tiles::passing;
    const float* const lse = terms + tile % 2 * 2 * tile_queries + 2 * (lane % 4);
    const float* const delta = lse + tile_queries;
    wait_for_tiles();
    products_begin();
    begin_dots<T, D, Tiles::rows, tile_queries>(p, k, matrix_after(q, tile % Tiles::places * 2 * Tiles::passing));
    if constexpr (behind) add(tile - 1);
    begin_dots<T, D, Tiles::rows, tile_queries>(dp, v, matrix_after(grad, grad_at));
    load(tile + 1);
    products_wait<behind ? 2 : 1>(p);
#pragma unroll
    for (int n = 0; n < tile_queries / 8; ++n) {
      const auto pair = *reinterpret_cast<const FloatPair*>(lse + 8 * n);  // past the last query 0, as are the rows of q and grad_out
#pragma unroll
      for (int i = 0; i < 4; ++i) p[n][i] = exp2_fast(fma(p[n][i], scale, -pair.of[i % 2]));
    }
    auto weights = round_to<T, tile_queries>(p);
    products_begin();
    begin_sums<T, D, tile_queries>(dv, weights, matrix_after(grad_summed, grad_at));
    products_wait<1>(dp, ds.k16);
#pragma unroll
    for (int n = 0; n < tile_queries / 8; ++n) {
      const auto pair = *reinterpret_cast<const FloatPair*>(delta + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) p[n][i] *= dp[n][i] - pair.of[i % 2];
    }
    products_wait<0>(dv, weights.k16);
    ds = round_to<T, tile_queries>(p);
  };
  const auto finish = [&](int tile) {
    products_begin();
    add(tile);
    products_wait<0>(dk, ds.k16);
  };
  for_tiles<overlapped>(num_tiles, weigh, finish);
  cp_async_wait<0>();
  __syncthreads();  // nobody reads k and v any more: dk and dv take their places on the way to memory

#pragma unroll
  for (int d = 0; d < D / 8; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first_row + lane / 4 + 8 * (i / 2) >= head.keys) dk[d][i] = dv[d][i] = 0;  // their weights were not masked
    }
  }
  const float factor[2] = {args.scale, args.scale}, one[2] = {1, 1};
  const int64_t at = first_row * head.pitch;
  const int left = args.tokens - first_row;
  store_units16<D, Tiles::rows>(dk, factor, k_tile + warp * 16 * 8, args.grad_qkv + head.k_offset + at, head.pitch, left);
  store_units16<D, Tiles::rows>(dv, one, v_tile + warp * 16 * 8, args.grad_qkv + head.v_offset + at, head.pitch, left);
#endif
}

template <typename T, int D, int groups, int tile_keys, int blocks, bool overlapped>
void launch_hopper_dq(const AttentionArgs<T>& args, cudaStream_t stream) {
  using Tiles = BackwardTiles<D, groups, tile_keys, overlapped>;
  const dim3 grid((args.queries + Tiles::rows - 1) / Tiles::rows, args.heads, args.batch);
  launch(attention_hopper_dq_kernel<T, D, groups, tile_keys, blocks, overlapped>, grid, Tiles::threads, Tiles::dq_bytes, stream, args);
}

template <typename T, int D, int groups, int tile_queries, int blocks, bool overlapped>
void launch_hopper_dkv(const AttentionArgs<T>& args, cudaStream_t stream) {
  using Tiles = BackwardTiles<D, groups, tile_queries, overlapped>;
  const dim3 grid((args.tokens + Tiles::rows - 1) / Tiles::rows, args.heads, args.batch);
  launch(attention_hopper_dkv_kernel<T, D, groups, tile_queries, blocks, overlapped>, grid, Tiles::threads, Tiles::dkv_bytes, stream, args);
}

template <typename T, int D>
void launch_hopper_backward(const AttentionArgs<T>& args, cudaStream_t stream) {
  if constexpr (D > 96) {
    launch_hopper_dq<T, D, 2, 80, 1, true>(args, stream);
    launch_hopper_dkv<T, D, 1, 64, 2, false>(args, stream);
  } else {
    launch_hopper_dq<T, D, 2, 64, 2, false>(args, stream);
    launch_hopper_dkv<T, D, 1, 80, 2, true>(args, stream);
  }
}

}  // namespace proxt2i
