// What attention's passes on a CPU share: the products, the softmax and a head's place in packed qkv. Everything is in an order that depends on the
// shape alone.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../common/narrow.h"
#include "products.h"
#include "transpose.h"

namespace proxt2i {
namespace {

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
  static constexpr bool has_bf16_products = std::is_same_v<E, bfloat16>;  // see chunks.h
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
};

}  // namespace
}  // namespace proxt2i
