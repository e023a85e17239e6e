// Instructions of sm_90a, one function each: products by a warp group (four warps) of matrices in shared memory. PTX ISA, "Asynchronous
// Warpgroup Level Matrix Instructions"; csrc/emulator/hopper.h has the same functions on the host.
#pragma once

#include "ptx.cuh"

namespace proxt2i {

// A matrix in shared memory without swizzling is made of cores, 8 rows of 16 bytes one after another. Bytes from core to core:
//     K-major (an element's neighbour in memory is the next in depth):  leading along the depth, stride along the rows;
//     MN-major (it is the next column):                                 leading along the depth, stride along the columns.
__host__ __device__ constexpr uint64_t matrix_strides(int leading, int stride) {
  return static_cast<uint64_t>(leading / 16) << 16 | static_cast<uint64_t>(stride / 16) << 32;
}

// The matrix that lies `bytes`, a multiple of 16, after this one.
__host__ __device__ constexpr uint64_t matrix_after(uint64_t matrix, int bytes) {
  return (matrix & 0xFFFFFFFF00000000) | (static_cast<uint32_t>(matrix) + static_cast<uint32_t>(bytes / 16));
}

}  // namespace proxt2i

#if defined(PROXT2I_EMULATE)
#include "../emulator/hopper.h"
#else

namespace proxt2i {

__device__ __forceinline__ uint64_t matrix_at(const void* start, uint64_t strides) {
  return strides | (shared_address(start) & 0x3FFFF) >> 4;
}

// What this thread has written to shared memory, by copies too, is seen by the products after the next barrier.
__device__ __forceinline__ void fence_shared_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product, and after registers of one were changed.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products begun since the last commit become a group.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` groups are still under way; c belongs to one that then is not.
template <int pending, int N>
__device__ __forceinline__ void products_wait(float (&c)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#pragma unroll
  for (int n = 0; n < N; ++n) {  // nothing that reads c may be moved before the wait
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
  }
}

// The same, and a, read by products that then are over, stays in its registers until here.
template <int pending, int N, int K>
__device__ __forceinline__ void products_wait(float (&c)[N][4], uint32_t (&a)[K][4]) {
  products_wait<pending>(c);
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[k][i])::"memory");
  }
}

// 2^x with a relative error of 2^-22; 0 for x = -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// wgmma_shared:     c = a b^T, or c += a b^T, a 64 x 16 and b N x 16, both K-major in shared memory.
// wgmma_registers:  c += a b, a 64 x 16 in registers (a warp's 16 rows as in mma_16816), b 16 x N, MN-major in shared memory.
// c, 64 x N: a warp's 16 rows as in tiles.cuh.
template <typename T, int N>
struct Wgmma;

#define PROXT2I_WGMMA_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PROXT2I_WGMMA_72 PROXT2I_WGMMA_64 ", %32, %33, %34, %35"
#define PROXT2I_WGMMA_80 PROXT2I_WGMMA_72 ", %36, %37, %38, %39"
#define PROXT2I_WGMMA_96 PROXT2I_WGMMA_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PROXT2I_WGMMA_128 PROXT2I_WGMMA_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PROXT2I_C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define PROXT2I_C16(n) PROXT2I_C4(n), PROXT2I_C4(n + 1), PROXT2I_C4(n + 2), PROXT2I_C4(n + 3)
#define PROXT2I_C64 PROXT2I_C16(0), PROXT2I_C16(4)
#define PROXT2I_C72 PROXT2I_C64, PROXT2I_C4(8)
#define PROXT2I_C80 PROXT2I_C72, PROXT2I_C4(9)
#define PROXT2I_C96 PROXT2I_C64, PROXT2I_C16(8)
#define PROXT2I_C128 PROXT2I_C96, PROXT2I_C16(12)

// p0 ... p4: the numbers of the operands after c's.
#define PROXT2I_WGMMA(T, type, N, p0, p1, p2, p3, p4)                                                                                     \
  template <>                                                                                                                             \
  struct Wgmma<T, N> {                                                                                                                    \
    static __device__ __forceinline__ void shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add) {                               \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " p2 ", 0;"                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" PROXT2I_WGMMA_##N "}, " p0 ", " p1                \
                   ", add, 1, 1, 0, 0;}"                                                                                                  \
                   : PROXT2I_C##N : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                          \
    }                                                                                                                                     \
    static __device__ __forceinline__ void registers(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {                          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" PROXT2I_WGMMA_##N "}, {" p0 ", " p1 ", " p2       \
                   ", " p3 "}, " p4 ", 1, 1, 1, 1;"                                                                                       \
                   : PROXT2I_C##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                  \
    }                                                                                                                                     \
  };
#define PROXT2I_WGMMA_TYPES(N, p0, p1, p2, p3, p4)                \
  PROXT2I_WGMMA(bfloat16, "bf16", N, p0, p1, p2, p3, p4)          \
  PROXT2I_WGMMA(float16, "f16", N, p0, p1, p2, p3, p4)
PROXT2I_WGMMA_TYPES(64, "%32", "%33", "%34", "%35", "%36")
PROXT2I_WGMMA_TYPES(72, "%36", "%37", "%38", "%39", "%40")
PROXT2I_WGMMA_TYPES(80, "%40", "%41", "%42", "%43", "%44")
PROXT2I_WGMMA_TYPES(96, "%48", "%49", "%50", "%51", "%52")
PROXT2I_WGMMA_TYPES(128, "%64", "%65", "%66", "%67", "%68")

template <typename T, int N>
__device__ __forceinline__ void wgmma_shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool add) {
  Wgmma<T, N>::shared(c, a, b, add);
}
template <typename T, int N>
__device__ __forceinline__ void wgmma_registers(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {
  Wgmma<T, N>::registers(c, a, b);
}

}  // namespace proxt2i

#endif
