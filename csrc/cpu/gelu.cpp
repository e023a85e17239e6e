// GELU with the exact normal distribution function, and its gradient, on a CPU: y = x Phi(x), dy/dx = Phi(x) + x phi(x). Either function
// is 1/2 + h(x) with an odd h that is 1/2 at infinity, and h(x) = x A(x^2) / B(x^2) with polynomials A and B: no exponential, and B has
// positive coefficients alone, so that its terms do not cancel. The division costs little, as a CPU does it beside the rest. A and B were fitted
// in double to the least absolute error of h by Lawson's algorithm (least squares, made linear by the denominator of the round before; weights
// are multiplied by the errors until these are level): 7e-9 and 3e-8 for float, 1.1e-7 for bfloat16; rounding makes it 1.7e-7, 1.9e-7, 2.4e-7 and
// 2.8e-7. At its bound h rounds to just 1/2, so that beyond it y is 0 or x, and dy/dx 0 or 1.
#include <cmath>
#include <type_traits>

#include "../common/narrow.h"
#include "../common/tensors.h"
#include "chunks.h"

namespace proxt2i {
namespace {

template <int n>
PROXT2I_INLINE float polynomial(const float (&coefficients)[n], float x) {  // the highest power first
  float sum = coefficients[0];
#pragma GCC unroll 8
  for (int i = 1; i < n; ++i) sum = fma(sum, x, coefficients[i]);
  return sum;
}

// x A(x^2) / B(x^2), x held within the bound, which is compared as an integer: one operation (NaN too becomes the bound).
template <int n, int m>
PROXT2I_INLINE float odd(float x, float bound, const float (&A)[n], const float (&B)[m]) {
  const float size = float_from_bits(std::min(float_bits(std::abs(x)), float_bits(bound))), square = size * size;
  return std::copysign(size, x) * polynomial(A, square) / polynomial(B, square);
}

// Any NaN has come from a bfloat16 one or is the CPU's own, so that rounding, unlike narrow.h's, need not look for those which it would turn into others.
template <typename T, typename E>
PROXT2I_INLINE void store(T a, E& out) {
  if constexpr (std::is_same_v<E, bfloat16>) {
    const uint32_t bits = float_bits(a);
    out.bits = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  } else {
    narrow(a, out);
  }
}

// The functions for what is stored as E.
template <typename E>
struct Functions {
  // Phi(x); 1 of NaN, or 0
  static PROXT2I_INLINE float distribution(float x) {
    constexpr float A[] = {2.27493437e-8f, 6.35211836e-6f, 1.68826213e-4f, 4.67726402e-3f, 3.38527039e-2f, 3.98942232e-1f};
    constexpr float B[] = {1.19750337e-6f, 7.36476577e-5f, 1.88444788e-3f, 2.86459029e-2f, 2.51522064e-1f, 1.0f};
    return 0.5f + odd(x, 5.46f, A, B);
  }
  // Phi(x) + x phi(x); NaN of infinities, as torch has it
  static PROXT2I_INLINE float derivative(float x) {
    constexpr float A[] = {-1.53575763e-11f, 2.78502377e-9f, -1.00872597e-7f, 3.30082839e-5f,
                           -1.48158317e-4f,  1.45299947e-2f, -4.15169559e-2f, 7.97884762e-1f};
    constexpr float B[] = {5.55668521e-6f, 1.50208798e-4f, 2.95229396e-3f, 3.69719081e-2f, 2.81302005e-1f, 1.0f};
    return 0.5f + (x - x) + odd(x, 5.97f, A, B);
  }
};
template <>
struct Functions<bfloat16> {
  static PROXT2I_INLINE float distribution(float x) {
    constexpr float A[] = {-1.76134662e-8f, 6.02372802e-6f, 4.65621968e-4f, 6.43017795e-3f, 6.5330714e-2f, 3.98941606e-1f};
    constexpr float B[] = {1.56682509e-4f, 3.56670259e-3f, 4.62081991e-2f, 3.30415219e-1f, 1.0f};
    return 0.5f + odd(x, 5.16f, A, B);
  }
  static PROXT2I_INLINE float derivative(float x) {
    constexpr float A[] = {1.92929789e-7f, 3.5955989e-5f, 1.92200368e-5f, 1.42303091e-2f, -3.09958775e-2f, 7.97885358e-1f};
    constexpr float B[] = {8.95243647e-6f, 1.92036416e-4f, 3.52303474e-3f, 4.09802049e-2f, 2.94494003e-1f, 1.0f};
    return 0.5f + (x - x) + odd(x, 5.83f, A, B);
  }
};
template <>
struct Functions<double> {
  static PROXT2I_INLINE double distribution(double x) { return 0.5 * std::erfc(x * -0.70710678118654752); }
  static PROXT2I_INLINE double derivative(double x) { return fma(0.39894228040143268 * x, std::exp(-0.5 * x * x), distribution(x)); }
};

template <typename T, typename E>
struct Gelu {
  const E* x;
  E* y;
  int64_t per_image, num_images = 1;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t, int64_t offset, int64_t length) const {
    const E* from = x + offset;
    E* to = y + offset;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const T a = widen(from[i]);
      store(a * Functions<E>::distribution(a), to[i]);
    }
  }
};

template <typename T, typename E>
struct GeluBackward {
  const E *grad, *x;
  E* grad_x;
  int64_t per_image, num_images = 1;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t, int64_t offset, int64_t length) const {
    const E *from = x + offset, *grad_from = grad + offset;
    E* to = grad_x + offset;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const T a = widen(from[i]), g = widen(grad_from[i]);
      store(g * Functions<E>::derivative(a), to[i]);
    }
  }
};

Tensor gelu(const Tensor& x) {
  const Tensor y = empty_like_in(x, x.scalar_type());
  with_types(x, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    run_parallel(Gelu<T, E>{inputs.data<E>(x), output<E>(y), x.numel()});
  });
  return y;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x) {
  check_like(grad, x, x.scalar_type(), "grad");
  const Tensor grad_x = empty_like_in(x, x.scalar_type());
  with_types(x, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    run_parallel(GeluBackward<T, E>{inputs.data<E>(grad), inputs.data<E>(x), output<E>(grad_x), x.numel()});
  });
  return grad_x;
}

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY_IMPL(proxt2i, CPU, m) {
  m.impl("gelu", TORCH_BOX(&proxt2i::gelu));
  m.impl("gelu_backward", TORCH_BOX(&proxt2i::gelu_backward));
}
