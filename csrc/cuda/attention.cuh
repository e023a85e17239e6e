// What attention's forward and backward kernels share: arguments, checks, and the choice of the template for dtype and head size.
//
// Packed input qkv [B, N, 3, H, D]; the last M of the N tokens ask (M = N but in a network's last block), the first key_lengths[b] tokens
// are attended to:     out = softmax(scale q k^T) v,     lse = ln sum exp(scale q k^T).
#pragma once

#include <optional>
#include <tuple>

#include "../common/op.h"
#include "tiles.cuh"

namespace proxt2i {

constexpr int attention_warps = 4, attention_threads = 32 * attention_warps;
constexpr int block_rows = 16 * attention_warps;  // of the output of one thread block
constexpr float log2_e = 1.4426950408889634f;

template <typename T>
struct AttentionArgs {
  const T* qkv;
  const int64_t* key_lengths;  // or null
  T* out;                      // [B, M, H, D]
  float* lse;                  // [B, H, M]
  const T* grad_out;           // backward only, as are the following
  float* delta;                // [B, H, M]: sum of grad_out * out
  T* grad_qkv;
  int batch, tokens, heads, queries;
  float scale;
};

// One (image, head) of the arrays. Rows of qkv are `pitch` elements apart.
template <typename T, int D>
struct AttentionHead {
  const T *q, *k, *v;
  int64_t pitch, out_pitch, out_offset, lse_offset, q_offset, k_offset, v_offset;
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

// The larger of x over the four lanes that hold a row; and the sum.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

inline void check_attention(const Tensor& qkv, const std::optional<Tensor>& key_lengths, int64_t num_queries) {
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
AttentionArgs<T> attention_args(const Tensor& qkv, const std::optional<Tensor>& key_lengths, const Tensor& out, const Tensor& lse,
                                double scale) {
  AttentionArgs<T> args{};
  args.qkv = static_cast<const T*>(qkv.const_data_ptr());
  args.key_lengths = pointer<int64_t>(key_lengths);
  args.out = static_cast<T*>(out.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.batch = static_cast<int>(qkv.size(0));
  args.tokens = static_cast<int>(qkv.size(1));
  args.heads = static_cast<int>(qkv.size(3));
  args.queries = static_cast<int>(out.size(1));
  args.scale = static_cast<float>(scale);
  return args;
}

}  // namespace proxt2i
