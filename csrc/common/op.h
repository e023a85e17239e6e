// What the CPU and CUDA versions of the op share: the argument block of the kernels, and the checks of the tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "math.h"

namespace proxt2i {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The numbers of one step, a row of a float64 table on the tensors' device. One row serves the whole batch, or each image has its own.
namespace coefficient {
enum { guidance_scale, sqrt_lam, a, b, clean_y, clean_eps, memory, draw, count };
}

// Contiguous arrays of num_images * per_image elements. eps_uncond null: no guidance; clean null: no memory; noise null: draw from
// seeds if those are given; x, y_next, clean_next null: not wanted. T is the type of the state and of the arithmetic, E that of the
// network's output. Image i's coefficients are at coefficients + i * row_stride, row_stride 0 or count.
template <typename T, typename E>
struct StepArgs {
  const T* y;
  const E* eps_cond;
  const E* eps_uncond;
  const T* clean;
  const T* noise;
  const int64_t* seeds;
  const double* coefficients;
  int64_t row_stride;
  T* x;
  T* y_next;
  T* clean_next;
  int64_t num_images;
  int64_t per_image;
};

// One image's coefficients in the arithmetic's type.
template <typename T>
struct StepRow {
  T guidance_scale, sqrt_lam, a, b, clean_y, clean_eps, memory;
  uint64_t draw;
};

template <typename T, typename E>
PROXT2I_HD StepRow<T> step_row(const StepArgs<T, E>& args, int64_t image) {
  const double* row = args.coefficients + image * args.row_stride;
  return {static_cast<T>(row[coefficient::guidance_scale]),
          static_cast<T>(row[coefficient::sqrt_lam]),
          static_cast<T>(row[coefficient::a]),
          static_cast<T>(row[coefficient::b]),
          static_cast<T>(row[coefficient::clean_y]),
          static_cast<T>(row[coefficient::clean_eps]),
          static_cast<T>(row[coefficient::memory]),
          static_cast<uint64_t>(row[coefficient::draw])};
}

// The tensors of one call, checked and made contiguous; they own the memory that StepArgs points to. An output that is not wanted has
// no elements.
struct StepTensors {
  Tensor y, eps_cond;
  std::optional<Tensor> eps_uncond, clean, noise, seeds;
  Tensor coefficients, x, y_next, clean_next;
};

inline void check_same_device(const Tensor& a, const Tensor& b, const char* name) {
  STD_TORCH_CHECK(a.device() == b.device(), "proxt2i: ", name, " is on another device than y");
}

inline void check_same_shape(const Tensor& a, const Tensor& b, const char* name) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  STD_TORCH_CHECK(same, "proxt2i: ", name, " and y differ in shape");
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

inline std::optional<Tensor> check_like(const Tensor& y, const std::optional<Tensor>& t, ScalarType dtype, const char* name) {
  if (!t.has_value()) return std::nullopt;
  STD_TORCH_CHECK(t->scalar_type() == dtype, "proxt2i: ", name, " has the wrong dtype");
  check_same_device(y, *t, name);
  check_same_shape(y, *t, name);
  return torch::stable::contiguous(*t);
}

inline StepTensors prepare(const Tensor& y, const Tensor& eps_cond, const std::optional<Tensor>& eps_uncond,
                           const std::optional<Tensor>& clean, const std::optional<Tensor>& noise,
                           const std::optional<Tensor>& seeds, const Tensor& coefficients, bool want_x, bool want_next,
                           bool want_clean) {
  STD_TORCH_CHECK(y.dim() >= 1, "proxt2i: y needs a batch dimension");
  const auto dtype = y.scalar_type(), eps_dtype = eps_cond.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "proxt2i: y must be float32 or float64");
  STD_TORCH_CHECK(eps_dtype == dtype || (dtype == ScalarType::Float &&
                                         (eps_dtype == ScalarType::BFloat16 || eps_dtype == ScalarType::Half)),
                  "proxt2i: eps_cond must have y's dtype, or be bfloat16 or float16 beside a float32 y");
  const int64_t num_images = y.size(0);
  if (seeds.has_value()) {
    STD_TORCH_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->dim() == 1 && seeds->size(0) == num_images,
                    "proxt2i: seeds must be int64 with one entry for each image of y");
    check_same_device(y, *seeds, "seeds");
  }
  const bool one_row = coefficients.dim() == 1;
  STD_TORCH_CHECK(coefficients.scalar_type() == ScalarType::Double &&
                      (one_row || (coefficients.dim() == 2 && coefficients.size(0) == num_images)) &&
                      coefficients.size(coefficients.dim() - 1) == coefficient::count,
                  "proxt2i: coefficients must be float64 [8], or [B, 8] with a row for each image of y");
  check_same_device(y, coefficients, "coefficients");
  const int64_t nothing[] = {0};
  const auto output = [&](bool wanted) {
    return wanted ? torch::stable::new_empty(y, y.sizes()) : torch::stable::new_empty(y, {nothing, 1});
  };
  return {torch::stable::contiguous(y),
          *check_like(y, eps_cond, eps_dtype, "eps_cond"),
          check_like(y, eps_uncond, eps_dtype, "eps_uncond"),
          check_like(y, clean, dtype, "clean"),
          check_like(y, noise, dtype, "noise"),
          noise.has_value() ? std::nullopt : contiguous(seeds),
          torch::stable::contiguous(coefficients),
          output(want_x),
          output(want_next),
          output(want_clean)};
}

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T, typename E>
StepArgs<T, E> arguments(const StepTensors& t) {
  const int64_t num_images = t.y.size(0);
  const auto wanted = [](const Tensor& output) {
    return output.numel() > 0 ? static_cast<T*>(output.mutable_data_ptr()) : nullptr;
  };
  return {static_cast<const T*>(t.y.const_data_ptr()),
          static_cast<const E*>(t.eps_cond.const_data_ptr()),
          pointer<E>(t.eps_uncond),
          pointer<T>(t.clean),
          pointer<T>(t.noise),
          pointer<int64_t>(t.seeds),
          static_cast<const double*>(t.coefficients.const_data_ptr()),
          t.coefficients.dim() == 1 ? 0 : coefficient::count,
          wanted(t.x),
          wanted(t.y_next),
          wanted(t.clean_next),
          num_images,
          num_images > 0 ? t.y.numel() / num_images : 0};
}

// Calls launch(StepArgs<T, E>) with the types that the tensors have.
template <typename Launch>
void dispatch(const StepTensors& t, const Launch& launch) {
  const auto eps_dtype = t.eps_cond.scalar_type();
  if (eps_dtype == ScalarType::Double) {
    launch(arguments<double, double>(t));
  } else if (eps_dtype == ScalarType::Float) {
    launch(arguments<float, float>(t));
  } else if (eps_dtype == ScalarType::BFloat16) {
    launch(arguments<float, bfloat16>(t));
  } else {
    launch(arguments<float, float16>(t));
  }
}

inline void check_philox(const Tensor& seeds, int64_t step, int64_t count) {
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1, "proxt2i: seeds must be int64 [B]");
  STD_TORCH_CHECK(step >= 0 && count >= 0, "proxt2i: step and count must not be negative");
}

}  // namespace proxt2i
