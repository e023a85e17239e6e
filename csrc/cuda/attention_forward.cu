// Attention, forward (after FlashAttention-2: Dao, 2023): a block takes 64 queries of one head, a warp 16 of them, and goes through the
// keys 64 at a time with a running maximum and sum. The next keys and values arrive while these are worked on.
#include <cmath>

#include "attention_hopper.cuh"

namespace proxt2i {
namespace {

constexpr int tile_keys = 64;

template <int D>
constexpr size_t shared_bytes = sizeof(uint16_t) * (tile_size<D, block_rows> + 4 * tile_size<D, tile_keys>);

template <typename T, int D>
__global__ void __launch_bounds__(attention_threads, D > 96 ? 2 : 3) attention_forward_kernel(const AttentionArgs<T> args) {
  const AttentionHead<T, D> head(args);
  T* const q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const k_tiles = q_tile + tile_size<D, block_rows>;
  T* const v_tiles = k_tiles + 2 * tile_size<D, tile_keys>;
  const int lane = lane_id(), first_query = static_cast<int>(blockIdx.x) * block_rows;
  T* const q_rows = q_tile + static_cast<int>(threadIdx.x / 32) * 16 * tile_stride<D>;  // this warp's

  const auto load_keys = [&](int tile) {
    load_pair<D, tile_keys>(tile, k_tiles, head.k, head.pitch, v_tiles, head.v, head.pitch, head.keys);
  };
  const int num_tiles = (head.keys + tile_keys - 1) / tile_keys;
  load_tile<D, block_rows, attention_threads>(q_tile, head.q, head.pitch, first_query, args.queries);
  load_keys(0);

  Rows16<D> q;
  float out[D / 8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // of rows lane / 4 and lane / 4 + 8; the sum of this lane's columns alone
  const float scale = args.scale * log2_e;
  for (int tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody works on the one before it any more
    if (tile + 1 < num_tiles) load_keys(tile + 1);
    T* const k = k_tiles + (tile % 2) * tile_size<D, tile_keys>;
    const T* const v = v_tiles + (tile % 2) * tile_size<D, tile_keys>;

    normalise_tiles<D, tile_keys>(tile, q_tile, args.q_weight, k, args.k_weight, args.norm_eps);
    if (tile == 0) q.load(q_rows);

    float s[tile_keys / 8][4] = {};
    multiply_transposed<T, D, tile_keys>(s, q, k);
    mask_keys(s, head.keys - tile * tile_keys);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      const float next = fmaxf(maximum[half], row_max(top) * scale);  // finite: a tile has at least one key
      const float shrink = exp2f(maximum[half] - next);
      maximum[half] = next;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < tile_keys / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2f(fma(s[n][i], scale, -next));
          sum[half] += s[n][i];
        }
      }
#pragma unroll
      for (int d = 0; d < D / 8; ++d) out[d][2 * half] *= shrink, out[d][2 * half + 1] *= shrink;
    }
    multiply<T, D, tile_keys>(out, round_to<T, tile_keys>(s), v);
  }
  cp_async_wait<0>();  // with no keys at all, q is still on its way
  __syncthreads();

  const int first_row = first_query + static_cast<int>(threadIdx.x / 32) * 16;
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = sum_over<4>(sum[half]);
    factor[half] = total > 0 ? 1 / total : 0.0f;
    const int row = first_row + lane / 4 + 8 * half;
    if (lane % 4 == 0 && row < args.queries) {
      args.lse[head.lse_offset + row] = total > 0 ? maximum[half] / log2_e + logf(total) : -INFINITY;
    }
  }
  store_rows16<D>(out, factor, q_rows, args.out + head.out_offset + first_row * head.out_pitch, head.out_pitch, args.queries - first_row);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& qkv, const std::optional<Tensor>& key_lengths,
                                             const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                                             int64_t num_queries, double scale, double norm_eps) {
  check_attention(qkv, key_lengths, q_weight, k_weight, num_queries);
  const OnDeviceOf device(qkv);
  const int64_t out_shape[] = {qkv.size(0), num_queries, qkv.size(3), qkv.size(4)};
  const int64_t lse_shape[] = {qkv.size(0), qkv.size(3), num_queries};
  const Tensor out = torch::stable::new_empty(qkv, {out_shape, 4});
  const Tensor lse = torch::stable::new_empty(qkv, {lse_shape, 3}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  dispatch_attention(qkv, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int D = decltype(dim)::value;
    const auto args = attention_args<T>(qkv, key_lengths, q_weight, k_weight, out, lse, scale, norm_eps);
    if (args.q_weight == nullptr && device.is_hopper()) return launch_hopper<T, D>(args, device.stream);
    const dim3 grid((args.queries + block_rows - 1) / block_rows, args.heads, args.batch);
    launch(attention_forward_kernel<T, D>, grid, attention_threads, shared_bytes<D>, device.stream, args);
  });
  return {out, lse};
}

}  // namespace
}  // namespace proxt2i

PROXT2I_CUDA_IMPL(m) { m.impl("attention_forward", TORCH_BOX(&proxt2i::attention_forward)); }
