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
}

}  // namespace proxt2i
