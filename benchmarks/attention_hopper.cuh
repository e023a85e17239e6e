// What the benchmarks of attention for sm_90a share: inputs, and plain fp32 attention.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cuda/attention.cuh"

using namespace proxt2i;

#define CHECK(call)                                                                                      \
  do {                                                                                                   \
    const cudaError_t error = (call);                                                                    \
    if (error != cudaSuccess) printf("%s: %s\n", #call, cudaGetErrorString(error)), fflush(stdout), exit(1); \
  } while (0)

__device__ float as_float(bfloat16 x) { return widen(x); }
__device__ float as_float(float16 x) { return widen(x); }

template <typename T>
__global__ void fill(T* x, size_t count, float spread, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u + seed, sum = 0;  // the sum of four bytes is near enough to a Gaussian
    h ^= h >> 16, h *= 0x85ebca6b, h ^= h >> 13, h *= 0xc2b2ae35, h ^= h >> 16;
    for (int j = 0; j < 4; ++j) sum += h >> 8 * j & 255;
    const uint32_t pair = pack2<T>((sum - 510.0f) / 148.0f * spread, 0);
    reinterpret_cast<uint16_t*>(x)[i] = static_cast<uint16_t>(pair);
  }
}

// One block a query: [B, M, H, D] and [B, H, M] in fp32.
template <typename T, int D>
__global__ void reference(AttentionArgs<T> args, float* out, float* lse) {
  const AttentionHead<T, D> head(args);
  extern __shared__ float scores[];
  __shared__ float parts[2];
  const int row = blockIdx.x;
  for (int key = threadIdx.x; key < head.keys; key += blockDim.x) {
    float dot = 0;
    for (int d = 0; d < D; ++d) dot += as_float(head.q[row * head.pitch + d]) * as_float(head.k[key * head.pitch + d]);
    scores[key] = dot * args.scale;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float top = -INFINITY, total = 0;
    for (int key = 0; key < head.keys; ++key) top = fmaxf(top, scores[key]);
    for (int key = 0; key < head.keys; ++key) total += expf(scores[key] - top);
    parts[0] = top, parts[1] = total;
    lse[head.lse_offset + row] = total > 0 ? top + logf(total) : -INFINITY;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    float x = 0;
    for (int key = 0; key < head.keys; ++key) x += expf(scores[key] - parts[0]) * as_float(head.v[key * head.pitch + d]);
    out[head.out_offset + row * head.out_pitch + d] = head.keys > 0 ? x / parts[1] : 0;
  }
}

struct Shape {
  int batch, tokens, heads, queries;
  bool lengths;
};

struct Time {
  float mean = 0, best = 1e9f;  // milliseconds
};

template <typename Run>
Time time_of(const Run& run) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  Time time;
  for (int i = 0; i < 3; ++i) run();
  for (int round = 0; round < 5; ++round) {
    float ms;
    CHECK(cudaEventRecord(start));
    for (int i = 0; i < 10; ++i) run();
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    time.best = fminf(time.best, ms / 10), time.mean += ms / 50;
  }
  return time;
}

// All tokens, half of them, one or none; null where every image has all.
inline int64_t* key_lengths(Shape s) {
  if (!s.lengths) return nullptr;
  std::vector<int64_t> lengths;
  for (int b = 0; b < s.batch; ++b) lengths.push_back(b % 4 == 0 ? s.tokens : b % 4 == 1 ? s.tokens / 2 : b % 4 == 2 ? 1 : 0);
  int64_t* device;
  CHECK(cudaMalloc(&device, 8 * s.batch));
  CHECK(cudaMemcpy(device, lengths.data(), 8 * s.batch, cudaMemcpyHostToDevice));
  return device;
}
