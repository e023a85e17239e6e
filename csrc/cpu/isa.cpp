#include "isa.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>

namespace proxt2i {
namespace {

const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
using Isas = std::array<Isa, 4>;

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// On Intel's processors products by vdpbf16ps are slower than those of floats: attention by 1.2 on a Sapphire Rapids. On AMD's Zen 4 they halve its time.
const Isas& best_first() {
  static const bool pairs_are_fast = is_amd();
  static const Isas isas = pairs_are_fast ? Isas{Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::baseline}
                                          : Isas{Isa::avx512, Isa::avx512_bf16, Isa::avx2, Isa::baseline};
  return isas;
}

bool supported(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::avx512_bf16) return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == Isa::baseline;
}

Isa best() {
  return *std::find_if(best_first().begin(), best_first().end(), supported);
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa current_isa() { return current().load(std::memory_order_relaxed); }

// Intel's libraries make the most of Intel's processors: of AMX above all. With AVX2 ours are as fast as theirs on a Zen 4, no faster.
std::vector<std::string> fast_products() {
  if (!is_amd() || current_isa() < Isa::avx512) return {};
  if (current_isa() < Isa::avx512_bf16) return {"float32"};
  return {"float32", "bfloat16"};
}

std::string isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> result;
  for (const Isa isa : best_first()) {
    if (supported(isa)) result.push_back(isa_name(isa));
  }
  return result;
}

void use_isa(const std::string& name) {
  for (const Isa isa : best_first()) {
    if (isa_name(isa) == name && supported(isa)) {
      current().store(isa, std::memory_order_relaxed);
      return;
    }
  }
  throw std::invalid_argument("proxt2i: this machine has no instruction set called '" + name + "'");
}

}  // namespace proxt2i
