// Attention on packed qkv for short sequences on a CPU, as csrc/cuda/attention_*.cu: all of a head's scores lie in the cache at once, and
// queries, keys and values are read where the projection left them (16-bit ones are widened once: all is computed in float). One head of one image
// is one piece of work; its sums are in an order that depends on the shape alone, so that results are the same bits on any number of threads and
// with any instruction set, but for bfloat16 with avx512_bf16, which has passes of its own (attention_bf16.h). Queries and keys are transposed
// first and scores stand as [keys, queries]: most sums then run across vectors, and few within one.
#include "../common/tensors.h"
#include "attention_bf16.h"

namespace proxt2i {
namespace {

template <typename T, typename E>
struct Forward : Head<T, E> {
  using Head<T, E>::Head;

  // Scores stand as [keys, queries], so that every sum over keys or over a head's numbers runs across vectors and not within one.
  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t head, int64_t, int64_t) const {
    if constexpr (isa == Isa::avx512_bf16) return forward_by_pairs(*this, head);
    const int64_t M = this->queries, N = this->tokens, D = this->dim, rows = padded(M), width = this->width(), keys = this->keys(head);
    const int64_t stride = this->token_stride();
    T* q = workspace<T>((rows + width + (this->stored_alike ? 0 : N)) * D + (N + 2) * rows + width);
    T *k = q + rows * D, *scores = k + width * D, *sums = scores + N * rows, *largest = sums + rows, *norms = largest + rows, *copy = norms + width;
    this->template columns<isa>(this->widened(this->qkv + this->at(head, 0) + (N - M) * stride, stride, M, copy), M, this->q_weight, this->scale, q, rows, sums);
    this->template columns<isa>(this->widened(this->qkv + this->at(head, 1), stride, N, copy), N, this->k_weight, T{1}, k, width, norms);
    product(k, 1, width, q, rows, keys, rows, D, scores, rows);
    this->softmax(scores, keys, rows, largest, sums);
    for (int64_t i = 0; i < M; ++i) this->lse[head * M + i] = largest[i] + std::log(sums[i]);
    const Rows<const T> v = this->widened(this->qkv + this->at(head, 2), stride, keys, copy);
    this->product_to(scores, 1, rows, v, M, keys, this->out + this->out_at(head), this->out_stride(), q);
  }
};

template <typename T, typename E>
struct Backward : Head<T, E> {
  using Head<T, E>::Head;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t head, int64_t, int64_t) const {
    if constexpr (isa == Isa::avx512_bf16) return backward_by_pairs(*this, head);
    const int64_t M = this->queries, N = this->tokens, D = this->dim, rows = padded(M), width = this->width(), keys = this->keys(head);
    const int64_t stride = this->token_stride(), out_stride = this->out_stride();
    T* q = workspace<T>((2 * rows + width + 2 * M + 2 * N) * D + (2 * N + 1) * rows + width + (this->stored_alike ? 0 : (2 * M + 2 * N) * D));
    T *k = q + rows * D, *g = k + width * D, *q_rows = g + rows * D, *k_rows = q_rows + M * D, *grad_q = k_rows + N * D, *grad_k = grad_q + M * D;
    T *p = grad_k + N * D, *grad_scores = p + N * rows, *q_inverse = grad_scores + N * rows, *k_inverse = q_inverse + rows;
    T *x_copies = k_inverse + width, *grad_out_copy = x_copies + (M + N) * D, *v_copy = grad_out_copy + M * D;
    const Rows<const T> grad_out = this->widened(this->grad_out + this->out_at(head), out_stride, M, grad_out_copy);
    const Rows<const T> x_q = this->widened(this->qkv + this->at(head, 0) + (N - M) * stride, stride, M, x_copies);
    const Rows<const T> x_k = this->widened(this->qkv + this->at(head, 1), stride, N, x_copies + M * D);
    const Rows<const T> v = this->widened(this->qkv + this->at(head, 2), stride, keys, v_copy);
    this->template columns<isa>(x_q, M, this->q_weight, this->scale, q, rows, q_inverse);
    this->template columns<isa>(x_k, N, this->k_weight, T{1}, k, width, k_inverse);
    transpose<isa>(grad_out.data, grad_out.stride, M, D, g, rows);
    product(k, 1, width, q, rows, keys, rows, D, p, rows);
    product(v.data, v.stride, 1, g, rows, keys, rows, D, grad_scores, rows);
    this->grad_softmax(this->lse + head * M, M, keys, rows, p, grad_scores);
    std::fill(p + keys * rows, p + N * rows, T{0});
    std::fill(grad_scores + keys * rows, grad_scores + N * rows, T{0});
    normalized(x_q, M, this->q_weight, q_inverse, q_rows);
    normalized(x_k, N, this->k_weight, k_inverse, k_rows);
    this->product_to(p, rows, 1, grad_out, N, M, this->grad_qkv + this->at(head, 2), stride, grad_k);
    product(grad_scores, 1, rows, k_rows, D, M, D, keys, grad_q, D);
    product(grad_scores, rows, 1, q_rows, D, N, D, M, grad_k, D);
    for (int64_t i = 0; i < N - M; ++i) {  // tokens that do not ask
      E* grad = this->grad_qkv + this->at(head, 0) + i * stride;
      for (int64_t d = 0; d < D; ++d) narrow(T{0}, grad[d]);
    }
    unnormalized(head, 0, N - M, M, x_q, this->q_weight, this->scale, q_inverse, grad_q, this->grad_q_weight);
    unnormalized(head, 1, 0, N, x_k, this->k_weight, T{1}, k_inverse, grad_k, this->grad_k_weight);
  }

