// The variants of attention's forward for sm_90a against plain fp32 attention, and their times at U-ViT-H's shapes, without torch:
//     nvcc -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -cudart static -DUSE_CUDA
//          -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem TORCH/include benchmarks/attention_hopper.cu -o attention_hopper
//     for v in $(seq 0 19); do timeout 10 ./attention_hopper $v; done        each in a process of its own, as one may hang
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cuda/attention_hopper.cuh"

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

template <typename T>
__global__ void compare(const T* out, const float* lse, const float* true_out, const float* true_lse, size_t outs, size_t lses, float* worst) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < outs + lses; i += size_t{gridDim.x} * blockDim.x) {
    const bool is_out = i < outs;
    const float a = is_out ? as_float(out[i]) : lse[i - outs], b = is_out ? true_out[i] : true_lse[i - outs];
    float error = a == b ? 0 : fabsf(a - b);
    if (!(error < 1e30f)) error = 1e30f;
    atomicMax(reinterpret_cast<int*>(worst) + (is_out ? 0 : 1), __float_as_int(error));
    if (is_out) atomicMax(reinterpret_cast<int*>(worst) + 2, __float_as_int(fabsf(b)));
  }
}

struct Shape {
  int batch, tokens, heads, queries;
  bool lengths;
};

template <typename T, int D>
struct Problem {
  AttentionArgs<T> args{};
  size_t outs, lses;
  Problem(Shape s, float spread) {
    const size_t count = size_t(s.batch) * s.tokens * 3 * s.heads * D;
    T* qkv;
    outs = size_t(s.batch) * s.queries * s.heads * D, lses = size_t(s.batch) * s.queries * s.heads;
    CHECK(cudaMalloc(&qkv, count * 2));
    CHECK(cudaMalloc(&args.out, outs * 2));
    CHECK(cudaMalloc(&args.lse, lses * 4));
    CHECK(cudaMemset(args.out, 0xff, outs * 2));
    CHECK(cudaMemset(args.lse, 0xff, lses * 4));
    fill<<<1024, 256>>>(qkv, count, spread, 1234567u);
    args.qkv = qkv;
    if (s.lengths) {
      std::vector<int64_t> lengths;
      for (int b = 0; b < s.batch; ++b) lengths.push_back(b % 4 == 0 ? s.tokens : b % 4 == 1 ? s.tokens / 2 : b % 4 == 2 ? 1 : 0);
      int64_t* device;
      CHECK(cudaMalloc(&device, 8 * s.batch));
      CHECK(cudaMemcpy(device, lengths.data(), 8 * s.batch, cudaMemcpyHostToDevice));
      args.key_lengths = device;
    }
    args.batch = s.batch, args.tokens = s.tokens, args.heads = s.heads, args.queries = s.queries;
    args.scale = 1 / sqrtf(D);
  }
  ~Problem() {
    cudaFree(const_cast<T*>(args.qkv)), cudaFree(args.out), cudaFree(args.lse), cudaFree(const_cast<int64_t*>(args.key_lengths));
  }
};

