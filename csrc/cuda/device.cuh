// All that our kernels take from CUDA, in one place: launches, the stream, registration. Kernels themselves are plain CUDA C++; tensor
// core instructions are behind the functions of ptx.cuh. With PROXT2I_EMULATE the host compiler builds the same .cu files against
// csrc/emulator, which runs a block's threads as coroutines, so that kernels are executed by the tests on machines without a GPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#if defined(PROXT2I_EMULATE)

#include "../emulator/emulator.h"
#define PROXT2I_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(proxt2i_emulated, CPU, m)

namespace proxt2i {

// The tensors of the emulated operators lie on the CPU; one stream, no other device.
struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
  bool is_hopper() const { return emulator::hopper; }
  cudaStream_t stream = nullptr;
};

}  // namespace proxt2i

#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#define PROXT2I_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(proxt2i, CUDA, m)

namespace proxt2i {

// Makes the tensor's device current while it lives; `stream` is torch's current stream there.
struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current) == AOTI_TORCH_SUCCESS, "no current CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }
  // Compute capability 9.0, in a build for sm_90a: kernels may use instructions that nothing else has.
  bool is_hopper() const {
#if !defined(PROXT2I_SM90A)
    return false;
#else
    int device = 0, major = 0, minor = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return major == 9 && minor == 0;
#endif
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

// kernel<<<grid, block, shared_bytes, stream>>>(args...), checked. shared_bytes: dynamic shared memory, above 48 KiB too.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
  if (shared_bytes > 48 * 1024) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The block's dynamic shared memory, 128-byte aligned.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char proxt2i_dynamic_shared[];
  return proxt2i_dynamic_shared;
}

}  // namespace proxt2i

#endif

namespace proxt2i {

constexpr int64_t max_grid_x = 4096;  // further blocks of an image are reached by striding
constexpr int64_t max_grid_y = 65535;

template <typename T>
struct alignas(4 * sizeof(T)) Vec4 {
  T v[4];
};

template <typename T>
inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Vec4<T>) == 0;
}

// Elements first ... first + count - 1 of a row; the vector path needs count == 4 and alignment.
template <bool aligned, typename T>
__device__ __forceinline__ Vec4<T> load4(const T* row, int64_t first, int count) {
  if constexpr (aligned) {
    return *reinterpret_cast<const Vec4<T>*>(row + first);
  } else {
    Vec4<T> result{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) result.v[i] = row[first + i];  // no index that only the running program knows: the vector stays in registers
    }
    return result;
  }
}

template <bool aligned, typename T>
__device__ __forceinline__ void store4(T* row, int64_t first, int count, const Vec4<T>& value) {
  if constexpr (aligned) {
    *reinterpret_cast<Vec4<T>*>(row + first) = value;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) row[first + i] = value.v[i];
    }
  }
}

}  // namespace proxt2i
