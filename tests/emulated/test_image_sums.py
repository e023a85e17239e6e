"""The CUDA kernels of the likelihood ratio and of the matching loss, run by the emulator: the bits of the CPU kernels."""

import itertools

import pytest
import torch

from proxt2i import _C  # noqa: F401  (registers torch.ops.proxt2i.*)

CPU, CUDA = torch.ops.proxt2i, torch.ops.proxt2i_emulated
if not hasattr(CUDA, "matching_errors"):
    pytest.skip("the emulated kernels are not loaded", allow_module_level=True)
# A warp sums 512 elements; 9000: three blocks of eight warps; 17000: more chunks than lanes in the last sum.
SHAPES = [(0, 3), (3, 0), (1, 1), (5,), (2, 3), (3, 4), (2, 511), (2, 512), (3, 513), (2, 4, 700), (2, 9000), (1, 17000)]
TYPES = [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


def assert_same_bits(ours, theirs):
    for mine, other in zip(*[(t,) if isinstance(t, torch.Tensor) else t for t in (ours, theirs)], strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[mine.dtype.itemsize]
        numbers = ~mine.isnan()  # the mean of an empty image is a NaN, whose bits are nobody's promise
        assert torch.equal(numbers, ~other.isnan()) and torch.equal(mine.view(bits)[numbers], other.view(bits)[numbers])


def unaligned(t):
    """The same values from one element behind an aligned address."""
    return None if t is None else torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def shifted(arguments, shape):
    return [unaligned(t) if isinstance(t, torch.Tensor) and t.shape == shape else t for t in arguments]


def tensors(shape, dtype):
    """Five of the shape; seeds, steps; three numbers an image."""
    generator = torch.Generator().manual_seed(len(shape))
    full = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(5)]
    integers = [torch.randint(low, 2**62, shape[:1], generator=generator) for low in (-(2**62), 0)]
    return full, integers, torch.rand(*shape[:1], 3, generator=generator, dtype=dtype) + 0.5


@pytest.mark.parametrize("dtype, eps_dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_transition(shape, dtype, eps_dtype):
    (cond, uncond, old, ref, noise), drawn, numbers = tensors(shape, dtype)
    cond, uncond, (scale, *grads) = cond.to(eps_dtype), uncond.to(eps_dtype), numbers.T
    for guidance, reference, z in itertools.product((uncond, None), (ref, None), ((noise, None, None), (None, *drawn))):
        arguments = (cond, guidance, old, reference, *z, scale, 2.5)
        for there in (arguments, shifted(arguments, cond.shape)):
            assert_same_bits(CUDA.transition_log_ratio(*there), CPU.transition_log_ratio(*arguments))
            assert_same_bits(CUDA.transition_log_ratio_backward(*grads, *there), CPU.transition_log_ratio_backward(*grads, *arguments))
    assert_same_bits(CUDA.guided_eps(cond, unaligned(uncond), 2.5), CPU.guided_eps(cond, uncond, 2.5))


@pytest.mark.parametrize("dtype, eps_dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matching(shape, dtype, eps_dtype):
    (x0, y, eps, *_), (seeds, _), coefficients = tensors(shape, dtype)
    eps, grads = eps.to(eps_dtype), coefficients.T[:2]
    for draw in (None, 0, 1):
        arguments = (eps, x0, y, seeds, coefficients, draw)
        for there in (arguments, shifted(arguments, eps.shape)):
            assert_same_bits(CUDA.matching_errors(*there), CPU.matching_errors(*arguments))
            assert_same_bits(CUDA.matching_errors_backward(*grads, *there), CPU.matching_errors_backward(*grads, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_noised_pair(shape, dtype):
    (x0, *_), (seeds, _), coefficients = tensors(shape, dtype)
    coefficients[:1, 1], coefficients[1:2, 2] = 0, 0
    expected = CPU.noised_pair(x0, seeds, coefficients)
    assert_same_bits(CUDA.noised_pair(x0, seeds, coefficients), expected)
    assert_same_bits(CUDA.noised_pair(unaligned(x0), seeds, coefficients), expected)