  // rows [count, dim] = inverse * weight * x, one token after the other.
  PROXT2I_INLINE void normalized(Rows<const T> of, int64_t count, const T* weight, const T* inverse, T* rows) const {
    const T* x = of.data;
    for (int64_t i = 0; i < count; ++i, x += of.stride, rows += this->dim) {
      if (weight == nullptr) {
#pragma omp simd
        for (int64_t d = 0; d < this->dim; ++d) rows[d] = inverse[i] * x[d];
      } else {
#pragma omp simd
        for (int64_t d = 0; d < this->dim; ++d) rows[d] = inverse[i] * x[d] * weight[d];
      }
    }
  }

  // The gradient of Head::columns: from that of its columns, one a row of `grads`, to those of qkv and of the weight.
  PROXT2I_INLINE void unnormalized(int64_t head, int64_t part, int64_t first, int64_t count, Rows<const T> of, const T* weight, T factor,
                                   const T* inverse, const T* grads, T* grad_weights) const {
    const int64_t D = this->dim, start = this->at(head, part) + first * this->token_stride();
    T* of_weight = grad_weights + head * D;
    for (int64_t d = 0; weight != nullptr && d < D; ++d) of_weight[d] = 0;
    for (int64_t i = 0; i < count; ++i, grads += D) {
      const T* x = of.data + i * of.stride;
      E* grad = this->grad_qkv + start + i * this->token_stride();
      const T f = inverse[i];
      if (weight == nullptr) {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) narrow(f * grads[d], grad[d]);
        continue;
      }
      const T dot = sum_of<T>(D, [&](int64_t d) { return grads[d] * weight[d] * x[d]; });
      const T pull = f * f / (factor * factor) * f * dot / static_cast<T>(D);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        narrow(f * grads[d] * weight[d] - pull * x[d], grad[d]);
        of_weight[d] += f * grads[d] * x[d];
      }
    }
  }
};

using Optional = const std::optional<Tensor>&;

void check_attention(const Tensor& qkv, Optional key_lengths, Optional q_weight, Optional k_weight, int64_t num_queries) {
  const auto state = state_type(qkv);
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && qkv.size(4) > 0 && qkv.size(4) % lanes == 0,
                  "proxt2i: qkv must have shape [B, N, 3, H, D], D a multiple of 16");
  STD_TORCH_CHECK(0 <= num_queries && num_queries <= qkv.size(1), "proxt2i: num_queries must lie in 0 ... N");
  if (key_lengths.has_value()) check_per_image(*key_lengths, qkv, ScalarType::Long, "key_lengths");
  STD_TORCH_CHECK(q_weight.has_value() == k_weight.has_value(), "proxt2i: q_weight and k_weight must both be given, or neither");
  for (const auto* weight : {&q_weight, &k_weight}) {
    STD_TORCH_CHECK(!weight->has_value() || ((*weight)->dim() == 1 && (*weight)->size(0) == qkv.size(4) && (*weight)->scalar_type() == state),
                    "proxt2i: q_weight and k_weight must have shape [D], and be float32, or float64 if qkv is");
  }
}

