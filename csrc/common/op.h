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

// Contiguous arrays of num_images * per_image elements. eps_uncond null: no guidance; noise null: draw from seeds if those are
// given; y_next null: only x is wanted. T is the type of the state and of the arithmetic, E that of the network's output.
template <typename T, typename E>
struct StepArgs {
  const T* y;
  const E* eps_cond;
  const E* eps_uncond;
  const T* noise;
  const int64_t* seeds;
  T* x;
  T* y_next;
  int64_t num_images;
  int64_t per_image;
  uint64_t step;
  T guidance_scale, sqrt_lam, a, b;
};

// The tensors of one call, checked and made contiguous; they own the memory that StepArgs points to.
struct StepTensors {
  Tensor y, eps_cond;
  std::optional<Tensor> eps_uncond, noise, seeds;
  Tensor x;
  std::optional<Tensor> y_next;
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

inline StepTensors prepare(const Tensor& y, const Tensor& eps_cond, const std::optional<Tensor>& eps_uncond,
                           const std::optional<Tensor>& noise, const std::optional<Tensor>& seeds, bool want_next, double b) {
  STD_TORCH_CHECK(y.dim() >= 1, "proxt2i: y needs a batch dimension");
  const auto dtype = y.scalar_type(), eps_dtype = eps_cond.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "proxt2i: y must be float32 or float64");
  STD_TORCH_CHECK(eps_dtype == dtype || (dtype == ScalarType::Float &&
                                         (eps_dtype == ScalarType::BFloat16 || eps_dtype == ScalarType::Half)),
                  "proxt2i: eps_cond must have y's dtype, or be bfloat16 or float16 beside a float32 y");
  check_same_device(y, eps_cond, "eps_cond");
  check_same_shape(y, eps_cond, "eps_cond");
  if (eps_uncond.has_value()) {
    STD_TORCH_CHECK(eps_uncond->scalar_type() == eps_dtype, "proxt2i: eps_uncond and eps_cond differ in dtype");
    check_same_device(y, *eps_uncond, "eps_uncond");
    check_same_shape(y, *eps_uncond, "eps_uncond");
  }
  const bool needs_noise = want_next && b != 0.0;
  STD_TORCH_CHECK(!needs_noise || noise.has_value() || seeds.has_value(), "proxt2i: b != 0 needs noise or seeds");
  if (noise.has_value()) {
    STD_TORCH_CHECK(noise->scalar_type() == dtype, "proxt2i: noise and y differ in dtype");
    check_same_device(y, *noise, "noise");
    check_same_shape(y, *noise, "noise");
  }
  if (seeds.has_value()) {
    STD_TORCH_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->dim() == 1 && seeds->size(0) == y.size(0),
                    "proxt2i: seeds must be int64 with one entry for each image of y");
    check_same_device(y, *seeds, "seeds");
  }
  StepTensors t{torch::stable::contiguous(y), torch::stable::contiguous(eps_cond), contiguous(eps_uncond),
                needs_noise ? contiguous(noise) : std::nullopt,
                needs_noise && !noise.has_value() ? contiguous(seeds) : std::nullopt,
                torch::stable::new_empty(y, y.sizes()), std::nullopt};
  if (want_next) t.y_next = torch::stable::new_empty(y, y.sizes());
  return t;
}

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T, typename E>
StepArgs<T, E> arguments(const StepTensors& t, int64_t step, double guidance_scale, double sqrt_lam, double a, double b) {
  const int64_t num_images = t.y.size(0);
  return {static_cast<const T*>(t.y.const_data_ptr()),
          static_cast<const E*>(t.eps_cond.const_data_ptr()),
          pointer<E>(t.eps_uncond),
          pointer<T>(t.noise),
          pointer<int64_t>(t.seeds),
          static_cast<T*>(t.x.mutable_data_ptr()),
          t.y_next.has_value() ? static_cast<T*>(t.y_next->mutable_data_ptr()) : nullptr,
          num_images,
          num_images > 0 ? t.y.numel() / num_images : 0,
          static_cast<uint64_t>(step),
          static_cast<T>(guidance_scale),
          static_cast<T>(sqrt_lam),
          static_cast<T>(a),
          static_cast<T>(b)};
}

// Calls launch(StepArgs<T, E>) with the types that the tensors have.
template <typename Launch>
void dispatch(const StepTensors& t, int64_t step, double guidance_scale, double sqrt_lam, double a, double b,
              const Launch& launch) {
  const auto eps_dtype = t.eps_cond.scalar_type();
  if (eps_dtype == ScalarType::Double) {
    launch(arguments<double, double>(t, step, guidance_scale, sqrt_lam, a, b));
  } else if (eps_dtype == ScalarType::Float) {
    launch(arguments<float, float>(t, step, guidance_scale, sqrt_lam, a, b));
  } else if (eps_dtype == ScalarType::BFloat16) {
    launch(arguments<float, bfloat16>(t, step, guidance_scale, sqrt_lam, a, b));
  } else {
    launch(arguments<float, float16>(t, step, guidance_scale, sqrt_lam, a, b));
  }
}

inline void check_philox(const Tensor& seeds, int64_t step, int64_t count) {
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1, "proxt2i: seeds must be int64 [B]");
  STD_TORCH_CHECK(step >= 0 && count >= 0, "proxt2i: step and count must not be negative");
}

}  // namespace proxt2i
