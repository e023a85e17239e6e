"""Muon's orthogonalisation: the native kernel against plain torch in float64. What it does to matrices is tested in test_muon.py."""

import itertools

import pytest
import torch
from op_cases import OPS, restore_cpu  # noqa: F401  (a fixture)

from proxt2i import _C
from proxt2i.ops.orthogonalize import NEWTON_SCHULZ, ROUNDS, orthogonalize, orthogonalize_ref

SHAPES = [(1, 32, 32), (3, 64, 64), (2, 96, 32), (2, 32, 160), (1, 128, 96), (1, 96, 256)]


def matrices(shape, dtype=torch.float32, rank=None):
    """Gaussian ones, or products of Gaussians of this rank."""
    generator = torch.Generator().manual_seed(3)
    if rank is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    left, right = (torch.randn(shape[0], side, rank, generator=generator, dtype=torch.float64) for side in shape[1:])
    return (left @ right.mT).to(dtype)


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_torch(shape, isa, restore_cpu):  # noqa: F811
    _C.use_cpu_isa(isa)
    for rank, size, rounds in ((None, 1.0, ROUNDS), (None, 1e-6, 3), (5, 1e4, ROUNDS), (None, 1.0, 1)):
        x = size * matrices(shape, rank=rank)
        right = orthogonalize_ref(x.double(), rounds, 1.5)
        ours, theirs = ((y.double() - right).norm() / right.norm() for y in (orthogonalize(x, rounds, 1.5, impl="native"), orthogonalize_ref(x, rounds, 1.5)))
        assert ours <= 4 * theirs + 1e-6
    x = matrices(shape, torch.float64)
    torch.testing.assert_close(orthogonalize(x, impl="native"), orthogonalize_ref(x, ROUNDS, 1.0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(matrices(shape), scale=2.0, impl="native")) / 2
    clear = torch.linalg.svdvals(matrices(shape)) > 1e-2 * matrices(shape).norm()  # a square one has some near 0
    assert 0.6 < values[clear[..., : values.shape[-1]]].min() and values.max() < 1.25


def test_bits_do_not_depend_on_threads_instruction_set_or_neighbours(restore_cpu):  # noqa: F811
    x, results = matrices((5, 96, 64)), []
    for isa, threads in itertools.product(_C.build_info()["cpu_isas"], (1, 2)):
        _C.use_cpu_isa(isa)
        torch.set_num_threads(threads)
        results += [orthogonalize(x, impl="native"), torch.cat([orthogonalize(part, impl="native") for part in x.split(2)])]
    assert len(results) >= 4 and all(torch.equal(result, results[0]) for result in results)


def test_empty_zero_and_strided_matrices():
    assert orthogonalize(torch.empty(0, 32, 64), impl="native").shape == (0, 32, 64)
    assert torch.equal(orthogonalize(torch.zeros(2, 32, 64), impl="native"), torch.zeros(2, 32, 64))
    x = matrices((2, 64, 96))
    assert torch.equal(orthogonalize(x.mT.contiguous().mT, impl="native"), orthogonalize(x, impl="native"))


def test_others_are_refused_or_left_to_torch():
    with pytest.raises(ValueError, match="impl must be"):
        orthogonalize(torch.ones(1, 32, 32), impl="torch")
    for bad in (torch.ones(1, 32, 33), torch.ones(1, 32, 0), torch.ones(1, 32, 32, dtype=torch.bfloat16), torch.ones(1, 32, 32, device="meta")):
        with pytest.raises(ValueError, match="multiples of 32"):
            orthogonalize(bad, impl="native")
    for bad in (torch.ones(32, 32), torch.ones(1, 31, 32), torch.ones(1, 32, 32, dtype=torch.float16)):
        with pytest.raises(RuntimeError, match="proxt2i: "):
            OPS.orthogonalize(bad, *NEWTON_SCHULZ, 5, 1.0)
    with pytest.raises(RuntimeError, match="rounds must be positive"):
        OPS.orthogonalize(torch.ones(1, 32, 32), *NEWTON_SCHULZ, 0, 1.0)
    x = matrices((2, 20, 36))
    assert torch.equal(orthogonalize(x), orthogonalize_ref(x, ROUNDS, 1.0))


def test_opcheck():
    torch.library.opcheck(OPS.orthogonalize.default, (matrices((2, 32, 64)), *NEWTON_SCHULZ, 5, 1.0))
