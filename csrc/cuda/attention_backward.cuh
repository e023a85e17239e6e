// Attention, backward: with P = exp(scale q k^T - lse) recomputed tile by tile,
//     dV = P^T dO      dP = dO V^T      dS = P (dP - delta), delta = sum(dO * O)      dQ = scale dS K      dK = scale dS^T Q
// One kernel makes dQ, a block for 64 queries, another dK and dV, a block for 64 keys. P is computed twice (seven products instead of five),
// but nothing is added up across blocks: no atomics, so that the gradient is the same to the bit every time, and no fp32 copy of it.
#pragma once

#include <cmath>

#include "attention.cuh"

namespace proxt2i {

// ---- delta ----------------------------------------------------------------------------------------------------------------

constexpr int delta_lanes = 16;  // a row's D / 8 units of 16 bytes

template <typename T, int D>
__global__ void __launch_bounds__(attention_threads) attention_delta_kernel(const AttentionArgs<T> args) {
  const AttentionHead<T, D> head(args);
  const int row = static_cast<int>(blockIdx.x * (attention_threads / delta_lanes) + threadIdx.x / delta_lanes);
  const int unit = static_cast<int>(threadIdx.x % delta_lanes);
  float sum = 0;
  if (row < args.queries && unit < D / 8) {
    const int64_t at = head.out_offset + row * head.out_pitch + 8 * unit;
    float out[8], grad[8];
    load8(out, args.out + at);
    load8(grad, args.grad_out + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fma(out[i], grad[i], sum);
  }
  sum = sum_over<delta_lanes>(sum);
  if (unit == 0 && row < args.queries) {
    args.terms[head.lse_terms + row] = args.lse[head.lse_offset + row] * log2_e;
    args.terms[head.delta_terms + row] = sum;
  }
}

// ---- dQ -------------------------------------------------------------------------------------------------------------------

// Rows of the tiles that a block goes through: fewer where 16 x D accumulators take most of the registers.
template <int D>
constexpr int tile_rows = D > 96 ? 32 : 64;

// A warp's 16 rows of dQ or dK, scale not yet in acc, to grad_qkv at `offset`: of the raw rows there where q and k were normalised.
template <int D, typename T>
__device__ __forceinline__ void store_grad(const AttentionArgs<T>& args, const float (&acc)[D / 8][4], T* rows, int64_t offset,
                                           int64_t pitch, int limit, const float* weight, float* grad_weight) {
  const float factor[2] = {args.scale, args.scale};
  if (weight == nullptr) {
    store_rows16<D>(acc, factor, rows, args.grad_qkv + offset, pitch, limit);
  } else {
    put_rows16<D>(acc, factor, rows);
    __syncwarp();
    const int64_t block = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    denormalise_rows16<D>(rows, args.qkv + offset, args.grad_qkv + offset, pitch, limit, weight, args.norm_eps,
                          grad_weight + (block * attention_warps + threadIdx.x / 32) * D);
  }
}

template <int D>
constexpr size_t dq_shared_bytes = sizeof(uint16_t) * (2 * tile_size<D, block_rows> + 4 * tile_size<D, tile_rows<D>>);

template <typename T, int D>
__global__ void __launch_bounds__(attention_threads, 2) attention_dq_kernel(const AttentionArgs<T> args) {
  constexpr int tile_keys = tile_rows<D>;
  const AttentionHead<T, D> head(args);
  T* const q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const grad_tile = q_tile + tile_size<D, block_rows>;
  T* const k_tiles = grad_tile + tile_size<D, block_rows>;
  T* const v_tiles = k_tiles + 2 * tile_size<D, tile_keys>;
  const int lane = lane_id(), first_query = static_cast<int>(blockIdx.x) * block_rows;
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16, first_row = first_query + warp_row;
  T* const q_rows = q_tile + warp_row * tile_stride<D>;
  const T* const grad_rows = grad_tile + warp_row * tile_stride<D>;

  const auto load_keys = [&](int tile) {
    load_pair<D, tile_keys>(tile, k_tiles, head.k, head.pitch, v_tiles, head.v, head.pitch, head.keys);
  };
  const int num_tiles = (head.keys + tile_keys - 1) / tile_keys;
  load_tile<D, block_rows, attention_threads>(q_tile, head.q, head.pitch, first_query, args.queries);
  load_tile<D, block_rows, attention_threads>(grad_tile, args.grad_out + head.out_offset, head.out_pitch, first_query, args.queries);
  load_keys(0);

  float lse[2] = {INFINITY, INFINITY}, delta[2] = {};  // rows beyond the last query: P = 0
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + 8 * half;
    if (row < args.queries) {
      lse[half] = args.terms[head.lse_terms + row];
      delta[half] = args.terms[head.delta_terms + row];
    }
  }
  float dq[D / 8][4] = {};
  const float scale = args.scale * log2_e;
  for (int tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < num_tiles) load_keys(tile + 1);
    T* const k = k_tiles + (tile % 2) * tile_size<D, tile_keys>;
    const T* const v = v_tiles + (tile % 2) * tile_size<D, tile_keys>;
    normalise_tiles<D, tile_keys>(tile, q_tile, args.q_weight, k, args.k_weight, args.norm_eps);

    float s[tile_keys / 8][4] = {}, dp[tile_keys / 8][4] = {};
    multiply_transposed<T, D, tile_keys>(s, SharedRows16<D, T>{q_rows}, k);
    multiply_transposed<T, D, tile_keys>(dp, SharedRows16<D, T>{grad_rows}, v);
    const int left = head.keys - tile * tile_keys;
#pragma unroll
    for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool attended = 8 * n + 2 * (lane % 4) + i % 2 < left;
        s[n][i] = attended ? exp2f(fma(s[n][i], scale, -lse[i / 2])) * (dp[n][i] - delta[i / 2]) : 0.0f;
      }
    }
    multiply<T, D, tile_keys>(dq, round_to<T, tile_keys>(s), k);
  }
  cp_async_wait<0>();
  __syncthreads();

  store_grad<D>(args, dq, q_rows, head.q_offset + first_row * head.pitch, head.pitch, args.queries - first_row, args.q_weight,
                args.grad_q_weight);
}