template <typename T, int D, int groups, int keys, int blocks, bool overlapped>
struct Variant {
  static void launch(const AttentionArgs<T>& args) {
    using Tiles = HopperTiles<D, groups, keys>;
    const auto kernel = attention_hopper_kernel<T, D, groups, keys, blocks, overlapped>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tiles::bytes));
    kernel<<<dim3((args.queries + Tiles::rows - 1) / Tiles::rows, args.heads, args.batch), Tiles::threads, Tiles::bytes>>>(args);
    CHECK(cudaGetLastError());
  }
  static bool check(Shape shape, float spread) {
    Problem<T, D> p(shape, spread);
    launch(p.args);
    float *out, *lse, *worst, w[3];
    CHECK(cudaMalloc(&out, p.outs * 4));
    CHECK(cudaMalloc(&lse, p.lses * 4));
    CHECK(cudaMalloc(&worst, 12));
    CHECK(cudaMemset(worst, 0, 12));
    reference<T, D><<<dim3(shape.queries, shape.heads, shape.batch), 128, 4 * shape.tokens>>>(p.args, out, lse);
    compare<<<256, 256>>>(p.args.out, p.args.lse, out, lse, p.outs, p.lses, worst);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(w, worst, 12, cudaMemcpyDeviceToHost));
    cudaFree(out), cudaFree(lse), cudaFree(worst);
    const bool good = w[0] <= (sizeof(T) == 2 && std::is_same_v<T, bfloat16> ? 1.2e-2f : 2e-3f) * w[2] && w[1] < 1e-3f;
    printf("  %s N %4d M %4d lengths %d spread %g: out off by %.2e of %.2e, lse by %.2e\n", good ? "ok   " : "WRONG", shape.tokens,
           shape.queries, shape.lengths, spread, w[0], w[2], w[1]);
    return good;
  }
  static void time(Shape shape) {
    Problem<T, D> p(shape, 1);
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    float best = 1e9f, all = 0;
    for (int i = 0; i < 3; ++i) launch(p.args);
    for (int round = 0; round < 5; ++round) {
      float ms;
      CHECK(cudaEventRecord(start));
      for (int i = 0; i < 10; ++i) launch(p.args);
      CHECK(cudaEventRecord(stop));
      CHECK(cudaEventSynchronize(stop));
      CHECK(cudaEventElapsedTime(&ms, start, stop));
      best = fminf(best, ms / 10), all += ms / 50;
    }
    const double flop = 4.0 * shape.batch * shape.heads * shape.tokens * shape.tokens * D;
    printf("  time B %d N %d D %d: mean %.4f ms (best %.4f), %.0f TFLOP/s\n", shape.batch, shape.tokens, D, all, best, flop / all * 1e-9);
  }
  static void run(const char* name) {
    const auto kernel = attention_hopper_kernel<T, D, groups, keys, blocks, overlapped>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, HopperTiles<D, groups, keys>::bytes));
    int resident = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 128 * groups, HopperTiles<D, groups, keys>::bytes));
    printf("%s: D %d, %d warp groups, %d keys, %s, %d blocks on a multiprocessor\n", name, D, groups, keys,
           overlapped ? "overlapped" : "in turn", resident);
    bool good = true;
    for (const Shape s : {Shape{2, 1, 2, 1, false}, Shape{2, 17, 2, 17, false}, Shape{4, 463, 2, 463, true}, Shape{4, 300, 3, 130, true},
                          Shape{2, 1231, 2, 1231, false}}) {
      for (const float spread : {1.0f, 4.0f}) good &= check(s, spread);
    }
    time({256, 463, 16, 463, false});
    time({64, 1231, 16, 1231, false});
    printf("%s\n", good ? "all right" : "SOME WRONG");
  }
};

int main(int argc, char** argv) {
  const int variant = argc > 1 ? atoi(argv[1]) : 0;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  switch (variant) {
    case 0: Variant<bfloat16, 72, 2, 96, 2, false>::run("bfloat16"); break;
    case 1: Variant<bfloat16, 72, 2, 128, 1, true>::run("bfloat16"); break;
    case 2: Variant<bfloat16, 72, 2, 80, 2, false>::run("bfloat16"); break;
    case 3: Variant<bfloat16, 72, 2, 80, 2, true>::run("bfloat16"); break;
    case 4: Variant<bfloat16, 72, 2, 64, 2, false>::run("bfloat16"); break;
    case 5: Variant<bfloat16, 72, 2, 64, 2, true>::run("bfloat16"); break;
    case 6: Variant<bfloat16, 72, 3, 96, 1, false>::run("bfloat16"); break;
    case 7: Variant<bfloat16, 72, 3, 96, 1, true>::run("bfloat16"); break;
    case 8: Variant<bfloat16, 72, 3, 128, 1, true>::run("bfloat16"); break;
    case 9: Variant<bfloat16, 72, 1, 96, 4, false>::run("bfloat16"); break;
    case 10: Variant<bfloat16, 72, 1, 96, 3, true>::run("bfloat16"); break;
    case 11: Variant<bfloat16, 72, 4, 96, 1, false>::run("bfloat16"); break;
    case 12: Variant<bfloat16, 72, 4, 80, 1, true>::run("bfloat16"); break;
    case 13: Variant<bfloat16, 64, 2, 96, 2, false>::run("bfloat16"); break;
    case 14: Variant<bfloat16, 64, 2, 80, 2, true>::run("bfloat16"); break;
    case 15: Variant<bfloat16, 128, 2, 64, 1, false>::run("bfloat16"); break;
    case 16: Variant<bfloat16, 128, 2, 96, 1, true>::run("bfloat16"); break;
    case 17: Variant<bfloat16, 128, 3, 80, 1, false>::run("bfloat16"); break;
    case 18: Variant<float16, 72, 2, 96, 2, false>::run("float16"); break;
    case 19: Variant<float16, 72, 2, 80, 2, true>::run("float16"); break;
    default: printf("no such variant\n"); return 1;
  }
}
