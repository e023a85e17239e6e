// The functions of csrc/cuda/hopper.cuh on the host, warp by warp: matrices are read where their descriptors say (PTX ISA, "Matrix
// Descriptor Format"), when the instruction is issued. A wait or fence that is missing is not noticed.
#pragma once

#include "ptx.h"

namespace proxt2i {

namespace emulator {

struct WgmmaOperands {
  float* c;
  const uint32_t* a;  // null: from shared memory
  uint64_t a_matrix, b_matrix;
  bool add;
};

// Element (row, depth) of a matrix; `row` counts the columns of an MN-major one.
template <typename T>
float element(uint64_t matrix, int row, int depth, bool mn_major) {
  const auto field = [&](int first) { return static_cast<int>(matrix >> first & 0x3FFF) * 16; };
  const int start = field(0), leading = field(16), stride = field(32);
  const int at = mn_major ? depth / 8 * leading + row / 8 * stride + depth % 8 * 16 + row % 8 * 2
                          : depth / 8 * leading + row / 8 * stride + row % 8 * 16 + depth % 8 * 2;
  uint16_t bits;
  std::memcpy(&bits, shared + start + at, sizeof bits);
  return widen(T{bits});
}

template <typename T, int N>
void wgmma(Operands lanes) {
  const auto& first = *static_cast<const WgmmaOperands*>(lanes[0]);
  float a[16][16], b[16][N];
  for (int depth = 0; depth < 16; ++depth) {
    for (int column = 0; column < N; ++column) b[depth][column] = element<T>(first.b_matrix, column, depth, first.a != nullptr);
    for (int row = 0; row < 16; ++row) {
      if (first.a == nullptr) {
        a[row][depth] = element<T>(first.a_matrix, static_cast<int>(threadIdx.x / 32 % 4) * 16 + row, depth, false);
      } else {  // the fragment of mma.m16n8k16
        const auto& own = *static_cast<const WgmmaOperands*>(lanes[row % 8 * 4 + depth % 8 / 2]);
        a[row][depth] = widen(T{static_cast<uint16_t>(own.a[row / 8 + 2 * (depth / 8)] >> 16 * (depth % 2))});
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const WgmmaOperands*>(lanes[lane]);
    for (int i = 0; i < N / 2; ++i) {
      const int row = lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      float sum = own.add ? own.c[i] : 0;
      for (int depth = 0; depth < 16; ++depth) sum += a[row][depth] * b[depth][column];
      own.c[i] = sum;
    }
  }
}

template <typename T, int N>
void wgmma(const char* op, const Where& where, WgmmaOperands operands) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  if (blockDim.x % 128 != 0) fail(op, where, "needs blocks of whole warp groups, 128 threads");
  wait_warp(op, where, 0xffffffff, &operands, wgmma<T, N>);
}

}  // namespace emulator

inline uint64_t matrix_at(const void* start, uint64_t strides, const emulator::Where& where = emulator::Where::current()) {
  const auto offset = static_cast<const char*>(start) - emulator::shared;
  if (offset % 16 != 0 || offset < 0 || offset >= 1 << 18) emulator::fail("matrix_at", where, "is given no 16-byte aligned place in shared memory");
  return strides | static_cast<uint64_t>(offset / 16);
}

inline void fence_shared_for_products() {}
inline void products_begin() {}
inline void products_commit() {}
template <int pending, int N>
void products_wait(float (&)[N][4]) {}
template <int pending, int N, int K>
void products_wait(float (&)[N][4], uint32_t (&)[K][4]) {}
inline float exp2_fast(float x) { return std::exp2(x); }

template <typename T, int N>
void wgmma_shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add, const emulator::Where& where = emulator::Where::current()) {
  emulator::wgmma<T, N>("wgmma_shared", where, {&c[0][0], nullptr, a, b, add});
}
template <typename T, int N>
void wgmma_registers(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, const emulator::Where& where = emulator::Where::current()) {
  emulator::wgmma<T, N>("wgmma_registers", where, {&c[0][0], a, 0, b, true});
}

}  // namespace proxt2i
