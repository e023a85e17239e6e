// Host and device arithmetic of the fused proximal step. Every rounding is spelled out (explicit fma, contraction off in the
// build), and nothing calls libm, so that compilers vectorise the loops and a CPU and a GPU perform the same IEEE operations.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PROXT2I_HD __host__ __device__ __forceinline__
#else
#define PROXT2I_HD inline __attribute__((always_inline))
#endif

namespace proxt2i {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

PROXT2I_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

PROXT2I_HD double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

PROXT2I_HD float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

PROXT2I_HD uint32_t mul_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

PROXT2I_HD uint32_t float_bits(float a) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(a);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

PROXT2I_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float a;
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
#endif
}

// Widening loads; all exact.
PROXT2I_HD float widen(float a) { return a; }
PROXT2I_HD double widen(double a) { return a; }
PROXT2I_HD float widen(bfloat16 a) { return float_from_bits(static_cast<uint32_t>(a.bits) << 16); }
PROXT2I_HD float widen(float16 a) {
  // IEEE binary16: normal numbers rebias by a multiplication with 2^-112, subnormal ones by subtracting 0.5 from 0.5 + value.
  const uint32_t word = static_cast<uint32_t>(a.bits) << 16;
  const uint32_t magnitude = word << 1;
  const float normal = float_from_bits((magnitude >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = float_from_bits((magnitude >> 17) | (126u << 23)) - 0.5f;
  const uint32_t bits = float_bits(magnitude < (1u << 27) ? subnormal : normal);
  return float_from_bits((word & 0x80000000u) | bits);
}

// -2 ln(u) for a normal positive float u, to about 1 ulp; exactly 0 at u = 1 and never negative below it. u = 2^e (1 + f) with
// 1 + f in [sqrt(1/2), sqrt(2)); ln(1 + f) = f + f^2 R(f), R of degree 8 interpolated at Chebyshev nodes.
PROXT2I_HD float minus_two_ln(float u) {
  const int32_t bits = static_cast<int32_t>(float_bits(u));
  const int32_t above = bits - 0x3F3504F3;  // of the bits of sqrt(1/2)
  const float f = float_from_bits(static_cast<uint32_t>(bits - (above & ~0x7FFFFF))) - 1.0f;
  const float e = static_cast<float>(above >> 23);
  float r = -2 * -0.07673641502f;
  r = fma(r, f, -2 * 0.1272267279f);
  r = fma(r, f, -2 * -0.1312755565f);
  r = fma(r, f, -2 * 0.1420485595f);
  r = fma(r, f, -2 * -0.1662664563f);
  r = fma(r, f, -2 * 0.2000123446f);
  r = fma(r, f, -2 * -0.2500078124f);
  r = fma(r, f, -2 * 0.3333333003f);
  r = fma(r, f, -2 * -0.4999999765f);
  const float tail = fma(e, -2 * -2.12194440e-4f, (f * f) * r);  // ln 2 = 0.693359375 - 2.12194440e-4
  return fma(e, -2 * 0.693359375f, tail - (f + f));
}

// sin and cos of (pi/2) t for |t| <= 1/2.
PROXT2I_HD float sin_half_pi(float t) {
  const float s = t * t;
  float r = -0.00460214921281f;
  r = fma(r, s, 0.0796802176478f);
  r = fma(r, s, -0.645963477665f);
  r = fma(r, s, -4.8556e-8f);  // with the next line: constant term 1.57079632195 in two parts
  return fma(t, 1.57079637f, t * r);
}

PROXT2I_HD float cos_half_pi(float t) {
  const float s = t * t;
  float r = 0.000906739898403f;
  r = fma(r, s, -0.0208615283422f);
  r = fma(r, s, 0.253669410357f);
  r = fma(r, s, -1.23370054937f);
  return fma(r, s, 1.0f);
}

// Box-Muller: two independent words -> two independent N(0,1). The radius comes from u = (w0 >> 1) 2^-31 + 2^-32 in (0, 1], so
// |z| <= sqrt(2 * 32 ln 2) = 6.66 and ln(0) cannot occur; the angle 2 pi w1 / 2^32 is reduced to a quadrant exactly, in integers.
PROXT2I_HD void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float u = float_from_bits(float_bits(static_cast<float>(static_cast<int32_t>(w0 >> 1)) + 0.5f) - (31u << 23));
  const float radius = square_root(minus_two_ln(u));
  const float t = static_cast<float>(static_cast<int32_t>(w1 << 2)) * 0x1p-32f;
  const float s = sin_half_pi(t);
  const float c = cos_half_pi(t);
  const uint32_t quadrant = w1 + 0x20000000u;  // its upper two bits
  const bool swap = (quadrant & 0x40000000u) != 0;
  const uint32_t first = float_bits(swap ? s : c), second = float_bits(s) ^ float_bits(c) ^ first;  // the other one
  const uint32_t cos_bits = first ^ ((quadrant + 0x40000000u) & 0x80000000u);
  const uint32_t sin_bits = second ^ (quadrant & 0x80000000u);
  z0 = radius * float_from_bits(cos_bits);
  z1 = radius * float_from_bits(sin_bits);
}

constexpr uint32_t philox_multiplier0 = 0xD2511F53u, philox_multiplier1 = 0xCD9E8D57u;
constexpr uint32_t philox_increment0 = 0x9E3779B9u, philox_increment1 = 0xBB67AE85u;

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): words = bijection(counter; key).
PROXT2I_HD void philox4x32_10(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = mul_high(philox_multiplier0, c0), low0 = philox_multiplier0 * c0;
    const uint32_t high1 = mul_high(philox_multiplier1, c2), low1 = philox_multiplier1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += philox_increment0;
    key1 += philox_increment1;
  }
  counter[0] = c0, counter[1] = c1, counter[2] = c2, counter[3] = c3;
}

// Four normals of elements 4 * block ... 4 * block + 3 of one image: key = its seed, counter = (block, step).
PROXT2I_HD void philox_normal4(uint64_t seed, uint64_t step, uint64_t block, float& z0, float& z1, float& z2, float& z3) {
  uint32_t words[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(step),
                       static_cast<uint32_t>(step >> 32)};
  philox4x32_10(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  box_muller(words[0], words[1], z0, z1);
  box_muller(words[2], words[3], z2, z3);
}

// The step: eps = eps_u + w (eps_c - eps_u);  x = y - sqrt(lambda) eps;  D = c_y y - c_eps eps;  y_next = a x + b z + m (D - D').
template <typename T>
PROXT2I_HD T guide(T eps_cond, T eps_uncond, T guidance_scale) {
  return fma(guidance_scale, eps_cond - eps_uncond, eps_uncond);
}
template <typename T>
PROXT2I_HD T prox(T y, T eps, T sqrt_lam) {
  return fma(-sqrt_lam, eps, y);
}
template <typename T>
PROXT2I_HD T clean_image(T y, T eps, T clean_y, T clean_eps) {
  return fma(-clean_eps, eps, clean_y * y);
}
template <typename T>
PROXT2I_HD T renoise(T x, T z, T a, T b) {
  return fma(b, z, a * x);
}
template <typename T>
PROXT2I_HD T remember(T y_next, T clean, T clean_before, T memory) {
  return fma(memory, clean - clean_before, y_next);
}

}  // namespace proxt2i
