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
  m.def("philox_normal(Tensor seeds, int step, int count) -> Tensor");
}

}  // namespace proxt2i
