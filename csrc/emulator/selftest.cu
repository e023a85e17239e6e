// Kernels that test the emulator: what each collective does, and each mistake that it must notice. torch.ops.proxt2i_selftest.* of the
// emulated module; nvcc compiles them too, so that the emulator and CUDA agree on the language.
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/math.h"
#include "../cuda/device.cuh"
#include "../cuda/hopper.cuh"

namespace proxt2i {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// ---- ptx.cuh ---------------------------------------------------------------------------------------------------------------

// One warp; a [32][depth / 4], b [32][depth / 8] and c [32][4] are the lanes' registers.
template <typename T, int depth>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = threadIdx.x;
  float own[4];
  for (int i = 0; i < 4; ++i) own[i] = c[4 * lane + i];
  if constexpr (depth == 16) {
    uint32_t own_a[4], own_b[2];
    for (int i = 0; i < 4; ++i) own_a[i] = a[4 * lane + i];
    for (int i = 0; i < 2; ++i) own_b[i] = b[2 * lane + i];
    mma_16816<T>(own, own_a, own_b);
  } else {
    const uint32_t own_a[2] = {a[2 * lane], a[2 * lane + 1]};
    mma_1688<T>(own, own_a, b[lane]);
  }
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = own[i];
}

void mma(const Tensor& a, const Tensor& b, const Tensor& c, int64_t depth, bool bf16) {
  const OnDeviceOf device(a);
  const auto kernel = depth == 16 ? (bf16 ? mma_kernel<bfloat16, 16> : mma_kernel<float16, 16>)
                                  : (bf16 ? mma_kernel<bfloat16, 8> : mma_kernel<float16, 8>);
  launch(kernel, 1, 32, 0, device.stream, data<uint32_t>(a), data<uint32_t>(b), data<float>(c));
}

// Shared memory is filled with `words`; lane i gives the row at byte offsets[i].
__global__ void ldmatrix_kernel(const uint32_t* words, int count, const int32_t* offsets, uint32_t* out, int kind) {
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int lane = threadIdx.x;
  for (int i = lane; i < count; i += 32) shared[i] = words[i];
  __syncthreads();
  const char* row = dynamic_shared() + offsets[lane];
  uint32_t r[4] = {}, two[2] = {};
  if (kind == 0) ldmatrix_x4(r, row);
  if (kind == 1) ldmatrix_x4_trans(r, row);
  if (kind == 2) ldmatrix_x2(two, row);
  if (kind == 3) ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = kind < 2 ? r[i] : i < 2 ? two[i] : 0;
}

Tensor ldmatrix(const Tensor& words, const Tensor& offsets, int64_t kind) {
  const OnDeviceOf device(words);
  const Tensor out = empty(words, {32, 4}, ScalarType::Int);
  launch(ldmatrix_kernel, 1, 32, 4 * words.numel(), device.stream, data<uint32_t>(words), static_cast<int>(words.numel()),
         data<int32_t>(offsets), data<uint32_t>(out), static_cast<int>(kind));
  return out;
}

template <typename T>
__global__ void pack2_kernel(const float* low, const float* high, uint32_t* out, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) out[i] = pack2<T>(low[i], high[i]);
}

Tensor pack2_floats(const Tensor& low, const Tensor& high, bool bf16) {
  const OnDeviceOf device(low);
  const Tensor out = empty(low, {low.numel()}, ScalarType::Int);
  launch(bf16 ? pack2_kernel<bfloat16> : pack2_kernel<float16>, static_cast<unsigned>((low.numel() + 255) / 256), 256, 0, device.stream,
         data<float>(low), data<float>(high), data<uint32_t>(out), low.numel());
  return out;
}

