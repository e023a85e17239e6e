// Attention's passes on bfloat16 with products of pairs (bf16_pairs.h). Normalised queries and keys, probabilities and the scores' gradients are
// rounded to bfloat16 for the products, as on GPUs; sums, softmax, QK-norm and its gradient are in float.
#pragma once

#include "attention_head.h"
#include "bf16_pairs.h"

namespace proxt2i {
namespace {

#if defined(__x86_64__)
using Bf16Head = Head<float, bfloat16>;

PROXT2I_INLINE const pairs::AnyWord* words_of(const bfloat16* x) { return reinterpret_cast<const pairs::AnyWord*>(x); }

constexpr int64_t half(int64_t n) { return (n + 1) / 2; }

// Normalised queries and keys [D / 2, rows or width] of words, by depth, for the scores.
struct Columns {
  pairs::Word *q, *k;
  float *q_inverse, *k_inverse;
};

PROXT2I_INLINE void load_columns(const Bf16Head& a, const bfloat16* q, const bfloat16* k, int64_t rows, const Columns& to) {
  pairs::transpose_pairs(q, a.token_stride(), a.queries, a.dim, to.q, rows);
  pairs::transpose_pairs(k, a.token_stride(), a.tokens, a.dim, to.k, a.width());
  pairs::normalize_columns(to.q, a.dim, rows, a.q_weight, a.scale, a.norm_eps, to.q_inverse);
  pairs::normalize_columns(to.k, a.dim, a.width(), a.k_weight, 1.0f, a.norm_eps, to.k_inverse);
}

PROXT2I_INLINE void forward_by_pairs(const Bf16Head& a, int64_t head) {
  const int64_t M = a.queries, N = a.tokens, D = a.dim, rows = padded(M), width = a.width(), keys = a.keys(head), stride = a.token_stride();
  float* scores = workspace<float>((N + 2) * rows + width);
  float *largest = scores + N * rows, *sums = largest + rows;
  pairs::Word* p = workspace<pairs::Word>(half(N) * (rows + D) + (rows + width) * D / 2);
  pairs::Word *v = p + half(N) * rows, *q = v + half(N) * D;
  const Columns columns{q, q + rows * D / 2, sums, sums + rows};
  load_columns(a, a.qkv + a.at(head, 0) + (N - M) * stride, a.qkv + a.at(head, 1), rows, columns);
  pairs::product(columns.k, 1, width, columns.q, rows, keys, rows, D / 2, scores, rows);
  a.softmax(scores, keys, rows, largest, sums);
  for (int64_t i = 0; i < M; ++i) a.lse[head * M + i] = largest[i] + std::log(sums[i]);
  pairs::pair_rows(scores, rows, keys, rows, p);
  pairs::pair_rows(a.qkv + a.at(head, 2), stride, keys, D, v);
  pairs::product(p, 1, rows, v, D, M, D, half(keys), a.out + a.out_at(head), a.out_stride());
}

PROXT2I_INLINE void backward_by_pairs(const Bf16Head& a, int64_t head) {
  const int64_t M = a.queries, N = a.tokens, D = a.dim, rows = padded(M), width = a.width(), keys = a.keys(head), stride = a.token_stride();
  const bfloat16 *x_q = a.qkv + a.at(head, 0) + (N - M) * stride, *x_k = a.qkv + a.at(head, 1), *x_v = a.qkv + a.at(head, 2);
  const bfloat16* grad_out = a.grad_out + a.out_at(head);
  float* p = workspace<float>(2 * N * rows + (M + N) * D + rows + 2 * width);
  float *grad_scores = p + N * rows, *grad_q = grad_scores + N * rows, *grad_k = grad_q + M * D, *q_inverse = grad_k + N * D;
  float *k_inverse = q_inverse + rows, *pulls = k_inverse + width;
  pairs::Word* q = workspace<pairs::Word>((2 * rows + width) * D / 2 + (N + half(N)) * rows + (2 * half(M) + half(N)) * D);
  pairs::Word *k = q + rows * D / 2, *g = k + width * D / 2, *p_rows = g + rows * D / 2, *grad_rows = p_rows + N * rows / 2;
  pairs::Word *grad_pairs = grad_rows + N * rows / 2, *q_pairs = grad_pairs + half(N) * rows, *k_pairs = q_pairs + half(M) * D;
  pairs::Word* g_pairs = k_pairs + half(N) * D;
  load_columns(a, x_q, x_k, rows, {q, k, q_inverse, k_inverse});
  pairs::transpose_pairs(grad_out, a.out_stride(), M, D, g, rows);
  pairs::product(k, 1, width, q, rows, keys, rows, D / 2, p, rows);
  pairs::product(words_of(x_v), stride / 2, 1, g, rows, keys, rows, D / 2, grad_scores, rows);
  a.grad_softmax(a.lse + head * M, M, keys, rows, p, grad_scores);
  pairs::round_rows(p, keys, N, M, rows, reinterpret_cast<bfloat16*>(p_rows));
  pairs::round_rows(grad_scores, keys, N, M, rows, reinterpret_cast<bfloat16*>(grad_rows));
  pairs::pair_rows(grad_scores, rows, keys, rows, grad_pairs);
  pairs::pair_rows(grad_out, a.out_stride(), M, D, g_pairs);
  pairs::pair_normalized_rows(x_q, stride, M, D, a.q_weight, q_inverse, q_pairs);
  pairs::pair_normalized_rows(x_k, stride, keys, D, a.k_weight, k_inverse, k_pairs);
  bfloat16 *to_q = a.grad_qkv + a.at(head, 0), *to_k = a.grad_qkv + a.at(head, 1);
  pairs::product(p_rows, rows / 2, 1, g_pairs, D, N, D, half(M), a.grad_qkv + a.at(head, 2), stride);
  pairs::product(grad_pairs, 1, rows, k_pairs, D, M, D, half(keys), grad_q, D);
  pairs::product(grad_rows, rows / 2, 1, q_pairs, D, N, D, half(M), grad_k, D);
  for (int64_t i = 0; i < N - M; ++i, to_q += stride) std::fill_n(to_q, D, bfloat16{0});  // tokens that do not ask
  const float per_dim = 1 / static_cast<float>(D);
  pairs::unnormalize_rows(x_q, stride, M, D, a.q_weight, per_dim / (a.scale * a.scale), q_inverse, grad_q, pulls, to_q, a.grad_q_weight + head * D);
  pairs::unnormalize_rows(x_k, stride, N, D, a.k_weight, per_dim, k_inverse, grad_k, pulls, to_k, a.grad_k_weight + head * D);
}
#endif

}  // namespace
}  // namespace proxt2i
