// QK-norm beside torch's attention kernels: packed qkv [B, N, 3, H, D] -> q, k, v [B, N, H, D], each contiguous, q and k with their heads
// normalised, x -> weight x / sqrt(mean(x^2) + norm_eps); and backward, from the three gradients to that of qkv. One pass over memory each.
//
// A head is read by a group of neighbouring lanes, 16 bytes a lane: 8 lanes for D = 64, 16 for 72 (nine of them at work) and 128.
#include "attention.cuh"

namespace proxt2i {
namespace {

constexpr int norm_threads = 256;
constexpr int64_t max_norm_blocks = 1024;
enum Part { part_q, part_k, part_v };

template <typename T>
struct NormArgs {
  const T* qkv;                      // [tokens, 3, H, D]; tokens of all images
  const float *q_weight, *k_weight;  // [D]
  T *q, *k, *v;                      // [tokens, H, D]; in the backward pass the gradients, which are read
  T* grad_qkv;                       // backward only, as are the following
  float *grad_q_weight, *grad_k_weight;  // [blocks, D]: the sum over a block's heads
  uint32_t tokens, heads;
  float norm_eps;

  __device__ T* part(int number) const { return number == part_q ? q : number == part_k ? k : v; }
};

template <int D>
struct Group {
  static constexpr int lanes = D <= 64 ? 8 : 16;
  static constexpr int per_block = norm_threads / lanes;
  int number, column;  // of the group in its block; of the lane's first element, from D on if there is none for it

  __device__ Group() : number(static_cast<int>(threadIdx.x) / lanes), column(8 * (static_cast<int>(threadIdx.x) % lanes)) {}
  __device__ bool works() const { return column < D; }
};

// Every group of the grid takes every `groups`-th head of qkv, in its order in memory: visit(place of the lane's elements in qkv, part, place
// in that part, whether there are any). All lanes of a warp come along to the end.
template <int D, typename T, typename Visit>
__device__ __forceinline__ void for_heads(const NormArgs<T>& args, const Group<D>& group, const Visit& visit) {
  const uint32_t heads = args.heads, rows = args.tokens * 3 * heads, groups = gridDim.x * Group<D>::per_block;
  for (uint32_t first = blockIdx.x * Group<D>::per_block; first < rows; first += groups) {
    const uint32_t row = first + group.number;
    const uint32_t token_part = row / heads, token = token_part / 3;  // token_part: 3 token + part
    const uint32_t in_part = token * heads + (row - token_part * heads);
    visit(static_cast<int64_t>(row) * D + group.column, static_cast<int>(token_part - 3 * token),
          static_cast<int64_t>(in_part) * D + group.column, row < rows && group.works());
  }
}

// Of q and of k, those of the lane's elements.
template <typename T, int D>
__device__ __forceinline__ void load_weights(const NormArgs<T>& args, const Group<D>& group, float (&weights)[2][8]) {
  if (!group.works()) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    weights[0][i] = args.q_weight[group.column + i];
    weights[1][i] = args.k_weight[group.column + i];
  }
}

template <int D>
__device__ __forceinline__ float norm_factor(const float (&x)[8], float eps) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares = fma(x[i], x[i], squares);
  return rsqrtf(sum_over<Group<D>::lanes>(squares) / D + eps);
}

template <typename T, int D>
__global__ void __launch_bounds__(norm_threads) qkv_norm_kernel(const NormArgs<T> args) {
  const Group<D> group;
  float weights[2][8] = {};
  load_weights(args, group, weights);
  for_heads<D>(args, group, [&](int64_t place, int part, int64_t target, bool valid) {
    float x[8] = {};
    if (valid) load8(x, args.qkv + place);
    const float factor = norm_factor<D>(x, args.norm_eps);
    if (!valid) return;
    if (part != part_v) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= factor * (part == part_q ? weights[0][i] : weights[1][i]);
    }
    store8(args.part(part) + target, x);
  });
}

// With r = 1 / sqrt(mean(x^2) + eps) and h = weight grad:  dx = r (h - x r^2 mean(h x)),  dweight = sum over the heads of grad x r.
template <typename T, int D>
__global__ void __launch_bounds__(norm_threads) qkv_norm_backward_kernel(const NormArgs<T> args) {
  __shared__ float sums[Group<D>::per_block][D];
  const Group<D> group;
  float weights[2][8] = {}, of_weights[2][8] = {};
  load_weights(args, group, weights);
  for_heads<D>(args, group, [&](int64_t place, int part, int64_t source, bool valid) {
    float x[8] = {}, grad[8] = {}, h[8], product = 0;
    if (valid) {
      load8(grad, args.part(part) + source);
      if (part != part_v) load8(x, args.qkv + place);
    }
    const float factor = norm_factor<D>(x, args.norm_eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      h[i] = grad[i] * (part == part_q ? weights[0][i] : weights[1][i]);
      product = fma(h[i], x[i], product);
    }
    product = sum_over<Group<D>::lanes>(product) / D * factor * factor;
    if (part != part_v) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float term = grad[i] * (x[i] * factor);
        of_weights[0][i] += part == part_q ? term : 0.0f;
        of_weights[1][i] += part == part_k ? term : 0.0f;
        grad[i] = factor * (h[i] - x[i] * product);
      }
    }
    if (valid) store8(args.grad_qkv + place, grad);
  });
  for (int number = 0; number < 2; ++number) {
    __syncthreads();
    if (group.works()) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[group.number][group.column + i] = of_weights[number][i];
    }
    __syncthreads();
    float* const target = (number == 0 ? args.grad_q_weight : args.grad_k_weight) + static_cast<int64_t>(blockIdx.x) * D;
    for (int column = threadIdx.x; column < D; column += norm_threads) {
      float sum = 0;
      for (int i = 0; i < Group<D>::per_block; ++i) sum += sums[i][column];
      target[column] = sum;
    }
  }
}

