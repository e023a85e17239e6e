// Linear layers on a CPU: y = [x, skip] W^T + bias without that concatenation, and the gradients. Weights are packed in panels that the sums of a tile
// read one line after the other; 48 rows of the other factor are staged beside them, where the layout of the tensors cannot trouble the cache.
// Every sum is in an order that depends on the shape of the weight alone (that of the weight's own gradient on the number of rows too): a row of y does
// not depend on its neighbours, and no result on the number of threads. Bits are alike with any instruction set, but for bfloat16 with avx512_bf16.
#include "../common/tensors.h"
#include "linear_words.h"

namespace proxt2i {
namespace {

constexpr int64_t block = 4 * tile_rows;  // rows that are staged together; a multiple of pairs::lanes

// Two matrices with as many rows, side by side; the second may have no columns.
template <typename E>
struct Beside {
  E* data[2];
  int64_t width[2];

  int64_t columns() const { return width[0] + width[1]; }
  int64_t stride(int64_t column) const { return width[column >= width[0]]; }
  E* at(int64_t row, int64_t column) const { return column < width[0] ? data[0] + row * width[0] + column : data[1] + row * width[1] + column - width[0]; }
};

// panels [columns / panel_width][depth][panel_width] of words = the transpose of weight [columns, depth], or weight [depth, columns].
template <typename T, typename E>
struct Pack {
  static constexpr int64_t chunks_per_thread = 4;
  static constexpr bool has_bf16_products = std::is_same_v<E, bfloat16>;
  const T* weight;
  bool transposed;
  int64_t depth, columns;
  T* panels;
  int64_t num_images = columns / panel_width, per_image = 1;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t panel, int64_t, int64_t) const {
    using W = Words<isa, T, E>;
    auto* words = reinterpret_cast<typename W::Word*>(panels) + panel * panel_width * (depth / W::numbers);
    if (transposed) {
      W::transposed(weight + panel * panel_width * depth, depth, depth, words);
    } else {
      W::deep_rows(weight + panel * panel_width, columns, depth, panel_width, words);
    }
  }
};

// c [rows, columns] = bias + a [rows, depth] B, B packed.
template <typename T, typename E>
struct Product {
  static constexpr int64_t chunks_per_thread = 1;
  static constexpr bool has_bf16_products = std::is_same_v<E, bfloat16>;
  Beside<const E> a;
  const T *panels, *bias;
  Beside<E> c;
  int64_t rows;
  int64_t num_images = (rows + block - 1) / block, per_image = 1;

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t number, int64_t, int64_t) const {
    using W = Words<isa, T, E>;
    using Word = typename W::Word;
    const int64_t first = number * block, count = std::min(block, rows - first), depth = a.columns() / W::numbers, stride = depth + lanes;
    Word* staged = workspace<Word>(block * stride);
    for (int part = 0; part < 2; ++part) {
      if (a.width[part] == 0) continue;
      W::rows(a.data[part] + first * a.width[part], a.width[part], count, a.width[part], staged + part * (a.width[0] / W::numbers), stride);
    }
    for (int64_t i = count; i % tile_rows != 0; ++i) std::fill_n(staged + i * stride, depth, Word{0});
    E last[tile_rows * panel_width];
    for (int64_t column = 0; column < c.columns(); column += panel_width) {
      const Word* panel = reinterpret_cast<const Word*>(panels) + column * depth;
      const Start<T> start{bias == nullptr ? nullptr : bias + column, 0};
      const int64_t to_stride = c.stride(column);
      for (int64_t i = 0; i < count; i += tile_rows) {
        E* to = c.at(first + i, column);
        if (i + tile_rows <= count) {
          for (int64_t r = 0; r < tile_rows; ++r) {
            for (int64_t w = 0; w < panel_width; w += 64 / static_cast<int64_t>(sizeof(E))) __builtin_prefetch(to + r * to_stride + w, 1);
          }
          W::tile(staged + i * stride, stride, 1, panel, depth, to, to_stride, start);
        } else {
          W::tile(staged + i * stride, stride, 1, panel, depth, last, panel_width, start);
          for (int64_t r = 0; r < count - i; ++r) std::copy_n(last + r * panel_width, panel_width, to + r * to_stride);
        }
      }
    }
  }
};

