// Muon's orthogonalisation on a CPU, as proxt2i/ops/orthogonalize.py has it. All that is made of a matrix X on the way to its result are polynomials of
// its Gram matrix. Those that are symmetric however they are rounded (R^2, and P R P) are computed up to the diagonal and mirrored. P Q is symmetric
// too, as P and Q commute, but only but for rounding: mirrored, errors of directions that X has not would reach those that it has. Matrices lie in
// panels of 32 columns, as which a symmetric or transposed one is a left factor too. One matrix is one piece of work: its result does not depend on the
// others, on the number of threads or on the instruction set.
#include <cmath>

#include "../common/tensors.h"
#include "products.h"
#include "transpose.h"

namespace proxt2i {
namespace {

constexpr int64_t tile_rows = 8;  // divides panel_width

template <typename T>
struct Orthogonalize {
  static constexpr int64_t chunks_per_thread = 1;
  const T* x;                      // [num_images, m, n]
  T* out;                          // the same
  int64_t m, n, rounds;
  T a, b, c, scale;                // of the polynomial a + b t + c t^2
  int64_t num_images, per_image = 1;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t image, int64_t, int64_t) const {
    const int64_t size = std::min(m, n), depth = std::max(m, n), square = size * size;
    const bool wide = m <= n;
    T* gram = workspace<T>(4 * square + size * depth);
    T *polynomial = gram + square, *product = polynomial + square, *other = product + square, *panels = other + square;
    const T* from = x + image * m * n;
    if (wide) {
      for (int64_t i = 0; i < size; i += panel_width) transpose<isa>(from + i * n, n, panel_width, n, panels + i * n, panel_width);
    } else {
      copy_panels(from, panels);
    }
    symmetric<isa>(panels, panels, size, depth, gram);
    T trace = 0;
    for (int64_t i = 0; i < size; ++i) trace += gram[diagonal(i, size)];
    const T inverse = 1 / (std::sqrt(trace) + T(1e-7));
#pragma omp simd
    for (int64_t i = 0; i < square; ++i) gram[i] *= inverse * inverse;
    for (int64_t round = 0; round < rounds; ++round) {
      symmetric<isa>(gram, gram, size, size, polynomial);
#pragma omp simd
      for (int64_t i = 0; i < square; ++i) polynomial[i] = c * polynomial[i] + b * gram[i];
      for (int64_t i = 0; i < size; ++i) polynomial[diagonal(i, size)] += a;
      if (round == 0) {
        std::copy_n(polynomial, square, product);
      } else {
        whole<isa>(polynomial, product, size, other);
        std::swap(product, other);
      }
      if (round + 1 == rounds) break;
      whole<isa>(gram, polynomial, size, other);
      symmetric<isa>(other, polynomial, size, size, gram);
    }
#pragma omp simd
    for (int64_t i = 0; i < square; ++i) product[i] *= scale * inverse;
    for (int64_t i = 0; i < size; i += panel_width) {
      for (int64_t j = 0; j < size; j += panel_width) {
        transpose<isa>(product + j * size + i * panel_width, panel_width, panel_width, panel_width, other + i * size + j * panel_width, panel_width);
      }
    }
    if (wide) copy_panels(from, panels);  // for X as the right factor
    const T* right = wide ? panels : other;
    for (int64_t w = 0; w < n; w += panel_width) {
      for (int64_t r = 0; r < m; r += tile_rows) {
        T* to = out + image * m * n + r * n + w;
        if (wide) {
          panel_tile<isa, tile_rows>(rows_of(other, r, size), 1, panel_width, right + w * size, size, to, n);
        } else {
          panel_tile<isa, tile_rows>(from + r * n, n, 1, right + w * size, size, to, n);
        }
      }
    }
  }

  static PROXT2I_INLINE int64_t diagonal(int64_t i, int64_t size) { return (i / panel_width * size + i) * panel_width + i % panel_width; }

  // Row r of a symmetric matrix is its column r: its numbers lie panel_width apart, those of the next rows beside them.
  static PROXT2I_INLINE const T* rows_of(const T* matrix, int64_t r, int64_t depth) { return matrix + r / panel_width * panel_width * depth + r % panel_width; }

  // panels [n / panel_width][m][panel_width] = X
  PROXT2I_INLINE void copy_panels(const T* from, T* panels) const {
    for (int64_t w = 0; w < n; w += panel_width) {
      for (int64_t r = 0; r < m; ++r) std::copy_n(from + r * n + w, panel_width, panels + w * m + r * panel_width);
    }
  }

  // to = left right [size, size], left symmetric, all in panels.
  template <Isa isa>
  static PROXT2I_INLINE void whole(const T* left, const T* right, int64_t size, T* to) {
    for (int64_t w = 0; w < size; w += panel_width) {
      for (int64_t r = 0; r < size; r += tile_rows) {
        panel_tile<isa, tile_rows>(rows_of(left, r, size), 1, panel_width, right + w * size, size, to + w * size + r * panel_width, panel_width);
      }
    }
  }

  // to [size, size] = left^T right, which is symmetric; left, right [depth, size], all in panels.
  template <Isa isa>
  static PROXT2I_INLINE void symmetric(const T* left, const T* right, int64_t size, int64_t depth, T* to) {
    for (int64_t w = 0; w < size; w += panel_width) {
      for (int64_t r = w; r < size; r += tile_rows) {
        panel_tile<isa, tile_rows>(rows_of(left, r, depth), 1, panel_width, right + w * depth, depth, to + w * size + r * panel_width, panel_width);
      }
      for (int64_t r = w + panel_width; r < size; r += panel_width) {
        transpose<isa>(to + w * size + r * panel_width, panel_width, panel_width, panel_width, to + r * size + w * panel_width, panel_width);
      }
    }
  }
};

Tensor orthogonalize(const Tensor& x, double a, double b, double c, int64_t rounds, double scale) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0 && x.size(2) > 0 && x.size(1) % panel_width == 0 && x.size(2) % panel_width == 0 && rounds > 0,
                  "proxt2i: x must have shape [K, m, n], m and n multiples of 32, and rounds must be positive");
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "proxt2i: x must be float32 or float64");
  const Tensor out = empty_like_in(x, dtype);
  const auto run = [&]<typename T>(T) {
    Inputs inputs;
    run_parallel(Orthogonalize<T>{inputs.data<T>(x), output<T>(out), x.size(1), x.size(2), rounds, static_cast<T>(a), static_cast<T>(b),
                                  static_cast<T>(c), static_cast<T>(scale), x.size(0)});
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return out;
}

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY_IMPL(proxt2i, CPU, m) { m.impl("orthogonalize", TORCH_BOX(&proxt2i::orthogonalize)); }
