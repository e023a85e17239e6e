// Rounding of a result to the type it is stored in, to nearest even; the counterpart of math.h's widen.
#pragma once

#include "math.h"

namespace proxt2i {

PROXT2I_HD void narrow(float a, float& out) { out = a; }
PROXT2I_HD void narrow(double a, double& out) { out = a; }

PROXT2I_HD void narrow(float a, bfloat16& out) {
  const uint32_t bits = float_bits(a);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out.bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

PROXT2I_HD void narrow(float a, float16& out) {
  // binary16: normal numbers rebias, and the carry of the rounding may run into the exponent; subnormal ones (below 2^-14) are
  // rounded by an addition to 0.5, whose last place is theirs.
  const uint32_t bits = float_bits(a);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - (126u << 23);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7C00u : half;  // 2^16 and above
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

}  // namespace proxt2i
