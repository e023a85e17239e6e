// Attention on packed qkv for short sequences on a CPU, as csrc/cuda/attention_*.cu: all of a head's scores lie in the cache at once, and
// queries, keys and values are read where the projection left them (16-bit ones are widened once: all is computed in float). One head of one image is one piece of work; its sums are in an order
// that depends on the shape alone, so that results are the same bits on any number of threads and with any instruction set. Queries and keys are
// transposed first and scores stand as [keys, queries]: most sums then run across vectors, and few within one.
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../common/narrow.h"
#include "../common/tensors.h"
#include "chunks.h"
#include "transpose.h"

namespace proxt2i {
namespace {

constexpr int64_t lanes = 16;  // rows of the workspace are padded to it, and it divides the width of a head

constexpr int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// At least `size` elements that belong to this thread until its next call, where a line of the cache begins.
template <typename T>
T* workspace(int64_t size) {
  static thread_local std::vector<T> memory;
  constexpr int64_t line = 64;
  const size_t needed = static_cast<size_t>(size + line / static_cast<int64_t>(sizeof(T)));
  if (memory.size() < needed) memory.resize(needed);
  void* start = memory.data();
  size_t space = memory.size() * sizeof(T);
  return static_cast<T*>(std::align(line, static_cast<size_t>(size) * sizeof(T), start, space));
}

// exp(x) for x <= 0 (and a little above): 2^n times the polynomial of Cephes' expf.
PROXT2I_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = fma(x, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
  const float r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));
  float p = fma(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = fma(p, r, 8.3334519073e-3f);
  p = fma(p, r, 4.1665795894e-2f);
  p = fma(p, r, 1.6666665459e-1f);
  p = fma(p, r, 5.0000001201e-1f);
  return fma(p, r * r, r + 1.0f) * float_from_bits((float_bits(shifted) << 23) + 0x3f800000u);
}
PROXT2I_INLINE double exponential(double x) { return std::exp(x); }

// c [R, W] = a [R, depth] b [depth, W]; a's elements lie row_stride and depth_stride apart, rows of b and c b_stride and c_stride.
template <int R, int W, typename T>
PROXT2I_INLINE void product_tile(const T* a, int64_t row_stride, int64_t depth_stride, const T* b, int64_t b_stride, int64_t depth, T* c,
                                 int64_t c_stride) {
  T sums[R][W] = {};
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T factor = a[r * row_stride + k * depth_stride];
#pragma omp simd
      for (int w = 0; w < W; ++w) sums[r][w] = fma(factor, b[k * b_stride + w], sums[r][w]);
    }
  }
  for (int r = 0; r < R; ++r) {
#pragma omp simd
    for (int w = 0; w < W; ++w) c[r * c_stride + w] = sums[r][w];
  }
}

template <int R, typename T>
PROXT2I_INLINE void product_rows(const T* a, int64_t row_stride, int64_t depth_stride, const T* b, int64_t b_stride, int64_t columns,
                                 int64_t depth, T* c, int64_t c_stride) {
  int64_t w = 0;
  for (; w + 2 * lanes <= columns; w += 2 * lanes) {
    product_tile<R, 2 * lanes>(a, row_stride, depth_stride, b + w, b_stride, depth, c + w, c_stride);
  }
  if (w < columns) product_tile<R, lanes>(a, row_stride, depth_stride, b + w, b_stride, depth, c + w, c_stride);
}

// c [rows, columns] = a [rows, depth] b [depth, columns], columns a multiple of `lanes`.
template <typename T>
PROXT2I_INLINE void product(const T* a, int64_t row_stride, int64_t depth_stride, const T* b, int64_t b_stride, int64_t rows,
                            int64_t columns, int64_t depth, T* c, int64_t c_stride) {
  constexpr int many = std::is_same_v<T, float> ? 6 : 3;
  int64_t r = 0;
  for (; r + many <= rows; r += many) {
    product_rows<many>(a + r * row_stride, row_stride, depth_stride, b, b_stride, columns, depth, c + r * c_stride, c_stride);
  }
  for (; r < rows; ++r) product_rows<1>(a + r * row_stride, row_stride, depth_stride, b, b_stride, columns, depth, c + r * c_stride, c_stride);
}

