// Choice of the instruction set at run time. The kernels are compiled once for each set with target attributes and picked by
// hand: target_clones cannot say "avx2 and fma" together, and a clone without fma would call libm for every one of ours.
#pragma once

#include <string>
#include <vector>

namespace proxt2i {

// avx512_bf16 is avx512 for everything but the products of attention on bfloat16; which of the two is better depends on the processor.
enum class Isa { baseline, avx2, avx512, avx512_bf16 };

Isa current_isa();
std::vector<std::string> supported_isas();  // best first
std::string isa_name(Isa isa);
std::vector<std::string> fast_products();      // types whose products in linear layers are faster than torch's on this machine with the current set
void use_isa(const std::string& name);      // std::invalid_argument for a name that this machine does not support

}  // namespace proxt2i
