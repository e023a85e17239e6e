// Kernels that visit every element, and kernels that sum over each image in the order of common/reduce.h. Each is given a functor with
// num_images, per_image, its number type T, and a __device__ member that works on `count` (1 to 4) neighbours: a Philox block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/reduce.h"
#include "device.cuh"

namespace proxt2i {

constexpr int element_threads = 256;
constexpr int warp_size = 32;
constexpr int warp_elements = 4 * warp_size;
constexpr unsigned all_lanes = 0xFFFFFFFFu;
static_assert(chunk_size == 4 * warp_elements && sum_lanes == warp_size, "a warp sums a chunk in four rows, and then the chunks");

inline dim3 element_grid(int64_t num_images, int64_t units, int64_t units_per_block) {
  const int64_t x = std::min(max_grid_x, (units + units_per_block - 1) / units_per_block);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::min(max_grid_y, num_images)));
}

// f.template run<aligned>(image, first, count)
template <bool aligned, typename F>
__global__ void __launch_bounds__(element_threads, 4) element_kernel(const F f) {
  const int64_t num_blocks = (f.per_image + 3) / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t image = blockIdx.y; image < f.num_images; image += gridDim.y) {
    for (int64_t block = start; block < num_blocks; block += stride) {
      const int64_t left = f.per_image - 4 * block;
      f.template run<aligned>(image, 4 * block, left < 4 ? static_cast<int>(left) : 4);
    }
  }
}

template <typename F>
void for_elements(const F& f, bool aligned, cudaStream_t stream) {
  if (f.num_images * f.per_image == 0) return;
  const dim3 grid = element_grid(f.num_images, (f.per_image + 3) / 4, element_threads);
  if (aligned && f.per_image % 4 == 0) {
    launch(element_kernel<true, F>, grid, element_threads, 0, stream, f);
  } else {
    launch(element_kernel<false, F>, grid, element_threads, 0, stream, f);
  }
}

template <typename T>
__device__ __forceinline__ Vec4<T> operator+(const Vec4<T>& a, const Vec4<T>& b) {
  return {a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]};
}

// The last seven halvings of a chunk, of which lane l holds elements 4 l ... 4 l + 3 of 128.
template <typename T>
__device__ __forceinline__ T warp_sum(const Vec4<T>& of_lane) {
  Vec4<T> terms = of_lane;
  for (int distance = warp_size / 2; distance > 0; distance /= 2) {
    for (int i = 0; i < 4; ++i) terms.v[i] += __shfl_xor_sync(all_lanes, terms.v[i], distance);
  }
  return (terms.v[0] + terms.v[2]) + (terms.v[1] + terms.v[3]);
}

// Elements past the image's end add nothing.
template <typename T>
__device__ __forceinline__ void clear_from(int count, Vec4<T>& terms) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= count) terms.v[i] = 0;
  }
}

// f.template terms<aligned>(image, first, count, Vec4& first_terms, Vec4& second_terms) sets both for four elements, of which `count`
// exist. A warp takes a chunk.
template <bool aligned, typename F, typename T>
__global__ void __launch_bounds__(element_threads, 2) partial_sums_kernel(const F f, T* partials) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int64_t num_chunks = chunks_in(f.per_image);
  const int64_t warps = blockDim.x / warp_size;
  const int64_t stride = gridDim.x * warps;
  const int64_t start = blockIdx.x * warps + threadIdx.x / warp_size;
  for (int64_t image = blockIdx.y; image < f.num_images; image += gridDim.y) {
    for (int64_t chunk = start; chunk < num_chunks; chunk += stride) {
      Vec4<T> first_terms[4] = {}, second_terms[4] = {};
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        const int64_t first = chunk * chunk_size + row * warp_elements + 4 * lane;
        const int64_t left = f.per_image - first;
        if (left <= 0) continue;
        const int count = left < 4 ? static_cast<int>(left) : 4;
        f.template terms<aligned>(image, first, count, first_terms[row], second_terms[row]);
        clear_from(count, first_terms[row]);
        clear_from(count, second_terms[row]);
      }
      const T first_sum = warp_sum((first_terms[0] + first_terms[2]) + (first_terms[1] + first_terms[3]));
      const T second_sum = warp_sum((second_terms[0] + second_terms[2]) + (second_terms[1] + second_terms[3]));
      if (lane == 0) {
        T* partial = partials + 2 * (image * num_chunks + chunk);
        partial[0] = first_sum;
        partial[1] = second_sum;
      }
    }
  }
}

template <typename F, typename T>
void partial_sums(const F& f, bool aligned, T* partials, cudaStream_t stream) {
  if (f.num_images * f.per_image == 0) return;
  const dim3 grid = element_grid(f.num_images, chunks_in(f.per_image), element_threads / warp_size);
  if (aligned && f.per_image % 4 == 0) {
    launch(partial_sums_kernel<true, F, T>, grid, element_threads, 0, stream, f, partials);
  } else {
    launch(partial_sums_kernel<false, F, T>, grid, element_threads, 0, stream, f, partials);
  }
}

__device__ __forceinline__ double lanes_sum(double value) {
  for (int distance = sum_lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(all_lanes, value, distance);
  return value;
}

// A warp, which is a block, takes an image.
template <typename T>
__global__ void __launch_bounds__(sum_lanes) sum_kernel(const SumArgs<T> args) {
  for (int64_t image = blockIdx.x; image < args.num_images; image += gridDim.x) {
    const T* row = args.partials + 2 * args.num_chunks * image;
    double first = 0, second = 0;
    for (int64_t chunk = threadIdx.x; chunk < args.num_chunks; chunk += sum_lanes) {
      first += static_cast<double>(row[2 * chunk]);
      second += static_cast<double>(row[2 * chunk + 1]);
    }
    first = lanes_sum(first);
    second = lanes_sum(second);
    if (threadIdx.x == 0) {
      args.first[image] = static_cast<T>(first / args.first_divisor);
      args.second[image] = static_cast<T>(second / args.second_divisor);
    }
  }
}

template <typename T>
void sum_partials(const SumArgs<T>& args, cudaStream_t stream) {
  if (args.num_images == 0) return;
  launch(sum_kernel<T>, dim3(static_cast<unsigned>(std::min(max_grid_y, args.num_images))), sum_lanes, 0, stream, args);
}

// Normals of elements first ... first + 3, first a multiple of 4.
template <typename T>
__device__ __forceinline__ Vec4<T> normals4(int64_t seed, int64_t step, int64_t first) {
  float z[4];
  philox_normal4(static_cast<uint64_t>(seed), static_cast<uint64_t>(step), static_cast<uint64_t>(first / 4), z[0], z[1], z[2], z[3]);
  return {static_cast<T>(z[0]), static_cast<T>(z[1]), static_cast<T>(z[2]), static_cast<T>(z[3])};
}

}  // namespace proxt2i
