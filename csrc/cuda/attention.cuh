// What attention's forward and backward kernels share: arguments, checks, and the choice of the template for dtype and head size.
//
// Packed input qkv [B, N, 3, H, D]; the last M of the N tokens ask (M = N but in a network's last block), the first key_lengths[b] tokens
// are attended to:     out = softmax(scale q k^T) v,     lse = ln sum exp(scale q k^T).
// With weights, q and k are first normalised (QK-norm): x -> weight x / sqrt(mean(x^2) + norm_eps), rounded to the dtype again.
#pragma once

#include <optional>
#include <tuple>

#include "../common/tensors.h"
#include "tiles.cuh"

namespace proxt2i {

constexpr int attention_warps = 4, attention_threads = 32 * attention_warps;
constexpr int block_rows = 16 * attention_warps;  // of the output of one thread block
constexpr float log2_e = 1.4426950408889634f;

// Queries in whole 16-byte units of floats.
__host__ __device__ constexpr int padded_queries(int queries) { return (queries + 3) / 4 * 4; }

template <typename T>
struct AttentionArgs {
  const T* qkv;
  const int64_t* key_lengths;  // or null
  const float *q_weight, *k_weight;  // [D], both or neither
  T* out;                      // [B, M, H, D]
  float* lse;                  // [B, H, M]
  const T* grad_out;           // backward only, as are the following
  float* terms;                // [B, H, 2, padded_queries(M)]: of each query log2(e) lse, and delta, the sum of grad_out * out
  T* grad_qkv;
  float *grad_q_weight, *grad_k_weight;  // [blocks, warps, D]: the sum over a warp's 16 rows
  int batch, tokens, heads, queries;
  float scale, norm_eps;
};

// One (image, head) of the arrays. Rows of qkv are `pitch` elements apart.
template <typename T, int D>
struct AttentionHead {
  const T *q, *k, *v;
  int64_t pitch, out_pitch, out_offset, lse_offset, lse_terms, delta_terms, q_offset, k_offset, v_offset;
  int keys;

  __device__ explicit AttentionHead(const AttentionArgs<T>& args) {
    const int64_t image = blockIdx.z, head = blockIdx.y;
    const int64_t width = static_cast<int64_t>(args.heads) * D;
    pitch = 3 * width;
    out_pitch = width;
    k_offset = image * args.tokens * pitch + width + head * D;
    v_offset = k_offset + width;
    q_offset = k_offset - width + (args.tokens - args.queries) * pitch;
    out_offset = image * args.queries * width + head * D;
    lse_offset = (image * args.heads + head) * args.queries;
    lse_terms = (image * args.heads + head) * 2 * padded_queries(args.queries);
    delta_terms = lse_terms + padded_queries(args.queries);
    q = args.qkv + q_offset;
    k = args.qkv + k_offset;
    v = args.qkv + v_offset;
    keys = args.tokens;
    if (args.key_lengths != nullptr) {
      const int64_t length = args.key_lengths[image];
      keys = length < 0 ? 0 : length < args.tokens ? static_cast<int>(length) : args.tokens;
    }
  }
};

// Starts copying tile number `tile` of two streams of rows below `limit`, to one of the two places that each has.
template <int D, int rows, typename T>
__device__ __forceinline__ void load_pair(int tile, T* first_tiles, const T* first, int64_t first_pitch, T* second_tiles, const T* second,
                                          int64_t second_pitch, int limit) {
  const int at = (tile % 2) * tile_size<D, rows>;
  load_tile<D, rows, attention_threads>(first_tiles + at, first, first_pitch, tile * rows, limit);
  load_tile<D, rows, attention_threads>(second_tiles + at, second, second_pitch, tile * rows, limit);
  cp_async_commit();
}

// The largest x of the four lanes that hold a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

// A tile's scores, 8 N keys: -infinity from the first `left` on.
template <int N>
__device__ __forceinline__ void mask_keys(float (&s)[N][4], int left) {
  const int lane = lane_id();
  if (left < 8 * N) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * n + 2 * (lane % 4) + i % 2 >= left) s[n][i] = -INFINITY;
      }
    }
  }
}

// Eight neighbouring elements, 16 bytes, as floats and back.
template <typename T>
__device__ __forceinline__ void load8(float (&x)[8], const T* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const T* const elements = reinterpret_cast<const T*>(&words);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = widen(elements[i]);
}
template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])};
}

// Sum over the `lanes` neighbouring lanes that share a row.
template <int lanes>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  return x;
}