// Each lane copies its 4 words in two groups, the words of out[0] and out[1], of which the first `valid` exist; `pending` of the
// groups (2: no wait at all) may be under way when out is written.
__global__ void cp_async_kernel(const uint32_t* words, int valid, int pending, uint32_t* out, int shift) {
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int first = 4 * threadIdx.x;
  cp_async_16(shared + first, words + shift + first, first < valid);
  cp_async_commit();
  cp_async_16(shared + 128 + first, words + shift + 128 + first, 128 + first < valid);
  cp_async_commit();
  if (pending == 0) cp_async_wait<0>();
  if (pending == 1) cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) {
    out[first + i] = shared[first + i];
    out[128 + first + i] = shared[128 + first + i];
  }
}

Tensor cp_async(const Tensor& words, int64_t valid, int64_t pending, int64_t shift) {
  const OnDeviceOf device(words);
  const Tensor out = empty(words, {2, 128}, ScalarType::Int);
  launch(cp_async_kernel, 1, 32, 1024, device.stream, data<uint32_t>(words), static_cast<int>(valid), static_cast<int>(pending),
         data<uint32_t>(out), static_cast<int>(shift));
  return out;
}

// One warp group, N = 72. b, and a unless a_registers [128][4] are given, lie in shared memory, filled with `words`, at the byte offsets;
// leading, stride: the two distances between cores, of a and of b. c [128][36].
template <typename T>
__global__ void wgmma_kernel(const uint32_t* words, int count, const uint32_t* a_registers, int a_at, int a_leading, int a_stride, int b_at,
                             int b_leading, int b_stride, bool add, float* c) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PROXT2I_EMULATE)
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int thread = threadIdx.x;
  for (int i = thread; i < count; i += 128) shared[i] = words[i];
  float own[9][4];
  for (int i = 0; i < 36; ++i) own[i / 4][i % 4] = c[36 * thread + i];
  fence_shared_for_products();
  __syncthreads();
  const uint64_t b = matrix_at(dynamic_shared() + b_at, matrix_strides(b_leading, b_stride));
  products_begin();
  if (a_registers == nullptr) {
    wgmma_shared<T, 72>(own, matrix_at(dynamic_shared() + a_at, matrix_strides(a_leading, a_stride)), b, add);
  } else {
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = a_registers[4 * thread + i];
    wgmma_registers<T, 72>(own, a, b);
  }
  products_commit();
  products_wait<0>(own);
  for (int i = 0; i < 36; ++i) c[36 * thread + i] = own[i / 4][i % 4];
#endif
}

void wgmma(const Tensor& words, const std::optional<Tensor>& a, std::vector<int64_t> places, bool add, bool bf16, const Tensor& c) {
  const OnDeviceOf device(words);
  const auto at = [&](size_t i) { return static_cast<int>(places[i]); };
  launch(bf16 ? wgmma_kernel<bfloat16> : wgmma_kernel<float16>, 1, 128, 4 * words.numel(), device.stream, data<uint32_t>(words),
         static_cast<int>(words.numel()), a.has_value() ? data<uint32_t>(*a) : nullptr, at(0), at(1), at(2), at(3), at(4), at(5), add,
         data<float>(c));
}

// ---- warps and blocks ------------------------------------------------------------------------------------------------------

__global__ void shuffle_kernel(const int32_t* values, int32_t* out, int kind, int argument, int width) {
  const int lane = threadIdx.x;
  const int32_t own = values[lane];
  if (kind == 0) out[lane] = __shfl_sync(0xffffffff, own, argument, width);
  if (kind == 1) out[lane] = __shfl_xor_sync(0xffffffff, own, argument, width);
  if (kind == 2) out[lane] = __shfl_down_sync(0xffffffff, own, argument, width);
  if (kind == 3) out[lane] = __shfl_up_sync(0xffffffff, own, argument, width);
  if (kind == 4) out[lane] = static_cast<int32_t>(__ballot_sync(0xffffffff, own > 0));
  if (kind == 5) out[lane] = __any_sync(0xffffffff, own > argument);
  if (kind == 6 && lane < 16) out[lane] = __shfl_xor_sync(0xffff, own, argument, width);  // the halves meet at different places
  if (kind == 6 && lane >= 16) out[lane] = __shfl_xor_sync(0xffff0000, own, argument, width);
}

