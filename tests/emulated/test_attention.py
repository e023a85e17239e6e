"""The CUDA attention kernels, run by the emulator: forward and backward against exact attention, with the errors of plain torch as the measure."""

import math

import pytest
import torch

from proxt2i import _C  # noqa: F401  (registers torch.ops.proxt2i.*)
from proxt2i.ops.attention import attention_ref

CUDA = torch.ops.proxt2i_emulated
CASES = [  # tokens, heads, head dim, queries, key lengths
    (1, 1, 64, 1, None), (17, 2, 72, 17, None), (64, 1, 128, 64, None), (65, 1, 64, 30, [65, 64, 1]), (130, 2, 72, 66, None),
    (100, 1, 128, 100, [0, 37, 100]), (70, 1, 72, 70, [3, 70, 69]),
]


def make(tokens, heads, dim, queries, lengths, dtype, spread=1.0):
    batch = len(lengths or [0, 0])
    generator = torch.Generator().manual_seed(tokens)
    qkv = (spread * torch.randn(batch, tokens, 3, heads, dim, generator=generator)).to(dtype)
    grad = torch.randn(batch, queries, heads, dim, generator=generator).to(dtype)
    return qkv, grad, None if lengths is None else torch.tensor(lengths)


def exact(qkv, grad, lengths, dtype):
    """Output and gradient of plain torch in `dtype`."""
    qkv = qkv.to(dtype).requires_grad_()
    out = attention_ref(qkv, lengths, grad.shape[1])
    out.backward(grad.to(dtype))
    return out.detach(), qkv.grad


def ours(qkv, grad, lengths):
    scale = qkv.shape[-1] ** -0.5
    out, lse = CUDA.attention_forward(qkv, lengths, grad.shape[1], scale)
    return out, CUDA.attention_backward(grad, qkv, out, lse, lengths, scale), lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_at_most_twice_that_of_plain_torch(case, dtype, order):
    if order == "reverse" and dtype == torch.float16:
        pytest.skip("the order of threads matters no more here than in bfloat16")
    qkv, grad, lengths = make(*case, dtype)
    mine, plain, truth = ours(qkv, grad, lengths)[:2], exact(qkv, grad, lengths, dtype), exact(qkv, grad, lengths, torch.float64)
    for ours_, plain_, true in zip(mine, plain, truth):
        assert ours_.dtype == dtype and ours_.shape == true.shape
        error, allowed = (ours_ - true).abs(), (plain_ - true).abs()
        # a few elements alone can be luckier than one rounding: never less than half a unit in the last place of the largest
        floor = torch.finfo(dtype).eps / 2 * true.abs().max()
        assert error.max() <= max(2 * allowed.max(), floor) and error.mean() <= 2 * allowed.mean() + 1e-9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lse_and_tokens_that_do_not_take_part(case):
    qkv, grad, lengths = make(*case, torch.bfloat16)
    out, grad_qkv, lse = ours(qkv, grad, lengths)
    q, k = qkv.double()[:, -grad.shape[1] :, 0], qkv.double()[:, :, 1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(qkv.shape[-1])
    for image, length in enumerate(lengths if lengths is not None else [qkv.shape[1]] * len(qkv)):
        torch.testing.assert_close(lse[image].double(), scores[image, :, :, :length].logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert not grad_qkv[image, length:, 1:].any()  # keys and values that nobody attends to
        assert length > 0 or not out[image].any()
    assert not grad_qkv[:, : qkv.shape[1] - grad.shape[1], 0].any()  # tokens that do not ask


def test_large_scores_do_not_overflow():
    qkv, grad, lengths = make(70, 1, 64, 70, None, torch.float16, spread=20.0)  # scores of hundreds: one key takes all
    for mine, true in zip(ours(qkv, grad, lengths), exact(qkv, grad, lengths, torch.float64)):
        assert torch.isfinite(mine).all() and (mine - true).abs().max() < 0.02 * true.abs().max()


def test_an_image_does_not_depend_on_its_batch():
    qkv, grad, lengths = make(70, 2, 72, 70, [70, 40, 70], torch.bfloat16)
    together = ours(qkv, grad, lengths)
    for one in (slice(0, 1), slice(1, 2)):
        assert all(torch.equal(a, b[one]) for a, b in zip(ours(qkv[one].clone(), grad[one].clone(), lengths[one].clone()), together))


def test_wrong_inputs_are_refused():
    qkv, grad, _ = make(8, 1, 64, 8, None, torch.bfloat16)
    cases = [(qkv.float(), None, 8, "bfloat16 or float16"), (qkv[..., :32], None, 8, "heads of 64, 72 or 128"), (qkv[:, :, 0], None, 8, "must have shape"),
             (qkv, None, 9, "num_queries"), (qkv.transpose(0, 1), None, 2, "contiguous"), (qkv, torch.tensor([8]), 8, "key_lengths")]
    for wrong, lengths, queries, message in cases:
        with pytest.raises(RuntimeError, match=message):
            CUDA.attention_forward(wrong, lengths, queries, 0.1)
    assert CUDA.attention_forward(qkv[:0], None, 8, 0.1)[0].shape == (0, 8, 1, 64)
    assert CUDA.attention_forward(qkv, None, 0, 0.1)[0].shape == (2, 0, 1, 64)
