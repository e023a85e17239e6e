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


def norm_weights(dim):
    """QK-norm's, both around 1."""
    return tuple((1 + 0.3 * torch.randn(2, dim, generator=torch.Generator().manual_seed(1))).unbind(0))


def exact(qkv, grad, lengths, dtype, weights=()):
    """Output and gradients (of qkv, and of the weights) of plain torch in `dtype`."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (qkv, *weights)]
    out = attention_ref(leaves[0], lengths, grad.shape[1], *leaves[1:])
    out.backward(grad.to(dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)


def ours(qkv, grad, lengths, weights=(None, None)):
    """Output, gradients as in `exact`, and the lse."""
    options = (lengths, *weights), (qkv.shape[-1] ** -0.5, 1e-6)
    out, lse = CUDA.attention_forward(qkv, *options[0], grad.shape[1], *options[1])
    grad_qkv, *of_weights = CUDA.attention_backward(grad, qkv, out, lse, *options[0], *options[1])
    return out, grad_qkv, *(partial.sum(0) for partial in of_weights if weights[0] is not None), lse


def assert_close_as_plain(mine, plain, true, dtype):
    """At most twice the error of plain torch."""
    error, allowed = (mine - true).abs(), (plain - true).abs()
    # plain torch is exact where there is one key or one row: never ask for less than a rounding of the largest
    floor = torch.finfo(dtype).eps * max(float(true.abs().max()), 1e-2)
    assert error.max() <= max(2 * allowed.max(), floor) and error.mean() <= max(2 * allowed.mean(), floor / 10)


def assert_lse_and_zeros(qkv, grad, lengths, out, grad_qkv, lse):
    q, k = qkv.double()[:, -grad.shape[1] :, 0], qkv.double()[:, :, 1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(qkv.shape[-1])
    for image, length in enumerate(lengths if lengths is not None else [qkv.shape[1]] * len(qkv)):
        torch.testing.assert_close(lse[image].double(), scores[image, :, :, :length].logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert not grad_qkv[image, length:, 1:].any()  # keys and values that nobody attends to
        assert length > 0 or not out[image].any()
    assert not grad_qkv[:, : qkv.shape[1] - grad.shape[1], 0].any()  # tokens that do not ask


def assert_large_scores_are_right(tokens, lengths=None):
    qkv, grad, lengths = make(tokens, 1, 64, tokens, lengths, torch.float16, spread=20.0)  # scores of hundreds: one key takes all
    for mine, true in zip(ours(qkv, grad, lengths)[:2], exact(qkv, grad, lengths, torch.float64)):
        assert torch.isfinite(mine).all() and (mine - true).abs().max() < 0.02 * true.abs().max()


def assert_independent_images(qkv, grad, lengths, weights):
    together = ours(qkv, grad, lengths, weights)
    for one in (slice(0, 1), slice(1, 2)):
        alone = ours(qkv[one].clone(), grad[one].clone(), lengths[one].clone(), weights)
        assert all(torch.equal(alone[i], together[i][one]) for i in (0, 1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "qk-norm"])
def test_error_at_most_twice_that_of_plain_torch(case, dtype, normalised, order):
    if order == "reverse" and dtype == torch.float16:
        pytest.skip("the order of threads matters no more here than in bfloat16")
    qkv, grad, lengths = make(*case, dtype, spread=2.0 if normalised else 1.0)
    weights = norm_weights(case[2]) if normalised else ()
    mine = ours(qkv, grad, lengths, weights or (None, None))[:-1]
    plain, truth = exact(qkv, grad, lengths, dtype, weights), exact(qkv, grad, lengths, torch.float64, weights)
    for i, (ours_, plain_, true) in enumerate(zip(mine, plain, truth, strict=True)):
        assert ours_.dtype == (dtype if i < 2 else torch.float32) and ours_.shape == true.shape
        assert_close_as_plain(ours_, plain_, true, dtype)


# With several tiles in both directions for warp groups of 64 rows: more queries than keys, fewer, and as many.
HOPPER_CASES = [*CASES, (200, 1, 72, 200, [200, 97]), (270, 1, 64, 130, [270, 129]), (210, 1, 128, 210, [64, 210])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_devices_with_wgmma(case, dtype, hopper):
    qkv, grad, lengths = make(*case, dtype, spread=2.0)
    *mine, lse = ours(qkv, grad, lengths)
    plain, truth = exact(qkv, grad, lengths, dtype), exact(qkv, grad, lengths, torch.float64)
    for ours_, plain_, true in zip(mine, plain, truth, strict=True):
        assert ours_.dtype == dtype and ours_.shape == true.shape
        assert_close_as_plain(ours_, plain_, true, dtype)
    assert_lse_and_zeros(qkv, grad, lengths, mine[0], mine[1], lse)


@pytest.mark.parametrize("case", [(70, 2, 72, 70, [70, 40, 70]), (170, 1, 128, 100, [3, 170])], ids=str)
def test_an_image_does_not_depend_on_its_batch_with_wgmma(case, hopper):
    assert_independent_images(*make(*case, torch.bfloat16), (None, None))


def test_large_scores_do_not_overflow_with_wgmma(hopper):
    assert_large_scores_are_right(70)
    assert_large_scores_are_right(150, [150, 1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lse_and_tokens_that_do_not_take_part(case):
    qkv, grad, lengths = make(*case, torch.bfloat16)
    assert_lse_and_zeros(qkv, grad, lengths, *ours(qkv, grad, lengths))


def test_large_scores_do_not_overflow():
    assert_large_scores_are_right(70)


@pytest.mark.parametrize("weights", [(None, None), norm_weights(72)], ids=["plain", "qk-norm"])
def test_an_image_does_not_depend_on_its_batch(weights):
    assert_independent_images(*make(70, 2, 72, 70, [70, 40, 70], torch.bfloat16), weights)


def test_wrong_inputs_are_refused():
    qkv, grad, _ = make(8, 1, 64, 8, None, torch.bfloat16)
    cases = [(qkv.float(), None, 8, "bfloat16 or float16"), (qkv[..., :32], None, 8, "heads of 64, 72 or 128"), (qkv[:, :, 0], None, 8, "must have shape"),
             (qkv, None, 9, "num_queries"), (qkv.transpose(0, 1), None, 2, "contiguous"), (qkv, torch.tensor([8]), 8, "key_lengths")]
    for wrong, lengths, queries, message in cases:
        with pytest.raises(RuntimeError, match=message):
            CUDA.attention_forward(wrong, lengths, None, None, queries, 0.1, 1e-6)
    for weights in ((torch.ones(64), None), (torch.ones(64), torch.ones(63)), (torch.ones(64).bfloat16(),) * 2):
        with pytest.raises(RuntimeError, match="QK-norm"):
            CUDA.attention_forward(qkv, None, *weights, 8, 0.1, 1e-6)
    assert CUDA.attention_forward(qkv[:0], None, None, None, 8, 0.1, 1e-6)[0].shape == (0, 8, 1, 64)
    assert CUDA.attention_forward(qkv, None, None, None, 0, 0.1, 1e-6)[0].shape == (2, 0, 1, 64)
