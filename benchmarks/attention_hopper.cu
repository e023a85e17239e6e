// The variants of attention's forward for sm_90a against plain fp32 attention, and their times at U-ViT-H's shapes, without torch:
//     nvcc -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -cudart static -DUSE_CUDA
//          -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem TORCH/include benchmarks/attention_hopper.cu -o attention_hopper
//     for v in $(seq 0 19); do timeout 10 ./attention_hopper $v; done        each in a process of its own, as one may hang
#include "attention_hopper.cuh"

#include "../csrc/cuda/attention_hopper.cuh"

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
    args.key_lengths = key_lengths(s);
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
    print_time(shape, D, 2, [&] { launch(p.args); });
  }
  static void run(const char* name) {
    const auto kernel = attention_hopper_kernel<T, D, groups, keys, blocks, overlapped>;
    const int resident = resident_blocks(kernel, 128 * groups, HopperTiles<D, groups, keys>::bytes);
    printf("%s: D %d, %d warp groups, %d keys, %s, %d blocks on a multiprocessor\n", name, D, groups, keys,
           overlapped ? "overlapped" : "in turn", resident);
    check_and_time(check, time);
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
