// The variants of attention's backward for sm_90a against plain fp32 attention, and their times at U-ViT-H's shapes beside those of the
// kernels on mma.sync, without torch:
//     nvcc -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -cudart static -DUSE_CUDA
//          -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem TORCH/include benchmarks/attention_hopper_backward.cu -o backward
//     for v in $(seq 0 28); do timeout 20 ./backward $v; done        each in a process of its own, as one may hang
#include "attention_hopper.cuh"

#include "../csrc/cuda/attention_backward.cuh"
#include "../csrc/cuda/attention_hopper_backward.cuh"

// What launch() takes from torch.
extern "C" AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char* file, const char*, uint32_t line, bool, char**) {
  if (error != 0) printf("%s:%u: %s\n", file, line, cudaGetErrorString(static_cast<cudaError_t>(error))), fflush(stdout), exit(1);
  return AOTI_TORCH_SUCCESS;
}
extern "C" void torch_c10_cuda_free_error_msg(char*) {}

template <typename T>
__global__ void round_all(T* to, const float* from, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(pack2<T>(from[i], 0));
  }
}

// A row's gradients in fp32, one block a query (dQ) or a key (dK, dV): grad [B, N, 3, H, D].
template <typename T, int D>
__global__ void reference_gradients(AttentionArgs<T> args, float* grad, bool of_key) {
  const AttentionHead<T, D> head(args);
  extern __shared__ float weights[];  // P and dS
  const int row = blockIdx.x, others = of_key ? args.queries : head.keys;
  if (of_key && row >= head.keys) return;
  const T* const grad_out = args.grad_out + head.out_offset;
  for (int other = threadIdx.x; other < others; other += blockDim.x) {
    const int64_t query = of_key ? other : row, key = of_key ? row : other;
    float dot = 0, dp = 0, delta = 0;
    for (int d = 0; d < D; ++d) {
      const float of_out = as_float(grad_out[query * head.out_pitch + d]);
      dot += as_float(head.q[query * head.pitch + d]) * as_float(head.k[key * head.pitch + d]);
      dp += of_out * as_float(head.v[key * head.pitch + d]);
      delta += of_out * as_float(args.out[head.out_offset + query * head.out_pitch + d]);
    }
    weights[2 * other] = expf(dot * args.scale - args.lse[head.lse_offset + query]);
    weights[2 * other + 1] = weights[2 * other] * (dp - delta);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    float of_scores = 0, of_values = 0;
    for (int other = 0; other < others; ++other) {
      of_scores += weights[2 * other + 1] * as_float((of_key ? head.q : head.k)[other * head.pitch + d]);
      if (of_key) of_values += weights[2 * other] * as_float(grad_out[other * head.out_pitch + d]);
    }
    grad[(of_key ? head.k_offset : head.q_offset) + row * head.pitch + d] = of_scores * args.scale;
    if (of_key) grad[head.v_offset + row * head.pitch + d] = of_values;
  }
}

// worst[0 ... 2]: the largest error in dQ, dK and dV; [3 ... 5]: their largest true values.
template <typename T>
__global__ void compare(const T* grad, const float* truth, size_t count, int width, float* worst) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const int part = static_cast<int>(i / width % 3);
    const float error = fabsf(as_float(grad[i]) - truth[i]);
    atomicMax(reinterpret_cast<int*>(worst) + part, __float_as_int(error < 1e30f ? error : 1e30f));
    atomicMax(reinterpret_cast<int*>(worst) + 3 + part, __float_as_int(fabsf(truth[i])));
  }
}

template <typename T>
T* allocated(size_t count) {
  T* p;
  CHECK(cudaMalloc(&p, count * sizeof(T)));
  CHECK(cudaMemset(p, 0xff, count * sizeof(T)));
  return p;
}

