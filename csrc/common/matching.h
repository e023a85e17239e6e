// Training pairs and their errors: arithmetic, arguments and checks, for the CPU and CUDA alike. Coefficients of an image: signal,
// noise and prox, the square roots of alpha, 1 - alpha and lambda.
//   y = signal x0 + noise e + prox n            e, n: draws 0 and 1 of the image's seed
//   expected target = prox / (noise^2 + prox^2) (y - signal x0);    mse = mean((eps - target)^2),  mae = mean |eps - target|
#pragma once

#include "narrow.h"
#include "reduce.h"

namespace proxt2i {

template <typename T>
struct PairCoefficients {
  T signal, noise, prox;
};

template <typename T>
PROXT2I_HD PairCoefficients<T> coefficients_of(const T* coefficients, int64_t image) {
  const T* row = coefficients + 3 * image;
  return {row[0], row[1], row[2]};
}
template <typename T>
PROXT2I_HD T expected_factor(const PairCoefficients<T>& c) {
  return c.prox / fma(c.noise, c.noise, c.prox * c.prox);
}
template <typename T>
PROXT2I_HD T expected_target(T x0, T y, T signal, T factor) {
  return factor * fma(-signal, x0, y);
}
template <typename T>
PROXT2I_HD T magnitude(T a) {
  return a < 0 ? -a : a;
}
// mse_factor, mae_factor: the gradients with respect to mse and mae, times 2 / D and 1 / D.
template <typename T>
PROXT2I_HD T matching_gradient(T error, T mse_factor, T mae_factor) {
  const T sign = static_cast<T>(static_cast<int>(error > 0) - static_cast<int>(error < 0));
  return fma(mse_factor, error, mae_factor * sign);
}

template <typename T>
struct PairArgs {
  const T* x0;
  const int64_t* seeds;
  const T* coefficients;
  T* y;
  int64_t num_images, per_image;
};

// x0 and y null: the target is draw `draw` of each seed; otherwise the expected noise.
template <typename T, typename E>
struct MatchingArgs {
  const E* eps;
  const T *x0, *y, *coefficients;
  const int64_t* seeds;
  int64_t draw;
  int64_t num_images, per_image;
};

template <typename T, typename E>
struct MatchingGradients {
  const T *grad_mse, *grad_mae;
  E* grad_eps;
};

// draw: none for the expected noise.
struct MatchingInputs {
  const Tensor& eps;
  const std::optional<Tensor>&x0, &y;
  const Tensor &seeds, &coefficients;
  std::optional<int64_t> draw;

  void check() const {
    const ScalarType state = state_type(eps);
    images_of(eps);
    STD_TORCH_CHECK(draw.has_value() ? *draw >= 0 : x0.has_value() && y.has_value(), "proxt2i: a draw, or x0 and y, are needed");
    if (x0.has_value()) check_like(*x0, eps, state, "x0");
    if (y.has_value()) check_like(*y, eps, state, "y");
    check_per_image(seeds, eps, ScalarType::Long, "seeds");
    check_per_image(coefficients, eps, state, "coefficients", 3);
  }

  template <typename T, typename E>
  MatchingArgs<T, E> arguments(Inputs& inputs) const {
    return {inputs.data<E>(eps),
            draw.has_value() ? nullptr : inputs.data<T>(x0),
            draw.has_value() ? nullptr : inputs.data<T>(y),
            inputs.data<T>(coefficients),
            inputs.data<int64_t>(seeds),
            draw.value_or(0),
            images_of(eps),
            elements_per_image(eps)};
  }
};

template <typename Device>
Tensor noised_pair(const Device& device, const Tensor& x0, const Tensor& seeds, const Tensor& coefficients) {
  const ScalarType state = state_type(x0);
  STD_TORCH_CHECK(x0.scalar_type() == state, "proxt2i: x0 must be float32 or float64");
  check_per_image(seeds, x0, ScalarType::Long, "seeds");
  check_per_image(coefficients, x0, state, "coefficients", 3);
  const Tensor y = empty_like_in(x0, state);
  Inputs inputs;
  const auto run = [&]<typename T>(T) {
    device.noise(PairArgs<T>{inputs.data<T>(x0), inputs.data<int64_t>(seeds), inputs.data<T>(coefficients), output<T>(y),
                             images_of(x0), elements_per_image(x0)});
  };
  state == ScalarType::Double ? run(double{}) : run(float{});
  return y;
}

template <typename Device>
std::tuple<Tensor, Tensor> matching_errors(const Device& device, const MatchingInputs& in) {
  in.check();
  Inputs inputs;
  const auto size = static_cast<double>(elements_per_image(in.eps));
  return sum_per_image(device, in.eps, size, size, [&]<typename T, typename E>(Types<T, E>, T* partials) {
    device.errors(in.arguments<T, E>(inputs), partials);
  });
}

template <typename Device>
Tensor matching_errors_backward(const Device& device, const Tensor& grad_mse, const Tensor& grad_mae, const MatchingInputs& in) {
  in.check();
  check_per_image(grad_mse, in.eps, state_type(in.eps), "grad_mse");
  check_per_image(grad_mae, in.eps, state_type(in.eps), "grad_mae");
  const Tensor grad_eps = empty_like_in(in.eps, in.eps.scalar_type());
  with_types(in.eps, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    device.errors_backward(in.arguments<T, E>(inputs), MatchingGradients<T, E>{inputs.data<T>(grad_mse), inputs.data<T>(grad_mae),
                                                                              output<E>(grad_eps)});
  });
  return grad_eps;
}

}  // namespace proxt2i
