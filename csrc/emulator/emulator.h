// CUDA's language and its blocks of threads on the host, so that tests execute the .cu files without a GPU. Of a kernel's launch the
// blocks run one after another, and the threads of a block are coroutines that run until they wait for each other: at a barrier, a
// shuffle, a matrix instruction. What a GPU would leave undefined is an error here where it can be seen (see docs/kernels.md).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static  // blocks run one after another, so one copy is enough; ASan puts red zones around it
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned((bytes) < 64 ? (bytes) : 64)))  // gcc puts no red zones around more than 64
#define __launch_bounds__(...)  // not seen at run time, so not checked

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

inline uint3 threadIdx, blockIdx;  // of the thread that runs; set whenever another one goes on
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace proxt2i::emulator {

using Where = std::source_location;

inline char* shared;  // the block's dynamic shared memory

// Runs `thread` as every thread of every block; throws std::runtime_error where the launch or the threads break CUDA's rules.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
// The order in which warps, and the lanes of a warp, take turns. A result that depends on it lacks a barrier.
void set_reverse_order(bool reverse);
inline bool hopper = false;  // whether the device has wgmma

void wait_block(const char* op, const Where& where);
// The lanes of `mask` meet here, each with an operand; the last to come calls combine on all (null outside the mask).
using Operands = void* const (&)[32];
void wait_warp(const char* op, const Where& where, uint32_t mask, void* operand, void (*combine)(Operands));
[[noreturn]] void fail(const char* op, const Where& where, const char* what);
int lane();

// cp.async: the bytes arrive in the wait that covers the group of the copy.
void begin_copy(void* to, const unsigned char (&bytes)[16]);
void commit_copies();
void finish_copies(int pending);

template <typename T>
struct Shuffle {
  T value, result;
  int source;
};

template <typename T>
T shuffle(const char* op, const Where& where, uint32_t mask, T value, int source) {
  if (source != lane() && (mask >> source & 1) == 0) fail(op, where, "reads a lane that is not in the mask");
  Shuffle<T> operand{value, value, source};
  wait_warp(op, where, mask, &operand, [](Operands lanes) {
    for (void* p : lanes) {
      if (auto* own = static_cast<Shuffle<T>*>(p)) own->result = static_cast<const Shuffle<T>*>(lanes[own->source])->value;
    }
  });
  return operand.result;
}

}  // namespace proxt2i::emulator

namespace proxt2i {

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Args... args) {
  const std::tuple<Params...> params(args...);
  emulator::run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, params); });
}

inline char* dynamic_shared() { return emulator::shared; }

}  // namespace proxt2i

// ---- barriers and the exchange of values within a warp ---------------------------------------------------------------------

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  proxt2i::emulator::wait_block("__syncthreads", where);
}

inline void __syncwarp(uint32_t mask = 0xffffffff, const std::source_location& where = std::source_location::current()) {
  proxt2i::emulator::wait_warp("__syncwarp", where, mask, nullptr, [](proxt2i::emulator::Operands) {});
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, const std::source_location& where = std::source_location::current()) {
  const int lane = proxt2i::emulator::lane();
  return proxt2i::emulator::shuffle("__shfl_sync", where, mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, const std::source_location& where = std::source_location::current()) {
  const int lane = proxt2i::emulator::lane(), last = lane | (width - 1), source = lane ^ bits;
  return proxt2i::emulator::shuffle("__shfl_xor_sync", where, mask, value, source <= last ? source : lane);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   const std::source_location& where = std::source_location::current()) {
  const int lane = proxt2i::emulator::lane(), last = lane | (width - 1), source = lane + static_cast<int>(delta);
  return proxt2i::emulator::shuffle("__shfl_down_sync", where, mask, value, source <= last ? source : lane);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 const std::source_location& where = std::source_location::current()) {
  const int lane = proxt2i::emulator::lane(), first = lane & ~(width - 1), source = lane - static_cast<int>(delta);
  return proxt2i::emulator::shuffle("__shfl_up_sync", where, mask, value, source >= first ? source : lane);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, const std::source_location& where = std::source_location::current()) {
  uint32_t votes = predicate != 0;  // in: this lane's vote; out: those of all
  proxt2i::emulator::wait_warp("__ballot_sync", where, mask, &votes, [](proxt2i::emulator::Operands lanes) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= lanes[i] != nullptr ? *static_cast<uint32_t*>(lanes[i]) << i : 0;
    for (void* p : lanes) {
      if (p != nullptr) *static_cast<uint32_t*>(p) = all;
    }
  });
  return votes;
}
inline int __any_sync(uint32_t mask, int predicate, const std::source_location& where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, const std::source_location& where = std::source_location::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}

// ---- functions of CUDA's device library; the fast ones are no less exact here ----------------------------------------------

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
