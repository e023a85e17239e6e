// Likelihood ratio and KL divergence of Gaussian transitions: arithmetic, arguments and checks, for the CPU and CUDA alike.
//   d = c (eps - eps_old)    log_ratio = -sum(d (z + d / 2))        q = c (eps - eps_ref)    kl = sum(q^2) / 2
#pragma once

#include "narrow.h"
#include "reduce.h"

namespace proxt2i {

template <typename T>
PROXT2I_HD T shift(T eps, T other, T scale) {
  return scale * (eps - other);
}
// Its sum starts at +0, so that equal networks give +0 and not -0.
template <typename T>
PROXT2I_HD T log_ratio_term(T z, T d) {
  return -d * fma(static_cast<T>(0.5), d, z);
}
// Gradient with respect to eps, from those with respect to log_ratio and kl.
template <typename T>
PROXT2I_HD T transition_gradient(T z, T d, T q, T scale, T grad_log_ratio, T grad_kl) {
  return scale * fma(grad_kl, q, -grad_log_ratio * (z + d));
}

// eps_uncond null: no guidance; eps_ref null: kl is zero; noise null: z is drawn from seeds and steps.
template <typename T, typename E>
struct TransitionArgs {
  const E *eps_cond, *eps_uncond;
  const T *eps_old, *eps_ref, *noise, *scale;
  const int64_t *seeds, *steps;
  T guidance_scale;
  int64_t num_images, per_image;
};

// grad_uncond null: no guidance.
template <typename T, typename E>
struct TransitionGradients {
  const T *grad_log_ratio, *grad_kl;
  E *grad_cond, *grad_uncond;
};

struct TransitionInputs {
  const Tensor& eps_cond;
  const std::optional<Tensor>& eps_uncond;
  const Tensor& eps_old;
  const std::optional<Tensor>&eps_ref, &noise, &seeds, &steps;
  const Tensor& scale;
  double guidance_scale;

  void check() const {
    const ScalarType state = state_type(eps_cond);
    images_of(eps_cond);
    if (eps_uncond.has_value()) check_like(*eps_uncond, eps_cond, eps_cond.scalar_type(), "eps_uncond");
    check_like(eps_old, eps_cond, state, "eps_old");
    if (eps_ref.has_value()) check_like(*eps_ref, eps_cond, state, "eps_ref");
    STD_TORCH_CHECK(noise.has_value() || (seeds.has_value() && steps.has_value()), "proxt2i: noise, or seeds and steps, are needed");
    if (noise.has_value()) check_like(*noise, eps_cond, state, "noise");
    if (seeds.has_value()) check_per_image(*seeds, eps_cond, ScalarType::Long, "seeds");
    if (steps.has_value()) check_per_image(*steps, eps_cond, ScalarType::Long, "steps");
    check_per_image(scale, eps_cond, state, "scale");
  }

  template <typename T, typename E>
  TransitionArgs<T, E> arguments(Inputs& inputs) const {
    return {inputs.data<E>(eps_cond),      inputs.data<E>(eps_uncond),     inputs.data<T>(eps_old),
            inputs.data<T>(eps_ref),       inputs.data<T>(noise),          inputs.data<T>(scale),
            inputs.data<int64_t>(seeds),   inputs.data<int64_t>(steps),    static_cast<T>(guidance_scale),
            images_of(eps_cond),           elements_per_image(eps_cond)};
  }
};

template <typename Device>
std::tuple<Tensor, Tensor> transition_log_ratio(const Device& device, const TransitionInputs& in) {
  in.check();
  Inputs inputs;
  return sum_per_image(device, in.eps_cond, 1.0, 2.0, [&]<typename T, typename E>(Types<T, E>, T* partials) {
    device.log_ratio(in.arguments<T, E>(inputs), partials);
  });
}

template <typename Device>
std::tuple<Tensor, Tensor> transition_log_ratio_backward(const Device& device, const Tensor& grad_log_ratio, const Tensor& grad_kl,
                                                         const TransitionInputs& in) {
  in.check();
  const ScalarType state = state_type(in.eps_cond), dtype = in.eps_cond.scalar_type();
  check_per_image(grad_log_ratio, in.eps_cond, state, "grad_log_ratio");
  check_per_image(grad_kl, in.eps_cond, state, "grad_kl");
  const bool guided = in.eps_uncond.has_value();
  const Tensor grad_cond = empty_like_in(in.eps_cond, dtype);
  const Tensor grad_uncond = guided ? empty_like_in(in.eps_cond, dtype) : empty_vector(in.eps_cond, 0, dtype);
  with_types(in.eps_cond, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    device.log_ratio_backward(in.arguments<T, E>(inputs),
                              TransitionGradients<T, E>{inputs.data<T>(grad_log_ratio), inputs.data<T>(grad_kl),
                                                        output<E>(grad_cond), guided ? output<E>(grad_uncond) : nullptr});
  });
  return {grad_cond, grad_uncond};
}

template <typename T, typename E>
struct GuideArgs {
  const E *eps_cond, *eps_uncond;
  T* eps;
  T guidance_scale;
  int64_t num_images, per_image;
};

template <typename Device>
Tensor guided_eps(const Device& device, const Tensor& eps_cond, const Tensor& eps_uncond, double guidance_scale) {
  check_like(eps_uncond, eps_cond, eps_cond.scalar_type(), "eps_uncond");
  const Tensor eps = empty_like_in(eps_cond, state_type(eps_cond));
  with_types(eps_cond, [&]<typename T, typename E>(Types<T, E>) {
    Inputs inputs;
    device.guide(GuideArgs<T, E>{inputs.data<E>(eps_cond), inputs.data<E>(eps_uncond), output<T>(eps),
                                 static_cast<T>(guidance_scale), images_of(eps_cond), elements_per_image(eps_cond)});
  });
  return eps;
}

}  // namespace proxt2i
