// The fused proximal step and its noise: arithmetic (math.h), arguments and checks, for the CPU and CUDA alike.
#pragma once

#include "tensors.h"

namespace proxt2i {

// The numbers of one step, a row of a float64 table on the tensors' device. One row serves the whole batch, or each image has its own.
namespace coefficient {
enum { guidance_scale, sqrt_lam, a, b, clean_y, clean_eps, memory, draw, count };
}

// One image's coefficients in the arithmetic's type, in the table's order.
template <typename T>
struct StepRow {
  T guidance_scale, sqrt_lam, a, b, clean_y, clean_eps, memory;
  uint64_t draw;
};

// Contiguous arrays of num_images * per_image elements. eps_uncond null: no guidance; clean null: no memory; noise null: draw from
// seeds if those are given; x, y_next, clean_next null: not wanted. Image i's coefficients are at coefficients + i * row_stride,
// row_stride 0 or coefficient::count.
template <typename T, typename E>
struct StepArgs {
  const T* y;
  const E *eps_cond, *eps_uncond;
  const T *clean, *noise;
  const int64_t* seeds;
  const double* coefficients;
  int64_t row_stride;
  T *x, *y_next, *clean_next;
  int64_t num_images, per_image;

  PROXT2I_HD StepRow<T> row(int64_t image) const {
    const double* numbers = coefficients + image * row_stride;
    return {static_cast<T>(numbers[coefficient::guidance_scale]),
            static_cast<T>(numbers[coefficient::sqrt_lam]),
            static_cast<T>(numbers[coefficient::a]),
            static_cast<T>(numbers[coefficient::b]),
            static_cast<T>(numbers[coefficient::clean_y]),
            static_cast<T>(numbers[coefficient::clean_eps]),
            static_cast<T>(numbers[coefficient::memory]),
            static_cast<uint64_t>(numbers[coefficient::draw])};
  }
  PROXT2I_HD bool remembers() const { return clean != nullptr && y_next != nullptr; }
};

struct StepInputs {
  const Tensor &y, &eps_cond;
  const std::optional<Tensor>&eps_uncond, &clean, &noise, &seeds;
  const Tensor& coefficients;
  bool want_x, want_next, want_clean;
};

// (x, y_next, clean_next); what is not wanted has no elements.
template <typename Device>
std::tuple<Tensor, Tensor, Tensor> prox_step(const Device& device, const StepInputs& in) {
  const Tensor& y = in.y;
  const ScalarType state = y.scalar_type();
  images_of(y);
  STD_TORCH_CHECK(state == ScalarType::Float || state == ScalarType::Double, "proxt2i: y must be float32 or float64");
  STD_TORCH_CHECK(state_type(in.eps_cond) == state, "proxt2i: eps_cond must be float64 beside a float64 y, and only there");
  check_like(in.eps_cond, y, in.eps_cond.scalar_type(), "eps_cond");
  if (in.eps_uncond.has_value()) check_like(*in.eps_uncond, y, in.eps_cond.scalar_type(), "eps_uncond");
  if (in.clean.has_value()) check_like(*in.clean, y, state, "clean");
  if (in.noise.has_value()) check_like(*in.noise, y, state, "noise");
  if (in.seeds.has_value()) check_per_image(*in.seeds, y, ScalarType::Long, "seeds");
  const bool one_row = in.coefficients.dim() == 1 && in.coefficients.size(0) == coefficient::count;
  if (!one_row) check_per_image(in.coefficients, y, ScalarType::Double, "coefficients", coefficient::count);
  STD_TORCH_CHECK(in.coefficients.scalar_type() == ScalarType::Double && in.coefficients.device() == y.device(),
                  "proxt2i: coefficients must be float64 on y's device");
  const auto wanted = [&](bool want) { return want ? empty_like_in(y, state) : empty_vector(y, 0, state); };
  const Tensor x = wanted(in.want_x), y_next = wanted(in.want_next), clean_next = wanted(in.want_clean);
  with_types(in.eps_cond, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    const auto place = [](bool want, const Tensor& t) { return want ? output<T>(t) : nullptr; };
    device.step(StepArgs<T, E>{inputs.data<T>(y), inputs.data<E>(in.eps_cond), inputs.data<E>(in.eps_uncond),
                               inputs.data<T>(in.clean), inputs.data<T>(in.noise),
                               in.noise.has_value() ? nullptr : inputs.data<int64_t>(in.seeds), inputs.data<double>(in.coefficients),
                               one_row ? 0 : coefficient::count, place(in.want_x, x), place(in.want_next, y_next),
                               place(in.want_clean, clean_next), images_of(y), elements_per_image(y)});
  });
  return {x, y_next, clean_next};
}

struct NormalArgs {
  const int64_t* seeds;
  float* out;
  int64_t step;
  int64_t num_images, per_image;
};

template <typename Device>
Tensor philox_normal(const Device& device, const Tensor& seeds, int64_t step, int64_t count) {
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1, "proxt2i: seeds must be int64 [B]");
  STD_TORCH_CHECK(step >= 0 && count >= 0, "proxt2i: step and count must not be negative");
  const int64_t shape[] = {seeds.size(0), count};
  const Tensor out = torch::stable::new_empty(seeds, {shape, 2}, ScalarType::Float);
  Inputs inputs;
  device.normals(NormalArgs{inputs.data<int64_t>(seeds), output<float>(out), step, seeds.size(0), count});
  return out;
}

}  // namespace proxt2i
