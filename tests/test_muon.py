"""Muon's update against singular value decompositions, and its ZeRO slices against the whole matrices."""

import os
import sys
import textwrap

import pytest
import torch

from proxt2i.ops.orthogonalize import NEWTON_SCHULZ, ROUNDS, orthogonalize
from proxt2i.training.muon import Exchange, Matrix, Muon, Span, assign

SHAPES = [torch.Size(shape) for shape in ((6, 6), (18, 6), (6, 24), (18, 6))]


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def end_to_end(slice_size):
    """Layout of ZeRO-1 and -2: the matrices end to end, rank r has the r-th slice."""
    layout, offset = [], 0
    for shape in SHAPES:
        cuts = sorted({offset, offset + shape.numel(), *range(0, 10_000, slice_size)})
        cuts = [cut for cut in cuts if offset <= cut <= offset + shape.numel()]
        layout.append(Matrix(shape, [Span(a // slice_size, a - offset, b - offset, a % slice_size) for a, b in zip(cuts, cuts[1:])]))
        offset += shape.numel()
    return layout


def each_cut(world):
    """Layout of ZeRO-3: every matrix is cut among the ranks, a rank's cuts lie end to end."""
    layout, offset = [], 0
    for shape in SHAPES:
        size = -(-shape.numel() // world)
        layout.append(Matrix(shape, [Span(r, r * size, min((r + 1) * size, shape.numel()), offset) for r in range(world)]))
        offset += size
    return layout


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
    muon = Muon([{"params": [flat], "momentum": 0.9, "weight_decay": 0.1, "lr": 0.05},
                 {"params": [plain], "weight_decay": 0.0}], lr=0.01)
    muon.exchanges = {flat: Exchange(end_to_end(flat.numel()))}
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
    from tests.test_muon import each_cut, end_to_end, matrices
    from proxt2i.training.muon import Exchange
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=rank, world_size=2)
    for name, layout in (("whole", end_to_end(203)), ("each", each_cut(2))):  # the first with padding behind, cut inside a matrix
        flat = torch.zeros(203)
        pieces = [(m.flatten(), s) for m, its in zip(matrices(), layout) for s in its.spans if s.rank == rank]
        for values, s in pieces:
            flat[s.offset:s.offset + s.stop - s.start] = values[s.start:s.stop]
        exchange = Exchange(layout)
        assert 1 <= len(exchange.shapes) < len(layout)  # the work is shared
        torch.save(exchange.orthogonalize(flat), f"{sys.argv[2]}/{name}{rank}.pt")
    dist.destroy_process_group()
"""


def test_two_ranks_make_the_update_of_one(tmp_path):
    import subprocess
    from pathlib import Path

    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(RANK)]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    expected = [by_svd(m) * max(1, m.shape[0] / m.shape[1]) ** 0.5 for m in matrices()]
    for name, layout in (("whole", end_to_end(203)), ("each", each_cut(2))):
        flat = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        for matrix, right in zip(layout, expected):
            update = torch.cat([flat[s.rank][s.offset:s.offset + s.stop - s.start] for s in matrix.spans])
            torch.testing.assert_close(update, right.flatten(), atol=2e-5, rtol=1e-4)


def test_every_rank_gets_its_share_of_the_matrices():
    """Also where the layout gives one rank all of them, or each a part of all."""
    equal = [Matrix(torch.Size((8, 8)), [Span(0, 0, 64, 64 * i)]) for i in range(12)]
    assert sorted(assign(equal, 4)) == sorted([0, 1, 2, 3] * 3)
    cut = [Matrix(torch.Size((8, 8)), [Span(r, 16 * r, 16 * r + 16, 16 * i) for r in range(4)]) for i in range(12)]
    assert sorted(assign(cut, 4)) == sorted([0, 1, 2, 3] * 3)