template <typename T>
NormArgs<T> norm_args(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, double norm_eps) {
  NormArgs<T> args{};
  args.qkv = static_cast<const T*>(qkv.const_data_ptr());
  args.q_weight = static_cast<const float*>(q_weight.const_data_ptr());
  args.k_weight = static_cast<const float*>(k_weight.const_data_ptr());
  args.tokens = static_cast<uint32_t>(qkv.size(0) * qkv.size(1));
  args.heads = static_cast<uint32_t>(qkv.size(3));
  args.norm_eps = static_cast<float>(norm_eps);
  return args;
}

// A function of the sizes alone, as the order of the sums over heads is.
int64_t norm_blocks(const Tensor& qkv) {
  const int64_t rows = qkv.size(0) * qkv.size(1) * 3 * qkv.size(3), per_block = norm_threads / (qkv.size(4) <= 64 ? 8 : 16);
  STD_TORCH_CHECK(rows < (1LL << 31), "proxt2i: qkv_norm takes at most 2^31 heads of all tokens");
  return std::min(max_norm_blocks, (rows + per_block - 1) / per_block);
}

Tensor empty_part(const Tensor& qkv) {
  const int64_t shape[] = {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
  return torch::stable::new_empty(qkv, {shape, 4});
}

std::tuple<Tensor, Tensor, Tensor> qkv_norm(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, double norm_eps) {
  check_attention(qkv, std::nullopt, q_weight, k_weight, qkv.size(1));
  const OnDeviceOf device(qkv);
  const Tensor q = empty_part(qkv), k = empty_part(qkv), v = empty_part(qkv);
  if (qkv.numel() == 0) return {q, k, v};
  dispatch_attention(qkv, [&](auto type, auto dim) {
    using T = decltype(type);
    auto args = norm_args<T>(qkv, q_weight, k_weight, norm_eps);
    args.q = output<T>(q), args.k = output<T>(k), args.v = output<T>(v);
    launch(qkv_norm_kernel<T, decltype(dim)::value>, dim3(static_cast<unsigned>(norm_blocks(qkv))), norm_threads, 0, device.stream, args);
  });
  return {q, k, v};
}

std::tuple<Tensor, Tensor, Tensor> qkv_norm_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, const Tensor& qkv,
                                                     const Tensor& q_weight, const Tensor& k_weight, double norm_eps) {
  check_attention(qkv, std::nullopt, q_weight, k_weight, qkv.size(1));
  const OnDeviceOf device(qkv);
  const Tensor grad_qkv = torch::stable::new_empty(qkv, qkv.sizes());
  const int64_t shape[] = {norm_blocks(qkv), qkv.size(4)};
  const Tensor of_q = torch::stable::new_empty(q_weight, {shape, 2}), of_k = torch::stable::new_empty(q_weight, {shape, 2});
  if (qkv.numel() == 0) return {grad_qkv, of_q, of_k};
  const Tensor grads[] = {torch::stable::contiguous(grad_q), torch::stable::contiguous(grad_k), torch::stable::contiguous(grad_v)};
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(grad.scalar_type() == qkv.scalar_type() && grad.device() == qkv.device() && 3 * grad.numel() == qkv.numel() &&
                        reinterpret_cast<uintptr_t>(grad.const_data_ptr()) % 16 == 0,
                    "proxt2i: gradients of q, k and v must have their shape, dtype and device");
  }
  dispatch_attention(qkv, [&](auto type, auto dim) {
    using T = decltype(type);
    auto args = norm_args<T>(qkv, q_weight, k_weight, norm_eps);
    args.q = output<T>(grads[0]), args.k = output<T>(grads[1]), args.v = output<T>(grads[2]);
    args.grad_qkv = output<T>(grad_qkv);
    args.grad_q_weight = output<float>(of_q), args.grad_k_weight = output<float>(of_k);
    launch(qkv_norm_backward_kernel<T, decltype(dim)::value>, dim3(static_cast<unsigned>(shape[0])), norm_threads, 0, device.stream, args);
  });
  return {grad_qkv, of_q, of_k};
}

}  // namespace
}  // namespace proxt2i

PROXT2I_CUDA_IMPL(m) {
  m.impl("qkv_norm", TORCH_BOX(&proxt2i::qkv_norm));
  m.impl("qkv_norm_backward", TORCH_BOX(&proxt2i::qkv_norm_backward));
}
