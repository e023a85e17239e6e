"""Muon's update against singular value decompositions, and its ZeRO slices against the whole matrices."""

import os
import sys
import textwrap

import pytest
import torch

from proxt2i.training.muon import NEWTON_SCHULZ, ROUNDS, Muon, orthogonalize, orthogonalize_slice

SHAPES = [torch.Size(shape) for shape in ((6, 6), (18, 6), (6, 24), (18, 6))]


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def by_svd(x):
    """What the iteration does to the singular values, done to the singular values."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    s = s / s.norm()
    for _ in range(ROUNDS):
        s = a * s + b * s**3 + c * s**5
    return (u * s @ vt).float()


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_orthogonalize_changes_singular_values_alone(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalize(x), torch.stack([by_svd(m) for m in x]), atol=2e-5, rtol=1e-4)


def test_singular_values_are_near_one():
    x = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(2)) * 1e-6
    values = torch.linalg.svdvals(orthogonalize(x))
    assert 0.6 < values.min() and values.max() < 1.25


def test_zero_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def test_step_by_hand():
    """Two steps: momentum, Nesterov's look-ahead, decay, and the aspect-ratio factor; AdamW's group is AdamW's."""
    start, other = matrices(), torch.ones(3)
    flat = torch.nn.Parameter(torch.cat([m.flatten() for m in start]))
    plain, twin = torch.nn.Parameter(other.clone()), torch.nn.Parameter(other.clone())
    muon = Muon([{"params": [flat], "matrix_shapes": SHAPES, "momentum": 0.9, "weight_decay": 0.1, "lr": 0.05},
                 {"params": [plain], "weight_decay": 0.0}], lr=0.01)
    adamw = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0)
    momenta = [torch.zeros_like(m) for m in start]
    for i in (1, 2):
        gradients = matrices(seed=i)
        flat.grad, plain.grad, twin.grad = torch.cat([g.flatten() for g in gradients]), other * i, other * i
        muon.step()
        adamw.step()
        for m, gradient, momentum in zip(start, gradients, momenta):
            momentum.mul_(0.9).add_(gradient, alpha=0.1)
            rows, columns = m.shape
            m.mul_(1 - 0.05 * 0.1).sub_(0.05 * max(1, rows / columns) ** 0.5 * by_svd(0.9 * momentum + 0.1 * gradient))
    torch.testing.assert_close(flat.detach(), torch.cat([m.flatten() for m in start]), atol=2e-5, rtol=1e-4)
    assert torch.equal(plain, twin)
    assert len(muon.param_groups) == 2


RANK = """
    import sys, torch
    import torch.distributed as dist
    from tests.test_muon import SHAPES, matrices
    from proxt2i.training.muon import orthogonalize_slice
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=rank, world_size=2)
    whole = torch.cat([m.flatten() for m in matrices()])
    whole = torch.nn.functional.pad(whole, (0, 10))  # ZeRO pads; the middle falls inside a matrix
    half = len(whole) // 2
    torch.save(orthogonalize_slice(whole[rank * half:(rank + 1) * half], SHAPES), f"{sys.argv[2]}/{rank}.pt")
    dist.destroy_process_group()
"""


def test_two_ranks_make_the_update_of_one(tmp_path):
    import subprocess
    from pathlib import Path

    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    both = torch.cat([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)])
    expected = orthogonalize_slice(torch.cat([m.flatten() for m in matrices()]), SHAPES)
    torch.testing.assert_close(both[:-10], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(both[-10:], torch.zeros(10))
