"""The CUDA kernels of the fused proximal step, run by the emulator: the bits of the CPU kernels."""

import itertools

import pytest
import torch

from proxt2i import _C  # noqa: F401  (registers torch.ops.proxt2i.*)

CPU, CUDA = torch.ops.proxt2i, torch.ops.proxt2i_emulated
SHAPES = [(0,), (3, 0), (1, 1), (5,), (2, 3), (3, 4), (2, 1027), (3, 4, 8, 10), (2, 5000)]  # 5000: five blocks of 256 threads
TYPES = [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


def assert_same_bits(ours, theirs):
    for mine, other in zip(*[(t,) if isinstance(t, torch.Tensor) else t for t in (ours, theirs)], strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        bits = torch.int64 if mine.dtype == torch.float64 else torch.int32
        assert torch.equal(mine.view(bits), other.view(bits))


def unaligned(t):
    """The same values from one element behind an aligned address."""
    return None if t is None else torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def tensors(shape, dtype, eps_dtype):
    generator = torch.Generator().manual_seed(len(shape))
    y, noise, cond, uncond = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4))
    return y, cond.to(eps_dtype), uncond.to(eps_dtype), noise, torch.randint(-(2**62), 2**62, shape[:1], generator=generator)


@pytest.mark.parametrize("dtype, eps_dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prox_step(shape, dtype, eps_dtype):
    y, cond, uncond, noise, seeds = tensors(shape, dtype, eps_dtype)
    for guided, (given, drawn, b) in itertools.product((True, False), ((noise, None, 0.6), (None, seeds, 0.6), (None, None, 0.0))):
        arguments = (y, cond, uncond if guided else None, given, drawn, 2**33 + 1, 2.5, 0.8, 1.2, b)
        expected = CPU.prox_step(*arguments)
        assert_same_bits(CUDA.prox_step(*arguments), expected)
        shifted = [unaligned(t) for t in arguments[:4]]
        assert_same_bits(CUDA.prox_step(*shifted, *arguments[4:]), expected)


@pytest.mark.parametrize("dtype, eps_dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prox(shape, dtype, eps_dtype):
    y, cond, uncond, _, _ = tensors(shape, dtype, eps_dtype)
    for guidance in (uncond, None):
        assert_same_bits(CUDA.prox(y, cond, guidance, 2.5, 0.8), CPU.prox(y, cond, guidance, 2.5, 0.8))
        assert_same_bits(CUDA.prox(y, unaligned(cond), guidance, 2.5, 0.8), CPU.prox(y, cond, guidance, 2.5, 0.8))


@pytest.mark.parametrize("count", [0, 1, 4, 1027, 5000])
def test_philox_normal(count):
    for seeds in (torch.tensor([0, -1, 2**62 + 5, 7]), torch.tensor([], dtype=torch.int64)):
        assert_same_bits(CUDA.philox_normal(seeds, 2**40 + 3, count), CPU.philox_normal(seeds, 2**40 + 3, count))


def test_images_and_elements_beyond_the_largest_grid_are_reached_by_striding(order):
    if order == "reverse":
        pytest.skip("the kernels have no barriers, and this is slow")
    y = torch.randn(65535 + 5, 1)  # max_grid_y + 5 images
    assert_same_bits(CUDA.prox(y, y.bfloat16(), None, 1.0, 0.5), CPU.prox(y, y.bfloat16(), None, 1.0, 0.5))
    y = torch.randn(1, 4096 * 256 * 4 + 1027)  # max_grid_x blocks of 256 threads, four elements each
    assert_same_bits(CUDA.prox(y, y.bfloat16(), None, 1.0, 0.5), CPU.prox(y, y.bfloat16(), None, 1.0, 0.5))