// QK-norm of a tile's rows, in place, by all threads of the block; the caller puts a barrier before and after.
template <int D, int rows, typename T>
__device__ __forceinline__ void normalise_rows(T* tile, const float* weight, float eps) {
  constexpr int lanes = attention_threads / rows;
  T* const row = tile + static_cast<int>(threadIdx.x) / lanes * tile_stride<D>;
  float x[8], squares = 0;
  for (int column = 8 * (static_cast<int>(threadIdx.x) % lanes); column < D; column += 8 * lanes) {
    load8(x, row + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fma(x[i], x[i], squares);
  }
  const float factor = rsqrtf(sum_over<lanes>(squares) / D + eps);
  for (int column = 8 * (static_cast<int>(threadIdx.x) % lanes); column < D; column += 8 * lanes) {
    load8(x, row + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= factor * weight[column + i];
    store8(row + column, x);
  }
}

// QK-norm, if there is any, of a tile that has just arrived, and with the first one of the rows that the block keeps.
template <int D, int rows, typename T>
__device__ __forceinline__ void normalise_tiles(int tile, T* kept, const float* kept_weight, T* arrived, const float* weight, float eps) {
  if (weight == nullptr) return;
  if (tile == 0) normalise_rows<D, block_rows>(kept, kept_weight, eps);
  normalise_rows<D, rows>(arrived, weight, eps);
  __syncthreads();
}

// Backward of QK-norm for a warp's 16 rows. grads: tile rows with the gradients of the normalised x; source, target: rows of the raw x
// and of its gradient; with r = 1 / sqrt(mean(x^2) + eps) and h = weight * grad,
//     dx = r (h - x r^2 mean(h x)),     dweight = sum over the rows of grad x r.
template <int D, typename T>
__device__ __forceinline__ void denormalise_rows16(const T* grads, const T* source, T* target, int64_t pitch, int limit,
                                                   const float* weight, float eps, float* grad_weight) {
  const int row = lane_id() / 2, part = lane_id() % 2;
  const bool valid = row < limit;
  float x[8] = {}, g[8], squares = 0, product = 0;
#pragma unroll
  for (int column = 8 * part; column < D; column += 16) {
    if (valid) load8(x, source + row * pitch + column);
    load8(g, grads + row * tile_stride<D> + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      squares = fma(x[i], x[i], squares);
      product = fma(g[i] * weight[column + i], x[i], product);
    }
  }
  const float r = rsqrtf(sum_over<2>(squares) / D + eps), along = r * r * sum_over<2>(product) / D;
#pragma unroll
  for (int first = 0; first < D; first += 16) {
    const int column = first + 8 * part;
    const bool mine = column < D;  // the last unit of 72 is the even lanes' alone
    float sums[8] = {};
    if (valid && mine) {
      load8(x, source + row * pitch + column);
      load8(g, grads + row * tile_stride<D> + column);
      float dx[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[i] = g[i] * x[i] * r;
        dx[i] = r * fma(-x[i], along, g[i] * weight[column + i]);
      }
      store8(target + row * pitch + column, dx);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int offset = 16; offset > 1; offset /= 2) sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], offset);
      if (row == 0 && mine) grad_weight[column + i] = sums[i];
    }
  }
}

inline void check_attention(const Tensor& qkv, const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& q_weight,
                            const std::optional<Tensor>& k_weight, int64_t num_queries) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "proxt2i: qkv must have shape [B, N, 3, H, D]");
  STD_TORCH_CHECK(qkv.scalar_type() == ScalarType::BFloat16 || qkv.scalar_type() == ScalarType::Half,
                  "proxt2i: attention takes bfloat16 or float16");
  STD_TORCH_CHECK(qkv.size(4) == 64 || qkv.size(4) == 72 || qkv.size(4) == 128, "proxt2i: attention takes heads of 64, 72 or 128");
  STD_TORCH_CHECK(num_queries >= 0 && num_queries <= qkv.size(1), "proxt2i: num_queries must lie in 0 ... N");
  STD_TORCH_CHECK(qkv.size(0) <= max_grid_y && qkv.size(3) <= max_grid_y && qkv.size(1) < (1 << 30),
                  "proxt2i: attention takes at most 65535 images and heads");
  STD_TORCH_CHECK(qkv.is_contiguous() && reinterpret_cast<uintptr_t>(qkv.const_data_ptr()) % 16 == 0,
                  "proxt2i: qkv must be contiguous and 16-byte aligned");
  if (key_lengths.has_value()) {
    STD_TORCH_CHECK(key_lengths->scalar_type() == ScalarType::Long && key_lengths->dim() == 1 &&
                        key_lengths->size(0) == qkv.size(0) && key_lengths->is_contiguous() && key_lengths->device() == qkv.device(),
                    "proxt2i: key_lengths must be int64 [B] on qkv's device");
  }
  STD_TORCH_CHECK(q_weight.has_value() == k_weight.has_value(), "proxt2i: QK-norm needs both weights");
  for (const auto& weight : {q_weight, k_weight}) {
    STD_TORCH_CHECK(!weight.has_value() || (weight->scalar_type() == ScalarType::Float && weight->numel() == qkv.size(4) &&
                                            weight->is_contiguous() && weight->device() == qkv.device()),
                    "proxt2i: QK-norm's weights must be float32 [D] on qkv's device");
  }
}

// Calls run(T{}, integral_constant D).
template <typename Run>
void dispatch_attention(const Tensor& qkv, const Run& run) {
  const auto with_type = [&](auto type) {
    if (qkv.size(4) == 64) run(type, std::integral_constant<int, 64>());
    if (qkv.size(4) == 72) run(type, std::integral_constant<int, 72>());
    if (qkv.size(4) == 128) run(type, std::integral_constant<int, 128>());
  };
  if (qkv.scalar_type() == ScalarType::BFloat16) {
    with_type(bfloat16{});
  } else {
    with_type(float16{});
  }
}

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T>
AttentionArgs<T> attention_args(const Tensor& qkv, const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& q_weight,
                                const std::optional<Tensor>& k_weight, const Tensor& out, const Tensor& lse, double scale,
                                double norm_eps) {
  AttentionArgs<T> args{};
  args.qkv = static_cast<const T*>(qkv.const_data_ptr());
  args.key_lengths = pointer<int64_t>(key_lengths);
  args.q_weight = pointer<float>(q_weight);
  args.k_weight = pointer<float>(k_weight);
  args.out = static_cast<T*>(out.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.batch = static_cast<int>(qkv.size(0));
  args.tokens = static_cast<int>(qkv.size(1));
  args.heads = static_cast<int>(qkv.size(3));
  args.queries = static_cast<int>(out.size(1));
  args.scale = static_cast<float>(scale);
  args.norm_eps = static_cast<float>(norm_eps);
  return args;
}

}  // namespace proxt2i