// The sum of term(0) ... term(count - 1), count a multiple of `lanes`.
template <typename T, typename Term>
PROXT2I_INLINE T sum_of(int64_t count, const Term& term) {
  T sums[lanes] = {};
  for (int64_t i = 0; i < count; i += lanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += term(i + lane);
  }
  return sum_by_halving<lanes>(sums);
}

// T: of the computation; E: of what is stored.
template <typename T, typename E>
struct AttentionArgs {
  const E* qkv;                         // [B, N, 3, H, D]
  const int64_t* key_lengths;           // [B] or null
  const T *q_weight, *k_weight;         // [D] or null
  int64_t batch, tokens, heads, dim, queries;
  T scale, norm_eps;
  E* out;                               // [B, M, H, D]
  T* lse;                               // [B, H, M]
  const E* grad_out;                    // backward alone, from here on
  E* grad_qkv;
  T *grad_q_weight, *grad_k_weight;     // [B H, D]
};

// The numbers of a head, a row for each token, rows `stride` apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// What forward and backward share. A "chunk" is a head of an image (see chunks.h).
template <typename T, typename E>
struct Head : AttentionArgs<T, E> {
  static constexpr bool stored_alike = std::is_same_v<T, E>;
  int64_t num_images, per_image = 1;

  explicit Head(const AttentionArgs<T, E>& args) : AttentionArgs<T, E>(args), num_images(args.batch * args.heads) {}

  int64_t width() const { return padded(this->tokens); }
  int64_t token_stride() const { return 3 * this->heads * this->dim; }
  int64_t out_stride() const { return this->heads * this->dim; }
  // Token 0 of query, key or value (part 0, 1, 2) of this head.
  int64_t at(int64_t head, int64_t part) const {
    return ((head / this->heads * this->tokens * 3 + part) * this->heads + head % this->heads) * this->dim;
  }
  int64_t out_at(int64_t head) const { return (head / this->heads * this->queries * this->heads + head % this->heads) * this->dim; }
  int64_t keys(int64_t head) const {
    if (this->key_lengths == nullptr) return this->tokens;
    return std::clamp<int64_t>(this->key_lengths[head / this->heads], 0, this->tokens);
  }

  // `count` rows for reading: x itself, or widened, to `copy`.
  PROXT2I_INLINE Rows<const T> widened(const E* x, int64_t stride, int64_t count, T* copy) const {
    if constexpr (stored_alike) {
      return {x, stride};
    } else {
      for (int64_t j = 0; j < count; ++j) {
#pragma omp simd
        for (int64_t d = 0; d < this->dim; ++d) copy[j * this->dim + d] = widen(x[j * stride + d]);
      }
      return {copy, this->dim};
    }
  }

  // rows of a product = a [count, depth] b [depth, dim], to x; `copy` [count, dim] takes them on the way where they have to be narrowed.
  PROXT2I_INLINE void product_to(const T* a, int64_t row_stride, int64_t depth_stride, Rows<const T> b, int64_t count, int64_t depth, E* x, int64_t stride,
                                 T* copy) const {
    if constexpr (stored_alike) {
      product(a, row_stride, depth_stride, b.data, b.stride, count, this->dim, depth, x, stride);
    } else {
      product(a, row_stride, depth_stride, b.data, b.stride, count, this->dim, depth, copy, this->dim);
      for (int64_t j = 0; j < count; ++j) {
#pragma omp simd
        for (int64_t d = 0; d < this->dim; ++d) narrow(copy[j * this->dim + d], x[j * stride + d]);
      }
    }
  }

  // columns [dim, width] = inverse * weight * x, x [count, dim] transposed, where inverse [width] = factor / rms(x) (without weights: factor).
  template <Isa isa>
  PROXT2I_INLINE void columns(Rows<const T> x, int64_t count, const T* weight, T factor, T* columns, int64_t width, T* inverse) const {
    transpose<isa>(x.data, x.stride, count, this->dim, columns, width);
    for (int64_t j = 0; j < width; j += lanes) {
      T sums[lanes] = {};
      for (int64_t d = 0; d < this->dim && weight != nullptr; ++d) {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) sums[l] += columns[d * width + j + l] * columns[d * width + j + l];
      }
#pragma omp simd
      for (int64_t l = 0; l < lanes; ++l) {
        inverse[j + l] = weight == nullptr ? factor : factor / std::sqrt(sums[l] / static_cast<T>(this->dim) + this->norm_eps);
      }
    }
    for (int64_t d = 0; d < this->dim; ++d) {
      const T w = weight == nullptr ? T{1} : weight[d];
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) columns[d * width + j] *= w * inverse[j];
    }
  }
};