Tensor shuffle(const Tensor& values, int64_t kind, int64_t argument, int64_t width) {
  const OnDeviceOf device(values);
  const Tensor out = empty(values, {32}, ScalarType::Int);
  launch(shuffle_kernel, 1, 32, 0, device.stream, data<int32_t>(values), data<int32_t>(out), static_cast<int>(kind),
         static_cast<int>(argument), static_cast<int>(width));
  return out;
}

// out[block] = the sum of the block's elements of x, each thread's by shuffles, the warps' through shared memory.
__global__ void __launch_bounds__(1024) sums_kernel(const float* x, float* out, bool barrier) {
  __shared__ float sums[32];
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x), threads = static_cast<int>(blockDim.x * blockDim.y);
  float sum = x[static_cast<int64_t>(blockIdx.x) * threads + thread];
#pragma unroll
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  if (barrier) __syncthreads();
  if (thread == 0 || thread == threads - 1) {
    float total = 0;
    for (int i = 0; i < threads / 32; ++i) total += sums[i];
    if (thread == 0) out[2 * blockIdx.x] = total;
    if (thread == threads - 1) out[2 * blockIdx.x + 1] = total;
  }
  if (barrier) __syncthreads();
  if (thread % 32 == 0) sums[thread / 32] = -1e6f;
}

// [blocks, 2]: each block's sum as its first and its last thread saw it; x [blocks, threads].
Tensor sums(const Tensor& x, int64_t threads_y, bool barrier) {
  const OnDeviceOf device(x);
  const Tensor out = empty(x, {x.size(0), 2}, ScalarType::Float);
  const dim3 block(static_cast<unsigned>(x.size(1) / threads_y), static_cast<unsigned>(threads_y));
  launch(sums_kernel, static_cast<unsigned>(x.size(0)), block, 0, device.stream, data<float>(x), data<float>(out), barrier);
  return out;
}

// ---- mistakes --------------------------------------------------------------------------------------------------------------

enum Mistake {
  none,
  exit_before_barrier,
  barrier_against_shuffle,
  two_barriers,
  shuffle_against_mma,
  two_shuffles,
  lane_missing,
  lane_exited,
  own_lane_missing,
  source_not_in_mask,
  different_masks,
  shared_overflow,
  static_shared_overflow,
  static_template_shared_overflow,
  global_overflow,
  global_write_overflow,
  misaligned_vector,
  read_unwritten_shared,
  misaligned_copy,
  local_overflow,
  aligned_static_shared_overflow,
};

__device__ int static_overflow(int i) {
  __shared__ int words[8];
  words[i] = i;
  return words[i];
}

template <typename T>
__device__ T static_template_overflow(int i) {
  __shared__ T words[8];
  words[i] = static_cast<T>(i);
  return words[i];
}

__device__ int aligned_static_overflow(int i) {
  __shared__ __align__(128) int words[40];
  int* const p = words;
  p[i] = i;
  return p[i];
}