template <typename T, int D>
struct Problem {
  AttentionArgs<T> args{};
  Shape shape;
  size_t count, outs, lses;
  T *qkv, *grad_out;
  Problem(Shape s, float spread) : shape(s) {
    count = size_t(s.batch) * s.tokens * 3 * s.heads * D, outs = size_t(s.batch) * s.queries * s.heads * D, lses = outs / D;
    qkv = allocated<T>(count), grad_out = allocated<T>(outs);
    fill<<<1024, 256>>>(qkv, count, spread, 1234567u);
    fill<<<1024, 256>>>(grad_out, outs, 1.0f, 7654321u);
    args.qkv = qkv, args.grad_out = grad_out, args.key_lengths = key_lengths(s);
    args.batch = s.batch, args.tokens = s.tokens, args.heads = s.heads, args.queries = s.queries;
    args.scale = 1 / sqrtf(D);
    args.out = allocated<T>(outs), args.lse = allocated<float>(lses), args.grad_qkv = allocated<T>(count);
    args.terms = allocated<float>(size_t(s.batch) * s.heads * 2 * padded_queries(s.queries));
    if (s.queries < s.tokens) CHECK(cudaMemset(args.grad_qkv, 0, count * sizeof(T)));
    float* const out = allocated<float>(outs);
    reference<T, D><<<dim3(s.queries, s.heads, s.batch), 128, 4 * s.tokens>>>(args, out, args.lse);
    round_all<<<256, 256>>>(args.out, out, outs);
    CHECK(cudaDeviceSynchronize());
    cudaFree(out);
  }
  ~Problem() {
    for (void* p : {static_cast<void*>(qkv), static_cast<void*>(grad_out), static_cast<void*>(args.out), static_cast<void*>(args.lse),
                    static_cast<void*>(args.grad_qkv), static_cast<void*>(args.terms), (void*)args.key_lengths}) cudaFree(p);
  }
};

// parts: 1 for dQ, 2 for dK and dV, 3 for all. prepare makes what run needs besides.
template <typename T, int D>
struct Variant {
  using Launch = void (*)(const AttentionArgs<T>&, cudaStream_t);
  int parts;
  Launch prepare, run;

  bool check(Shape shape, float spread) const {
    Problem<T, D> p(shape, spread);
    float *const truth = allocated<float>(p.count), *const worst = allocated<float>(6), w[6]{};
    CHECK(cudaMemset(truth, 0, p.count * 4));
    CHECK(cudaMemset(worst, 0, sizeof w));
    const int bytes = 8 * shape.tokens;
    reference_gradients<T, D><<<dim3(shape.queries, shape.heads, shape.batch), 128, bytes>>>(p.args, truth, false);
    reference_gradients<T, D><<<dim3(shape.tokens, shape.heads, shape.batch), 128, bytes>>>(p.args, truth, true);
    if (prepare != nullptr) prepare(p.args, nullptr);
    run(p.args, nullptr);
    compare<<<256, 256>>>(p.args.grad_qkv, truth, p.count, shape.heads * D, worst);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy((void*)w, worst, sizeof w, cudaMemcpyDeviceToHost));
    cudaFree(truth), cudaFree(worst);
    bool good = true;
    for (int part = 0; part < 3; ++part) {
      const float allowed = (std::is_same_v<T, bfloat16> ? 1.5e-2f : 2e-3f) * fmaxf(w[3 + part], 1e-2f);
      if (parts >> (part > 0) & 1) good &= w[part] <= allowed;
    }
    printf("  %s N %4d M %4d lengths %d spread %g: off by %.2e, %.2e, %.2e of %.2e, %.2e, %.2e\n", good ? "ok   " : "WRONG", shape.tokens,
           shape.queries, shape.lengths, spread, w[0], w[1], w[2], w[3], w[4], w[5]);
    return good;
  }
  void time(Shape shape) const {
    Problem<T, D> p(shape, 1);
    if (prepare != nullptr) prepare(p.args, nullptr);
    print_time(shape, D, parts == 1 ? 3 : parts == 2 ? 4 : 5, [&] { run(p.args, nullptr); });  // five are enough for all
  }
  void measure(const char* name) const {
    printf("%s\n", name);
    check_and_time([&](Shape shape, float spread) { return check(shape, spread); }, [&](Shape shape) { time(shape); });
  }
};