template <typename T, typename E>
struct Forward : Head<T, E> {
  using Head<T, E>::Head;

  // Scores stand as [keys, queries], so that every sum over keys or over a head's numbers runs across vectors and not within one.
  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t head, int64_t, int64_t) const {
    const int64_t M = this->queries, N = this->tokens, D = this->dim, rows = padded(M), width = this->width(), keys = this->keys(head);
    const int64_t stride = this->token_stride();
    T* q = workspace<T>((rows + 2 * width) * D + (N + 2) * rows + width);
    T *k = q + rows * D, *copy = k + width * D, *scores = copy + width * D, *sums = scores + N * rows, *largest = sums + rows, *norms = largest + rows;
    this->template columns<isa>(this->widened(this->qkv + this->at(head, 0) + (N - M) * stride, stride, M, copy), M, this->q_weight, this->scale, q, rows, sums);
    this->template columns<isa>(this->widened(this->qkv + this->at(head, 1), stride, N, copy), N, this->k_weight, T{1}, k, width, norms);
    product(k, 1, width, q, rows, keys, rows, D, scores, rows);
    softmax(scores, keys, rows, largest, sums);
    for (int64_t i = 0; i < M; ++i) this->lse[head * M + i] = largest[i] + std::log(sums[i]);
    const Rows<const T> v = this->widened(this->qkv + this->at(head, 2), stride, keys, copy);
    this->product_to(scores, 1, rows, v, M, keys, this->out + this->out_at(head), this->out_stride(), q);
  }

  // In place, down the columns.
  PROXT2I_INLINE void softmax(T* scores, int64_t keys, int64_t rows, T* largest, T* sums) const {
    for (int64_t i = 0; i < rows; i += lanes) {
      T top[lanes], sum[lanes];
      for (int64_t l = 0; l < lanes; ++l) top[l] = -std::numeric_limits<T>::infinity(), sum[l] = 0;
      for (int64_t j = 0; j < keys; ++j) {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) top[l] = scores[j * rows + i + l] > top[l] ? scores[j * rows + i + l] : top[l];
      }
      for (int64_t j = 0; j < keys; ++j) {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) {
          const T p = exponential(scores[j * rows + i + l] - top[l]);
          scores[j * rows + i + l] = p;
          sum[l] += p;
        }
      }
      T inverse[lanes];
#pragma omp simd
      for (int64_t l = 0; l < lanes; ++l) inverse[l] = 1 / sum[l];
      for (int64_t j = 0; j < keys; ++j) {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) scores[j * rows + i + l] *= inverse[l];
      }
#pragma omp simd
      for (int64_t l = 0; l < lanes; ++l) largest[i + l] = top[l], sums[i + l] = sum[l];
    }
  }
};

template <typename T, typename E>
struct Backward : Head<T, E> {
  using Head<T, E>::Head;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t head, int64_t, int64_t) const {
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
    grad_softmax(this->lse + head * M, M, keys, rows, p, grad_scores);
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

  // p: from scores to probabilities; grad_scores: from the gradient of those to that of the scores. Both in place, [keys, rows].
  PROXT2I_INLINE void grad_softmax(const T* lse, int64_t M, int64_t keys, int64_t rows, T* p, T* grad_scores) const {
    for (int64_t i = 0; i < rows; i += lanes) {
      T log_sums[lanes], deltas[lanes] = {};
      for (int64_t l = 0; l < lanes; ++l) log_sums[l] = i + l < M ? lse[i + l] : T{0};
      for (int64_t j = 0; j < keys; ++j) {
        T *p_row = p + j * rows + i, *grad_row = grad_scores + j * rows + i;
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) {
          p_row[l] = exponential(p_row[l] - log_sums[l]);
          deltas[l] += p_row[l] * grad_row[l];
        }
      }
      for (int64_t j = 0; j < keys; ++j) {
        T *p_row = p + j * rows + i, *grad_row = grad_scores + j * rows + i;
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) grad_row[l] = p_row[l] * (grad_row[l] - deltas[l]);
      }
    }
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
