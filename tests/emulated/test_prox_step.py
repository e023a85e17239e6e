"""The CUDA kernels of the fused proximal step, run by the emulator: the bits of the CPU kernels."""

import itertools

import pytest
import torch

from proxt2i.ops import step_row
from proxt2i.ops.prox_step import COEFFICIENTS

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


def table(shape, per_image):
    """float64 rows: one for all, or one an image, of which every other draws no noise."""
    row = torch.tensor(step_row(0.8, guidance_scale=2.5, a=1.2, b=0.6, clean_y=1.1, clean_eps=0.7, memory=0.4, draw=2**33 + 1)).double()
    if not per_image:
        return row
    rows = row.repeat(shape[0], 1)
    rows[::2, COEFFICIENTS.index("b")] = 0
    rows[:, COEFFICIENTS.index("draw")] += torch.arange(shape[0])
    return rows


@pytest.mark.parametrize("dtype, eps_dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prox_step(shape, dtype, eps_dtype):
    y, cond, uncond, noise, seeds = tensors(shape, dtype, eps_dtype)
    for i, (guided, (given, drawn)) in enumerate(itertools.product((True, False), ((noise, None), (None, seeds), (None, None)))):
        arguments = (y, cond, uncond if guided else None, y.flip(0).contiguous() if i % 2 else None, given, drawn)
        for wanted in ((True, True, True), (True, False, False), (False, True, False)):
            options = (table(shape, per_image=i % 3 == 0), *wanted)
            expected = CPU.prox_step(*arguments, *options)
            assert_same_bits(CUDA.prox_step(*arguments, *options), expected)
        shifted = [unaligned(t) for t in arguments[:5]]
        assert_same_bits(CUDA.prox_step(*shifted, drawn, *options), expected)


@pytest.mark.parametrize("count", [0, 1, 4, 1027, 5000])
def test_philox_normal(count):
    for seeds in (torch.tensor([0, -1, 2**62 + 5, 7]), torch.tensor([], dtype=torch.int64)):
        assert_same_bits(CUDA.philox_normal(seeds, 2**40 + 3, count), CPU.philox_normal(seeds, 2**40 + 3, count))


def test_images_and_elements_beyond_the_largest_grid_are_reached_by_striding(order):
    if order == "reverse":
        pytest.skip("the kernels have no barriers, and this is slow")
    row = torch.tensor(step_row(0.5)).double()
    for shape in ((65535 + 5, 1),  # max_grid_y + 5 images
                  (1, 4096 * 256 * 4 + 1027)):  # max_grid_x blocks of 256 threads, four elements each
        arguments = (torch.randn(shape), torch.randn(shape).bfloat16(), None, None, None, None, row, True, False, False)
        assert_same_bits(CUDA.prox_step(*arguments), CPU.prox_step(*arguments))
