// The functions of csrc/cuda/ptx.cuh on the host, with the fragment layouts of the PTX ISA ("Warp level matrix instructions").
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/math.h"
#include "emulator.h"

namespace proxt2i {

namespace emulator {

struct MatrixRow {  // what a lane brings to ldmatrix, and its registers afterwards
  uint16_t row[8] = {};
  uint32_t r[4] = {};
};
struct MmaOperands {
  float* c;
  const uint32_t *a, *b;
};
template <int count, bool transposed>
void load_matrices(Operands lanes);
template <typename T, int depth>
void multiply(Operands lanes);

inline bool is_multiple_of_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <int count, bool transposed>
void ldmatrix(const char* op, const Where& where, uint32_t (&r)[count], const void* row) {
  MatrixRow operand;
  if (lane() < 8 * count) {
    if (!is_multiple_of_16(row)) fail(op, where, "is given a row that is not 16-byte aligned");
    std::memcpy(operand.row, row, sizeof operand.row);
  }
  wait_warp(op, where, 0xffffffff, &operand, load_matrices<count, transposed>);
  std::memcpy(r, operand.r, sizeof r);
}

template <typename T, int depth>
void mma(const char* op, const Where& where, float (&c)[4], const uint32_t* a, const uint32_t* b) {
  MmaOperands operands{c, a, b};
  wait_warp(op, where, 0xffffffff, &operands, multiply<T, depth>);
}

// Rounding to nearest even. NaNs become PTX's canonical one.
inline uint16_t round_to(float x, bfloat16) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to(float x, float16) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and above
  if (magnitude < 0x38800000) {  // below 2^-14: multiples of 2^-24, the spacing of floats at 0.5
    return static_cast<uint16_t>(sign | (float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f)));
  }
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);  // the carry makes infinity of 65520
}

}  // namespace emulator

template <typename T>
uint32_t pack2(float low, float high) {
  return emulator::round_to(low, T{}) | static_cast<uint32_t>(emulator::round_to(high, T{})) << 16;
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, const emulator::Where& where = emulator::Where::current()) {
  emulator::ldmatrix<4, false>("ldmatrix_x4", where, r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, const emulator::Where& where = emulator::Where::current()) {
  emulator::ldmatrix<2, false>("ldmatrix_x2", where, r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, const emulator::Where& where = emulator::Where::current()) {
  emulator::ldmatrix<4, true>("ldmatrix_x4_trans", where, r, row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, const emulator::Where& where = emulator::Where::current()) {
  emulator::ldmatrix<2, true>("ldmatrix_x2_trans", where, r, row);
}

template <typename T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const emulator::Where& where = emulator::Where::current()) {
  emulator::mma<T, 16>("mma_16816", where, c, a, b);
}
template <typename T>
void mma_1688(float (&c)[4], const uint32_t (&a)[2], uint32_t b, const emulator::Where& where = emulator::Where::current()) {
  emulator::mma<T, 8>("mma_1688", where, c, a, &b);
}

// Until the wait, shared memory holds NaNs, so that a missing wait shows.
inline void cp_async_16(void* shared, const void* global, bool valid, const emulator::Where& where = emulator::Where::current()) {
  if (!emulator::is_multiple_of_16(shared)) emulator::fail("cp_async_16", where, "is given a shared address that is not 16-byte aligned");
  if (!emulator::is_multiple_of_16(global)) emulator::fail("cp_async_16", where, "is given a global address that is not 16-byte aligned");
  unsigned char bytes[16] = {};
  if (valid) std::memcpy(bytes, global, sizeof bytes);
  std::memset(shared, 0xff, sizeof bytes);
  emulator::begin_copy(shared, bytes);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int pending>
void cp_async_wait() {
  emulator::finish_copies(pending);
}

}  // namespace proxt2i
