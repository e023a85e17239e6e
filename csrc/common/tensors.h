// The tensors of an operator: types, checks, contiguous memory. An operator computes in the type T of the state, float or double; the
// network's output has type E: T itself, or a 16-bit type beside float. The first dimension counts images.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <tuple>

#include "math.h"

namespace proxt2i {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T, typename E>
struct Types {};

// Calls run(Types<T, E>{}) with the types that belong to a network's output.
template <typename Run>
void with_types(const Tensor& eps, const Run& run) {
  const auto dtype = eps.scalar_type();
  if (dtype == ScalarType::Double) return run(Types<double, double>{});
  if (dtype == ScalarType::Float) return run(Types<float, float>{});
  if (dtype == ScalarType::BFloat16) return run(Types<float, bfloat16>{});
  STD_TORCH_CHECK(dtype == ScalarType::Half, "proxt2i: float32, float64, bfloat16 or float16 is needed");
  run(Types<float, float16>{});
}

inline ScalarType state_type(const Tensor& eps) {
  return eps.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t images_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1, "proxt2i: a batch dimension is needed");
  return t.size(0);
}

inline int64_t elements_per_image(const Tensor& t) { return images_of(t) > 0 ? t.numel() / t.size(0) : 0; }

// `t` must lie where `like` does and have its shape, and this dtype.
inline void check_like(const Tensor& t, const Tensor& like, ScalarType dtype, const char* name) {
  bool same = t.dim() == like.dim() && t.device() == like.device() && t.scalar_type() == dtype;
  for (int64_t i = 0; same && i < like.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, "proxt2i: ", name, " has another shape, device or dtype than it must have");
}

// `t` must be [B] (columns == 0) or [B, columns] for the B images of `like`, where `like` lies, with this dtype.
inline void check_per_image(const Tensor& t, const Tensor& like, ScalarType dtype, const char* name, int64_t columns = 0) {
  const bool fits = t.dim() == (columns > 0 ? 2 : 1) && t.size(0) == images_of(like) && (columns == 0 || t.size(1) == columns);
  STD_TORCH_CHECK(fits && t.device() == like.device() && t.scalar_type() == dtype, "proxt2i: ", name,
                  " must have an entry for each image, on its device and in the right dtype");
}

inline Tensor empty_like_in(const Tensor& like, ScalarType dtype) { return torch::stable::new_empty(like, like.sizes(), dtype); }
inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::new_empty(like, {&size, 1}, dtype);
}

template <typename T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Contiguous versions of a call's inputs: pointers to them hold as long as it lives.
class Inputs {
 public:
  template <typename T>
  const T* data(const Tensor& t) {
    if (t.is_contiguous()) return static_cast<const T*>(t.const_data_ptr());
    kept_.push_back(torch::stable::contiguous(t));
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }
  template <typename T>
  const T* data(const std::optional<Tensor>& t) {
    return t.has_value() ? data<T>(*t) : nullptr;
  }

 private:
  std::deque<Tensor> kept_;
};

}  // namespace proxt2i
