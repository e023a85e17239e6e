// Schemas of the operators (torch's stable ABI) and the Python module proxt2i._C. The implementations register themselves in
// cpu/ and cuda/; autograd formulas and fake kernels live in Python, in proxt2i/ops/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/math.h"
#include "cpu/isa.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(proxt2i, m) { proxt2i::define_ops(m); }

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = PROXT2I_TORCH_VERSION;
  info["compiler"] = PROXT2I_COMPILER;
  info["cuda_archs"] = PROXT2I_CUDA_ARCHS;
  info["cuda"] = std::string(PROXT2I_CUDA_ARCHS).size() > 0;
  info["cpu_isa"] = proxt2i::isa_name(proxt2i::current_isa());
  info["cpu_isas"] = proxt2i::supported_isas();
  info["cpu_products"] = proxt2i::fast_products();
  return info;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  proxt2i::philox4x32_10(counter.data(), key[0], key[1]);
  return counter;
}

std::array<float, 2> box_muller(uint32_t w0, uint32_t w1) {
  std::array<float, 2> z{};
  proxt2i::box_muller(w0, w1, z[0], z[1]);
  return z;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of proxt2i; importing it registers torch.ops.proxt2i.*";
  m.def("build_info", &build_info, "How this module was built, and the instruction set that its CPU kernels use.");
  m.def("use_cpu_isa", &proxt2i::use_isa, pybind11::arg("name"), "Pick the CPU kernels' instruction set (build_info()['cpu_isas']).");
  m.def("philox4x32_10", &philox, pybind11::arg("counter"), pybind11::arg("key"), "The kernels' Philox4x32-10 on one counter.");
  m.def("box_muller", &box_muller, pybind11::arg("w0"), pybind11::arg("w1"), "The kernels' two normals from two 32-bit words.");
}