template <int groups, int tile, bool overlapped, typename T, int D, typename Kernel>
void measure_part(const char* part, const char* passing, Kernel kernel, int bytes, const Variant<T, D>& variant) {
  char name[200];
  snprintf(name, sizeof name, "%s: D %d, %d warp groups, %d %s, %s, %d blocks on a multiprocessor", part, D, groups, tile, passing,
           overlapped ? "overlapped" : "in turn", resident_blocks(kernel, 128 * groups, bytes));
  variant.measure(name);
}

template <typename T, int D, int groups, int tile, int blocks, bool overlapped>
void measure_dq() {
  measure_part<groups, tile, overlapped>("dQ", "keys", attention_hopper_dq_kernel<T, D, groups, tile, blocks, overlapped>,
                                         BackwardTiles<D, groups, tile, overlapped>::dq_bytes,
                                         Variant<T, D>{1, nullptr, launch_hopper_dq<T, D, groups, tile, blocks, overlapped>});
}

template <typename T, int D, int groups, int tile, int blocks, bool overlapped>
void measure_dkv() {
  measure_part<groups, tile, overlapped>(
      "dK, dV", "queries", attention_hopper_dkv_kernel<T, D, groups, tile, blocks, overlapped>,
      BackwardTiles<D, groups, tile, overlapped>::dkv_bytes,
      Variant<T, D>{2, launch_hopper_backward<T, D>, launch_hopper_dkv<T, D, groups, tile, blocks, overlapped>});
}

template <typename T, int D>
void measure_all(bool hopper) {
  const auto run = hopper ? launch_hopper_backward<T, D> : launch_backward<T, D>;
  Variant<T, D>{3, nullptr, run}.measure(hopper ? "all, as attention_backward.cu chooses" : "all, on mma.sync");
}

int main(int argc, char** argv) {
  const int variant = argc > 1 ? atoi(argv[1]) : 0;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  switch (variant) {
    case 0: measure_all<bfloat16, 72>(true); break;
    case 1: measure_all<bfloat16, 72>(false); break;
    case 2: measure_dq<bfloat16, 72, 2, 64, 2, false>(); break;
    case 3: measure_dkv<bfloat16, 72, 1, 80, 2, true>(); break;
    case 4: measure_dq<bfloat16, 72, 1, 80, 3, true>(); break;
    case 5: measure_dq<bfloat16, 72, 1, 64, 4, false>(); break;
    case 6: measure_dq<bfloat16, 72, 3, 80, 1, true>(); break;
    case 7: measure_dq<bfloat16, 72, 3, 96, 1, false>(); break;
    case 8: measure_dq<bfloat16, 72, 2, 96, 1, true>(); break;
    case 9: measure_dq<bfloat16, 72, 2, 128, 1, true>(); break;
    case 10: measure_dq<bfloat16, 72, 1, 64, 3, true>(); break;
    case 11: measure_dkv<bfloat16, 72, 2, 80, 1, true>(); break;
    case 12: measure_dkv<bfloat16, 72, 1, 64, 2, true>(); break;
    case 13: measure_dkv<bfloat16, 72, 2, 64, 1, true>(); break;
    case 14: measure_dkv<bfloat16, 72, 1, 80, 2, false>(); break;
    case 15: measure_dkv<bfloat16, 72, 2, 96, 1, false>(); break;
    case 16: measure_dkv<bfloat16, 72, 1, 64, 2, false>(); break;
    case 17: measure_all<bfloat16, 64>(true); break;
    case 18: measure_all<bfloat16, 64>(false); break;
    case 19: measure_dkv<bfloat16, 64, 1, 64, 2, true>(); break;
    case 20: measure_dkv<bfloat16, 64, 2, 96, 1, true>(); break;
    case 21: measure_all<bfloat16, 128>(true); break;
    case 22: measure_all<bfloat16, 128>(false); break;
    case 23: measure_dq<bfloat16, 128, 2, 96, 1, true>(); break;
    case 24: measure_dq<bfloat16, 128, 1, 64, 2, false>(); break;
    case 25: measure_dkv<bfloat16, 128, 2, 64, 1, false>(); break;
    case 26: measure_dkv<bfloat16, 128, 2, 80, 1, false>(); break;
    case 27: measure_all<float16, 72>(true); break;
    case 28: measure_all<float16, 72>(false); break;
    default: printf("no such variant\n"); return 1;
  }
}
