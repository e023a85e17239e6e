// The Python module _emulated, for tests alone: torch.ops.proxt2i_emulated.*, the CUDA kernels on CPU tensors.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "../schemas.h"
#include "emulator.h"

STABLE_TORCH_LIBRARY(proxt2i_emulated, m) { proxt2i::define_ops(m); }

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels of proxt2i run by the emulator; importing it registers torch.ops.proxt2i_emulated.*";
  m.def("set_reverse_order", &proxt2i::emulator::set_reverse_order, pybind11::arg("reverse"),
        "Whether the blocks, warps and lanes take turns from the last to the first.");
  m.def("set_hopper", [](bool hopper) { proxt2i::emulator::hopper = hopper; }, pybind11::arg("hopper"),
        "Whether the device is one of compute capability 9.0, which kernels with wgmma need.");
}
