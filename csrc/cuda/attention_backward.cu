// Attention, backward: the operator. Its kernels are in attention_backward.cuh, those for sm_90a in attention_hopper_backward.cuh.
#include "attention_backward.cuh"
#include "attention_hopper_backward.cuh"

namespace proxt2i {
namespace {

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                                      const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& q_weight,
                                                      const std::optional<Tensor>& k_weight, double scale, double norm_eps) {
  check_attention(qkv, key_lengths, q_weight, k_weight, out.size(1));
  STD_TORCH_CHECK(out.scalar_type() == qkv.scalar_type() && lse.scalar_type() == ScalarType::Float,
                  "proxt2i: out must have qkv's dtype, lse float32");
  check_like(grad_out, out, qkv.scalar_type(), "grad_out");
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous() && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0,
                  "proxt2i: out and lse must be as attention_forward made them");
  const OnDeviceOf device(qkv);
  const Tensor grad = torch::stable::contiguous(grad_out);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(grad.const_data_ptr()) % 16 == 0, "proxt2i: grad_out must be 16-byte aligned");
  Tensor grad_qkv = torch::stable::new_empty(qkv, qkv.sizes());
  if (out.size(1) < qkv.size(1)) torch::stable::zero_(grad_qkv);  // tokens that do not ask
  const auto weight_grads = [&](int64_t rows) {
    const int64_t blocks = qkv.size(0) * qkv.size(3) * ((rows + block_rows - 1) / block_rows);
    const int64_t shape[] = {q_weight.has_value() ? blocks * attention_warps : 0, qkv.size(4)};
    return torch::stable::new_empty(lse, {shape, 2});
  };
  Tensor grad_q_weight = weight_grads(out.size(1)), grad_k_weight = weight_grads(out.size(1) > 0 ? qkv.size(1) : 0);
  if (grad_qkv.numel() == 0 || out.size(1) == 0) return {grad_qkv, grad_q_weight, grad_k_weight};
  const int64_t terms_shape[] = {lse.size(0), lse.size(1), 2, padded_queries(static_cast<int>(lse.size(2)))};
  const Tensor terms = torch::stable::new_empty(lse, {terms_shape, 4});
  dispatch_attention(qkv, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int D = decltype(dim)::value;
    auto args = attention_args<T>(qkv, key_lengths, q_weight, k_weight, out, lse, scale, norm_eps);
    args.grad_out = static_cast<const T*>(grad.const_data_ptr());
    args.terms = static_cast<float*>(terms.mutable_data_ptr());
    args.grad_qkv = static_cast<T*>(grad_qkv.mutable_data_ptr());
    args.grad_q_weight = static_cast<float*>(grad_q_weight.mutable_data_ptr());
    args.grad_k_weight = static_cast<float*>(grad_k_weight.mutable_data_ptr());
    const bool hopper = args.q_weight == nullptr && device.is_hopper();
    hopper ? launch_hopper_backward<T, D>(args, device.stream) : launch_backward<T, D>(args, device.stream);
  });
  return {grad_qkv, grad_q_weight, grad_k_weight};
}

}  // namespace
}  // namespace proxt2i

PROXT2I_CUDA_IMPL(m) { m.impl("attention_backward", TORCH_BOX(&proxt2i::attention_backward)); }