// weight [outputs, inputs] = grad^T x and bias [outputs] = the sums of grad's columns, grad [rows, outputs], x [rows, inputs]; so many rows at a time
// that what is staged of them and the weight lie in the L2 cache of common sizes.
template <typename T, typename E>
struct WeightGradient {
  static constexpr int64_t chunks_per_thread = 1;
  static constexpr bool has_bf16_products = std::is_same_v<E, bfloat16>;
  const E* grad;
  Beside<const E> x;
  T *weight, *bias;  // bias: or null
  int64_t rows, outputs;
  int64_t num_images, per_image = 1;  // parts of the outputs, multiples of `lanes`, one for each thread

  template <Isa isa>
  PROXT2I_INLINE void chunk(int64_t part, int64_t, int64_t) const {
    using W = Words<isa, T, E>;
    using Word = typename W::Word;
    const int64_t inputs = x.columns(), slice = 192 * W::numbers, begin = outputs / lanes * part / num_images * lanes;
    const int64_t end = outputs / lanes * (part + 1) / num_images * lanes;
    Word* staged = workspace<Word>(192 * (inputs + block) + lanes);
    Word* staged_grad = staged + 192 * inputs;
    for (int64_t row = 0; row < rows; row += slice) {
      const int64_t count = std::min(slice, rows - row), depth = (count + W::numbers - 1) / W::numbers;
      for (int64_t column = 0; column < inputs; column += panel_width) {
        W::deep_rows(x.at(row, column), x.stride(column), count, panel_width, staged + column * depth);
      }
      for (int64_t first = begin; first < end; first += block) {
        const int64_t width = std::min(block, end - first);
        W::deep_rows(grad + row * outputs + first, outputs, count, width, staged_grad);
        if (bias != nullptr) add_columns(grad + row * outputs + first, count, width, row == 0, bias + first);
        for (int64_t i = 0; i < width; i += tile_rows) {
          for (int64_t column = 0; column < inputs; column += panel_width) {
            tile<isa>(staged_grad + i, width, staged + column * depth, depth, std::min(tile_rows, width - i), row == 0,
                      weight + (first + i) * inputs + column, inputs);
          }
        }
      }
    }
  }

  // The first `count` rows of a tile, added to what is there. (The others are made of words that lie behind, and thrown away.)
  template <Isa isa, typename Word>
  PROXT2I_INLINE void tile(const Word* a, int64_t depth_stride, const Word* panel, int64_t depth, int64_t count, bool is_first, T* to, int64_t stride) const {
    if (count == tile_rows) return Words<isa, T, E>::tile(a, 1, depth_stride, panel, depth, to, stride, Start<T>{is_first ? nullptr : to, stride});
    T last[tile_rows * panel_width] = {};
    for (int64_t r = 0; r < count && !is_first; ++r) std::copy_n(to + r * stride, panel_width, last + r * panel_width);
    Words<isa, T, E>::tile(a, 1, depth_stride, panel, depth, last, panel_width, Start<T>{last, panel_width});
    for (int64_t r = 0; r < count; ++r) std::copy_n(last + r * panel_width, panel_width, to + r * stride);
  }

  // 24 rows at a time, so that few small numbers are added to a large one.
  PROXT2I_INLINE void add_columns(const E* from, int64_t count, int64_t width, bool is_first, T* sums) const {
    T all[block] = {};
    for (int64_t i = 0; i < count; i += 24) {
      T sum[block] = {};
      for (int64_t j = i; j < std::min(i + 24, count); ++j) {
#pragma omp simd
        for (int64_t w = 0; w < width; ++w) sum[w] += static_cast<T>(widen(from[j * outputs + w]));
      }
#pragma omp simd
      for (int64_t w = 0; w < width; ++w) all[w] += sum[w];
    }
#pragma omp simd
    for (int64_t w = 0; w < width; ++w) sums[w] = is_first ? all[w] : sums[w] + all[w];
  }
};

using Optional = const std::optional<Tensor>&;

struct Sizes {
  int64_t rows, inputs, skip, outputs;
};

