"""The CUDA kernels that normalise queries and keys beside torch's attention, run by the emulator, against float64 and plain torch's errors."""

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.ops.proxt2i_emulated
EPS = 1e-6
SHAPES = [(0, 3, 2, 64), (1, 1, 1, 64), (2, 3, 2, 72), (1, 11, 3, 128), (1, 37, 5, 72)]  # batch, tokens, heads, head dim


def plain(qkv, weights, grads, dtype):
    """q, k, v and the gradients of qkv and the weights in plain torch of `dtype`."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (qkv, *weights)]
    q, k, v = leaves[0].unbind(2)
    outputs = [F.rms_norm(x, x.shape[-1:], weight, EPS) for x, weight in ((q, leaves[1]), (k, leaves[2]))] + [v]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [grad.to(dtype) for grad in grads])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_at_most_twice_that_of_plain_torch(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    batch, tokens, heads, dim = shape
    qkv = (2 * torch.randn(batch, tokens, 3, heads, dim, generator=generator)).to(dtype)
    weights = tuple((1 + 0.3 * torch.randn(2, dim, generator=generator)).unbind(0))
    grads = [torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype) for _ in range(3)]
    outputs = CUDA.qkv_norm(qkv, *weights, EPS)
    grad_qkv, *of_weights = CUDA.qkv_norm_backward(*grads, qkv, *weights, EPS)
    mine = [*outputs, grad_qkv, *(partial.sum(0) for partial in of_weights)]
    assert torch.equal(outputs[2], qkv[:, :, 2]) and torch.equal(grad_qkv[:, :, 2], grads[2])
    for i, (ours, theirs, true) in enumerate(zip(mine, plain(qkv, weights, grads, dtype), plain(qkv, weights, grads, torch.float64), strict=True)):
        assert ours.dtype == (dtype if i < 4 else torch.float32) and ours.shape == true.shape and ours.is_contiguous()
        if ours.numel():
            floor = torch.finfo(dtype).eps * float(true.detach().abs().max())
            assert (ours - true).abs().max() <= max(2 * (theirs - true).abs().max(), floor)


def test_more_heads_than_the_grid_has_groups():
    qkv = torch.randn(1, 1100, 3, 10, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)  # 33,000, and 32,768 groups
    weights = torch.ones(64), torch.full((64,), 2.0)
    q, k, _ = CUDA.qkv_norm(qkv, *weights, EPS)
    for x, ours, scale in ((qkv[:, :, 0], q, 1), (qkv[:, :, 1], k, 2)):
        torch.testing.assert_close(ours.float(), scale * F.rms_norm(x.float(), (64,), eps=EPS), rtol=2**-7, atol=0)


@pytest.mark.parametrize("wrong", ["dtype", "contiguous", "dim", "weight"])
def test_wrong_tensors_are_refused(wrong):
    qkv, weight = torch.randn(1, 4, 3, 2, 64).to(torch.bfloat16), torch.ones(64)
    if wrong == "dtype":
        qkv = qkv.float()
    elif wrong == "contiguous":
        qkv = qkv.transpose(1, 3)
    elif wrong == "dim":
        qkv = qkv[..., :56].contiguous()
    else:
        weight = weight[:32]
    with pytest.raises(RuntimeError, match="proxt2i"):
        CUDA.qkv_norm(qkv, weight, weight, EPS)
