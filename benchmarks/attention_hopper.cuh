// What the benchmarks of attention for sm_90a share: inputs, plain fp32 attention, and the course of a measurement.
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

// Times run, which makes `products` products of all queries and all keys, and says what it found.
template <typename Run>
void print_time(Shape shape, int dim, double products, const Run& run) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  float mean = 0, best = 1e9f;  // milliseconds
  for (int i = 0; i < 3; ++i) run();
  for (int round = 0; round < 5; ++round) {
    float ms;
    CHECK(cudaEventRecord(start));
    for (int i = 0; i < 10; ++i) run();
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    best = fminf(best, ms / 10), mean += ms / 50;
  }
  const double flop = 2 * products * shape.batch * shape.heads * shape.tokens * shape.tokens * dim;
  printf("  time B %d N %d D %d: mean %.4f ms (best %.4f), %.0f TFLOP/s\n", shape.batch, shape.tokens, dim, mean, best, flop / mean * 1e-9);
}

// check(shape, spread) at small shapes, with large scores too; then time(shape) at those of U-ViT-H.
template <typename Check, typename Timed>
void check_and_time(const Check& check, const Timed& time) {
  bool good = true;
  for (const Shape s : {Shape{2, 1, 2, 1, false}, Shape{2, 17, 2, 17, false}, Shape{4, 463, 2, 463, true}, Shape{4, 300, 3, 130, true},
                        Shape{2, 1231, 2, 1231, false}}) {
    for (const float spread : {1.0f, 4.0f}) good &= check(s, spread);
  }
  time(Shape{256, 463, 16, 463, false});
  time(Shape{64, 1231, 16, 1231, false});
  printf("%s\n", good ? "all right" : "SOME WRONG");
}

template <typename Kernel>
int resident_blocks(Kernel kernel, int threads, int bytes) {
  int resident = 0;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes));
  return resident;
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