template <typename T, typename E>
AttentionArgs<T, E> attention_args(Inputs& inputs, const Tensor& qkv, Optional key_lengths, Optional q_weight, Optional k_weight, const Tensor& out,
                                const Tensor& lse, double scale, double norm_eps) {
  AttentionArgs<T, E> args{};
  args.qkv = inputs.data<E>(qkv);
  args.key_lengths = inputs.data<int64_t>(key_lengths);
  args.q_weight = inputs.data<T>(q_weight);
  args.k_weight = inputs.data<T>(k_weight);
  args.batch = qkv.size(0);
  args.tokens = qkv.size(1);
  args.heads = qkv.size(3);
  args.dim = qkv.size(4);
  args.queries = out.size(1);
  args.scale = static_cast<T>(scale);
  args.norm_eps = static_cast<T>(norm_eps);
  args.out = output<E>(out);
  args.lse = output<T>(lse);
  return args;
}

std::tuple<Tensor, Tensor> attention_forward_cpu(const Tensor& qkv, Optional key_lengths, Optional q_weight, Optional k_weight,
                                                 int64_t num_queries, double scale, double norm_eps) {
  check_attention(qkv, key_lengths, q_weight, k_weight, num_queries);
  const int64_t out_shape[] = {qkv.size(0), num_queries, qkv.size(3), qkv.size(4)};
  const int64_t lse_shape[] = {qkv.size(0), qkv.size(3), num_queries};
  const Tensor out = torch::stable::new_empty(qkv, {out_shape, 4}), lse = torch::stable::new_empty(qkv, {lse_shape, 3}, state_type(qkv));
  if (out.numel() == 0) return {out, lse};
  with_types(qkv, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    run_parallel(Forward<T, E>{attention_args<T, E>(inputs, qkv, key_lengths, q_weight, k_weight, out, lse, scale, norm_eps)});
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                                          Optional key_lengths, Optional q_weight, Optional k_weight, double scale,
                                                          double norm_eps) {
  check_attention(qkv, key_lengths, q_weight, k_weight, out.size(1));
  check_like(grad_out, out, qkv.scalar_type(), "grad_out");
  STD_TORCH_CHECK(out.scalar_type() == qkv.scalar_type() && lse.scalar_type() == state_type(qkv) && out.is_contiguous() && lse.is_contiguous(),
                  "proxt2i: out and lse must be as attention_forward made them");
  const int64_t weight_shape[] = {q_weight.has_value() ? qkv.size(0) * qkv.size(3) : 0, qkv.size(4)};
  Tensor grad_qkv = torch::stable::new_empty(qkv, qkv.sizes());
  Tensor grad_q_weight = torch::stable::new_empty(lse, {weight_shape, 2}), grad_k_weight = torch::stable::new_empty(lse, {weight_shape, 2});
  if (out.numel() == 0) {
    for (Tensor* grad : {&grad_qkv, &grad_q_weight, &grad_k_weight}) torch::stable::zero_(*grad);
    return {grad_qkv, grad_q_weight, grad_k_weight};
  }
  with_types(qkv, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    auto args = attention_args<T, E>(inputs, qkv, key_lengths, q_weight, k_weight, out, lse, scale, norm_eps);
    args.grad_out = inputs.data<E>(grad_out);
    args.grad_qkv = output<E>(grad_qkv);
    args.grad_q_weight = output<T>(grad_q_weight);
    args.grad_k_weight = output<T>(grad_k_weight);
    run_parallel(Backward<T, E>{args});
  });
  return {grad_qkv, grad_q_weight, grad_k_weight};
}

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY_IMPL(proxt2i, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&proxt2i::attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&proxt2i::attention_backward_cpu));
}