Sizes check_linear(const Tensor& x, Optional skip, const Tensor& weight) {
  const int64_t inputs = x.dim() > 0 ? x.size(x.dim() - 1) : 0, beside = skip.has_value() && skip->dim() > 0 ? skip->size(skip->dim() - 1) : 0;
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2 && weight.size(1) == inputs + beside && weight.scalar_type() == state_type(x),
                  "proxt2i: weight must have shape [outputs, inputs], and be float32, or float64 if x is");
  STD_TORCH_CHECK(inputs > 0 && inputs % panel_width == 0 && beside % panel_width == 0 && weight.size(0) > 0 && weight.size(0) % panel_width == 0,
                  "proxt2i: all widths must be multiples of 32");
  bool alike = !skip.has_value() || (skip->scalar_type() == x.scalar_type() && skip->dim() == x.dim() && beside > 0);
  for (int64_t i = 0; alike && skip.has_value() && i < x.dim() - 1; ++i) alike = skip->size(i) == x.size(i);
  STD_TORCH_CHECK(alike, "proxt2i: skip must have x's shape, but for the width, and its dtype");
  return {x.numel() / inputs, inputs, beside, weight.size(0)};
}

template <typename T, typename E>
Tensor packed(const Tensor& weight, const T* data, bool transposed) {
  const Tensor panels = empty_vector(weight, weight.numel(), weight.scalar_type());  // (pairs take half of it)
  const int64_t depth = weight.size(transposed ? 1 : 0), columns = weight.size(transposed ? 0 : 1);
  run_parallel(Pack<T, E>{data, transposed, depth, columns, output<T>(panels)});
  return panels;
}

Tensor like_but(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return torch::stable::new_empty(x, {shape.data(), shape.size()});
}

Tensor linear_cpu(const Tensor& x, Optional skip, const Tensor& weight, Optional bias) {
  const Sizes sizes = check_linear(x, skip, weight);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == sizes.outputs && bias->scalar_type() == weight.scalar_type(),
                    "proxt2i: bias must have an entry for each output, in weight's dtype");
  }
  const Tensor y = like_but(x, sizes.outputs);
  with_types(x, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    const Tensor panels = packed<T, E>(weight, inputs.data<T>(weight), true);
    const Beside<const E> from{{inputs.data<E>(x), inputs.data<E>(skip)}, {sizes.inputs, sizes.skip}};
    run_parallel(Product<T, E>{from, output<T>(panels), inputs.data<T>(bias), {{output<E>(y), nullptr}, {sizes.outputs, 0}}, sizes.rows});
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_backward_cpu(const Tensor& grad, const Tensor& x, Optional skip, const Tensor& weight, bool has_bias,
                                                               bool wants_x, bool wants_weight) {
  const Sizes sizes = check_linear(x, skip, weight);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim() && grad.numel() == sizes.rows * sizes.outputs &&
                      grad.size(grad.dim() - 1) == sizes.outputs,
                  "proxt2i: grad must have the shape and the dtype of y");
  const Tensor grad_x = wants_x ? empty_like_in(x, x.scalar_type()) : empty_vector(x, 0, x.scalar_type());
  const Tensor grad_skip = wants_x && skip.has_value() ? empty_like_in(*skip, x.scalar_type()) : empty_vector(x, 0, x.scalar_type());
  Tensor grad_weight = wants_weight ? empty_like_in(weight, weight.scalar_type()) : empty_vector(weight, 0, weight.scalar_type());
  Tensor grad_bias = empty_vector(weight, wants_weight && has_bias ? sizes.outputs : 0, weight.scalar_type());
  if (sizes.rows == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_x, grad_skip, grad_weight, grad_bias};
  }
  with_types(x, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    const E* from = inputs.data<E>(grad);
    if (wants_x) {
      const Tensor panels = packed<T, E>(weight, inputs.data<T>(weight), false);
      const Beside<E> to{{output<E>(grad_x), output<E>(grad_skip)}, {sizes.inputs, sizes.skip}};
      run_parallel(Product<T, E>{{{from, nullptr}, {sizes.outputs, 0}}, output<T>(panels), nullptr, to, sizes.rows});
    }
    if (wants_weight) {
      const Beside<const E> of{{inputs.data<E>(x), inputs.data<E>(skip)}, {sizes.inputs, sizes.skip}};
      const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), sizes.outputs / lanes);
      run_parallel(WeightGradient<T, E>{from, of, output<T>(grad_weight), has_bias ? output<T>(grad_bias) : nullptr, sizes.rows, sizes.outputs, parts});
    }
  });
  return {grad_x, grad_skip, grad_weight, grad_bias};
}

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY_IMPL(proxt2i, CPU, m) {
  m.impl("linear", TORCH_BOX(&proxt2i::linear_cpu));
  m.impl("linear_backward", TORCH_BOX(&proxt2i::linear_backward_cpu));
}