__global__ void mistake_kernel(int32_t* x, int count, int what, int shared_words) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* shared = reinterpret_cast<int32_t*>(dynamic_shared());
  int32_t value = thread;
  switch (what) {
    case exit_before_barrier:
      if (thread == 3) return;
      __syncthreads();
      break;
    case barrier_against_shuffle:
      if (thread < 32) {
        __syncthreads();
      } else {
        value = __shfl_sync(0xffffffff, value, 0);
        if (thread == 40) __syncwarp();
      }
      break;
    case two_barriers:
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case shuffle_against_mma:
      if (thread % 2 == 0) {
        value = __shfl_sync(0xffffffff, value, 0);
      } else {
        float c[4] = {};
        const uint32_t a[2] = {};
        mma_1688<bfloat16>(c, a, 0);
        value = static_cast<int32_t>(c[0]);
      }
      break;
    case two_shuffles:
      value = thread < 7 ? __shfl_sync(0xffffffff, value, 0) : __shfl_sync(0xffffffff, value, 0);
      break;
    case lane_missing:  // blocks of, say, 40 threads
      value = __shfl_xor_sync(0xffffffff, value, 1);
      break;
    case lane_exited:
      if (thread == 5) return;
      value = __shfl_xor_sync(0xffffffff, value, 1);
      break;
    case own_lane_missing:
      value = __shfl_sync(0xfffffffe, value, 1);
      break;
    case source_not_in_mask:
      if (thread < 16) value = __shfl_xor_sync(0x0000ffff, value, 16);
      break;
    case different_masks:
      value = __shfl_xor_sync(thread < 16 ? 0x0000ffff : 0xffffffff, value, 1);
      break;
    // Just behind the end, whichever thread comes first: further on another allocation may lie, live or freed.
    case shared_overflow:
      shared[shared_words + thread % 2] = 1;
      break;
    case static_shared_overflow:
      value = static_overflow(thread);
      break;
    case static_template_shared_overflow:
      value = static_template_overflow<int>(thread);
      break;
    case global_overflow:
      value = x[count + thread % 2];
      break;
    case global_write_overflow:
      x[count + thread % 2] = 1;
      break;
    case misaligned_vector:
      value = static_cast<int32_t>(load4<true>(x + 1, 0, 4).v[0]);
      break;
    case read_unwritten_shared:
      value = shared[thread];
      break;
    case misaligned_copy:
      cp_async_16(shared + 1, x, true);
      break;
    case local_overflow: {
      int32_t local[8] = {};
      int32_t* const p = local;
      p[thread % 9] = thread;
      for (int i = 0; i < 8; ++i) value += p[i];
      break;
    }
    case aligned_static_shared_overflow:
      value = aligned_static_overflow(thread);
      break;
    default:
      break;
  }
  if (thread < count) x[thread] = value;
}

void mistake(const Tensor& x, int64_t what, std::vector<int64_t> grid, std::vector<int64_t> block, int64_t shared_bytes) {
  const OnDeviceOf device(x);
  const auto size = [](const std::vector<int64_t>& n) {
    return dim3(static_cast<unsigned>(n[0]), static_cast<unsigned>(n[1]), static_cast<unsigned>(n[2]));
  };
  launch(mistake_kernel, size(grid), size(block), static_cast<size_t>(shared_bytes), device.stream, data<int32_t>(x),
         static_cast<int>(x.numel()), static_cast<int>(what), static_cast<int>(shared_bytes / 4));
}

}  // namespace
}  // namespace proxt2i

STABLE_TORCH_LIBRARY(proxt2i_selftest, m) {
  m.def("mma(Tensor a, Tensor b, Tensor(a!) c, int depth, bool bf16) -> ()");
  m.def("ldmatrix(Tensor words, Tensor offsets, int kind) -> Tensor");
  m.def("pack2(Tensor low, Tensor high, bool bf16) -> Tensor");
  m.def("cp_async(Tensor words, int valid, int pending, int shift) -> Tensor");
  m.def("wgmma(Tensor words, Tensor? a, int[] places, bool add, bool bf16, Tensor(a!) c) -> ()");
  m.def("shuffle(Tensor values, int kind, int argument, int width) -> Tensor");
  m.def("sums(Tensor x, int threads_y, bool barrier) -> Tensor");
  m.def("mistake(Tensor(a!) x, int what, int[] grid, int[] block, int shared_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(proxt2i_selftest, CompositeExplicitAutograd, m) {
  m.impl("mma", TORCH_BOX(&proxt2i::mma));
  m.impl("ldmatrix", TORCH_BOX(&proxt2i::ldmatrix));
  m.impl("pack2", TORCH_BOX(&proxt2i::pack2_floats));
  m.impl("cp_async", TORCH_BOX(&proxt2i::cp_async));
  m.impl("wgmma", TORCH_BOX(&proxt2i::wgmma));
  m.impl("shuffle", TORCH_BOX(&proxt2i::shuffle));
  m.impl("sums", TORCH_BOX(&proxt2i::sums));
  m.impl("mistake", TORCH_BOX(&proxt2i::mistake));
}