// ---- dK and dV ------------------------------------------------------------------------------------------------------------

template <int D>
constexpr size_t dkv_shared_bytes = dq_shared_bytes<D> + sizeof(float) * 4 * tile_rows<D>;

template <typename T, int D>
__global__ void __launch_bounds__(attention_threads, 2) attention_dkv_kernel(const AttentionArgs<T> args) {
  constexpr int rows = tile_rows<D>;
  const AttentionHead<T, D> head(args);
  T* const k_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const v_tile = k_tile + tile_size<D, block_rows>;
  T* const q_tiles = v_tile + tile_size<D, block_rows>;
  T* const grad_tiles = q_tiles + 2 * tile_size<D, rows>;
  float* const lse_tiles = reinterpret_cast<float*>(grad_tiles + 2 * tile_size<D, rows>);
  float* const delta_tiles = lse_tiles + 2 * rows;
  const int lane = lane_id(), first_key = static_cast<int>(blockIdx.x) * block_rows;
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16, first_row = first_key + warp_row;
  T* const k_rows = k_tile + warp_row * tile_stride<D>;
  T* const v_rows = v_tile + warp_row * tile_stride<D>;

  const auto load_queries = [&](int tile) {
    load_pair<D, rows>(tile, q_tiles, head.q, head.pitch, grad_tiles, args.grad_out + head.out_offset, head.out_pitch, args.queries);
    const int i = static_cast<int>(threadIdx.x), row = tile * rows + i;
    if (i < rows) {
      const bool valid = row < args.queries;
      lse_tiles[(tile % 2) * rows + i] = valid ? args.terms[head.lse_terms + row] : INFINITY;
      delta_tiles[(tile % 2) * rows + i] = valid ? args.terms[head.delta_terms + row] : 0.0f;
    }
  };
  const int num_tiles = first_key < head.keys ? (args.queries + rows - 1) / rows : 0;  // keys that nobody attends to: zeros
  load_tile<D, block_rows, attention_threads>(k_tile, head.k, head.pitch, first_key, head.keys);
  load_tile<D, block_rows, attention_threads>(v_tile, head.v, head.pitch, first_key, head.keys);
  load_queries(0);

  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  const float scale = args.scale * log2_e;
  const bool attended[2] = {first_row + lane / 4 < head.keys, first_row + lane / 4 + 8 < head.keys};
  for (int tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < num_tiles) load_queries(tile + 1);
    T* const q = q_tiles + (tile % 2) * tile_size<D, rows>;
    const T* const grad = grad_tiles + (tile % 2) * tile_size<D, rows>;
    const float* const lse = lse_tiles + (tile % 2) * rows + 2 * (lane % 4);
    const float* const delta = delta_tiles + (tile % 2) * rows + 2 * (lane % 4);

    normalise_tiles<D, rows>(tile, k_tile, args.k_weight, q, args.q_weight, args.norm_eps);

    float p[rows / 8][4] = {};  // transposed: a row is a key, a column a query
    multiply_transposed<T, D, rows>(p, SharedRows16<D, T>{k_rows}, q);
#pragma unroll
    for (int n = 0; n < rows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[n][i] = attended[i / 2] ? exp2f(fma(p[n][i], scale, -lse[8 * n + i % 2])) : 0.0f;
    }
    multiply<T, D, rows>(dv, round_to<T, rows>(p), grad);
    float dp[rows / 8][4] = {};
    multiply_transposed<T, D, rows>(dp, SharedRows16<D, T>{v_rows}, grad);
#pragma unroll
    for (int n = 0; n < rows / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[n][i] *= dp[n][i] - delta[8 * n + i % 2];
    }
    multiply<T, D, rows>(dk, round_to<T, rows>(p), q);
  }
  cp_async_wait<0>();
  __syncthreads();

  const float one[2] = {1, 1};
  const int left = args.tokens - first_row;
  store_grad<D>(args, dk, k_rows, head.k_offset + first_row * head.pitch, head.pitch, left, args.k_weight, args.grad_k_weight);
  store_rows16<D>(dv, one, v_rows, args.grad_qkv + head.v_offset + first_row * head.pitch, head.pitch, left);
}

template <typename T, int D>
void launch_backward(const AttentionArgs<T>& args, cudaStream_t stream) {
  const auto grid = [&](int rows, int per_block) { return dim3((rows + per_block - 1) / per_block, args.heads, args.batch); };
  launch(attention_delta_kernel<T, D>, grid(args.queries, attention_threads / delta_lanes), attention_threads, 0, stream, args);
  launch(attention_dq_kernel<T, D>, grid(args.queries, block_rows), attention_threads, dq_shared_bytes<D>, stream, args);
  launch(attention_dkv_kernel<T, D>, grid(args.tokens, block_rows), attention_threads, dkv_shared_bytes<D>, stream, args);
}

}  // namespace proxt2i
