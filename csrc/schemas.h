// The operators' schemas; csrc/ops.cpp defines them for proxt2i, and the emulator's module for proxt2i_emulated.
#pragma once

namespace proxt2i {

template <typename Library>
void define_ops(Library& m) {
  m.def(
      "prox_step(Tensor y, Tensor eps_cond, Tensor? eps_uncond, Tensor? noise, Tensor? seeds, int step, float guidance_scale, "
      "float sqrt_lam, float a, float b) -> (Tensor, Tensor)");
  m.def("prox(Tensor y, Tensor eps_cond, Tensor? eps_uncond, float guidance_scale, float sqrt_lam) -> Tensor");
  m.def("philox_normal(Tensor seeds, int step, int count) -> Tensor");
  m.def(
      "transition_log_ratio(Tensor eps_cond, Tensor? eps_uncond, Tensor eps_old, Tensor? eps_ref, Tensor? noise, Tensor? seeds, "
      "Tensor? steps, Tensor scale, float guidance_scale) -> (Tensor, Tensor)");
  m.def(
      "transition_log_ratio_backward(Tensor grad_log_ratio, Tensor grad_kl, Tensor eps_cond, Tensor? eps_uncond, Tensor eps_old, "
      "Tensor? eps_ref, Tensor? noise, Tensor? seeds, Tensor? steps, Tensor scale, float guidance_scale) -> (Tensor, Tensor)");
  m.def("guided_eps(Tensor eps_cond, Tensor eps_uncond, float guidance_scale) -> Tensor");
  m.def("noised_pair(Tensor x0, Tensor seeds, Tensor coefficients) -> Tensor");
  m.def(
      "matching_errors(Tensor eps, Tensor? x0, Tensor? y, Tensor seeds, Tensor coefficients, int? draw) -> (Tensor, Tensor)");
  m.def(
      "matching_errors_backward(Tensor grad_mse, Tensor grad_mae, Tensor eps, Tensor? x0, Tensor? y, Tensor seeds, "
      "Tensor coefficients, int? draw) -> Tensor");
}

}  // namespace proxt2i
