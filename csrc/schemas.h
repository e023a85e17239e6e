// The operators' schemas; csrc/ops.cpp defines them for proxt2i, and the emulator's module for proxt2i_emulated.
#pragma once

namespace proxt2i {

template <typename Library>
void define_ops(Library& m) {
  m.def(
      "prox_step(Tensor y, Tensor eps_cond, Tensor? eps_uncond, Tensor? clean, Tensor? noise, Tensor? seeds, Tensor coefficients, "
      "bool want_x, bool want_next, bool want_clean) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_forward(Tensor qkv, Tensor? key_lengths, Tensor? q_weight, Tensor? k_weight, int num_queries, float scale, "
      "float norm_eps) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor? key_lengths, Tensor? q_weight, Tensor? k_weight, "
      "float scale, float norm_eps) -> (Tensor, Tensor, Tensor)");
  m.def("qkv_norm(Tensor qkv, Tensor q_weight, Tensor k_weight, float norm_eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "qkv_norm_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv, Tensor q_weight, Tensor k_weight, float norm_eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("gelu(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("linear(Tensor x, Tensor? skip, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor? skip, Tensor weight, bool has_bias, bool wants_x, bool wants_weight) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("orthogonalize(Tensor x, float a, float b, float c, int rounds, float scale) -> Tensor");
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
