"""Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for the rest, under every stage of ZeRO.

Muon's update is the momentum with all its singular values moved to about 1. ZeRO hands an optimizer flat tensors that hold
only pieces of matrices, so every matrix has an owner among the ranks: the others send it their pieces, it orthogonalises the
whole, and sends the pieces of the result back. A rank never holds more matrices than its share. The state is one momentum
per value, in the flat layout, as AdamW's moments are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from proxt2i.ops.orthogonalize import ROUNDS, orthogonalize


@dataclass(frozen=True)
class Span:
    """Values `start` ... `stop` of a flattened matrix, which begin at `offset` in the flat tensor of `rank`."""

    rank: int
    start: int
    stop: int
    offset: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def values(self) -> slice:
        """Which of the matrix."""
        return slice(self.start, self.stop)

    @property
    def place(self) -> slice:
        """Where they lie in the flat tensor."""
        return slice(self.offset, self.offset + len(self))


@dataclass(frozen=True)
class Matrix:
    shape: torch.Size
    spans: list[Span]  # in the order of their values, together all of them


class Muon(torch.optim.AdamW):
    """Groups with a `momentum` are Muon's; all others are AdamW's.

    A Muon group has the settings lr, momentum and weight_decay, and flat float32 tensors as parameters.
    exchanges: for each of these tensors, the matrices that lie in it. device: where they are orthogonalised (None: where they are).
    skip: asked before every step; while it is true, a step leaves weights and state as they are.
    """

    exchanges: dict[Tensor, Exchange]
    device: torch.device | None = None
    skip = staticmethod(lambda: False)

    @torch.no_grad()
    def step(self, closure=None):
        if self.skip():
            return
        groups = self.param_groups
        for group in groups:
            for weights in group["params"] if "momentum" in group else ():
                self._muon_step(weights, group)
        self.param_groups = [group for group in groups if "momentum" not in group]
        if self.param_groups:
            super().step()
        self.param_groups = groups

    def _muon_step(self, weights: Tensor, group: dict) -> None:
        state = self.state[weights]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weights)
        momentum, beta = state["momentum_buffer"], group["momentum"]
        momentum.lerp_(weights.grad, 1 - beta)
        ahead = weights.grad.lerp_(momentum, beta)  # Nesterov's look-ahead; the gradient is not needed any more
        update = self.exchanges[weights].orthogonalize(ahead.to(self.device or ahead.device)).to(weights.device)
        weights.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


class Exchange:
    """Orthogonalises matrices that lie in pieces on several ranks. Made from the same list on every rank."""

    def __init__(self, matrices: list[Matrix]):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        owners = assign(matrices, world)
        self.shapes = {i: m.shape for i, (m, owner) in enumerate(zip(matrices, owners)) if owner == rank}
        self.alike: dict[torch.Size, list[int]] = {}  # equal shapes together: one batched product for all
        for i, shape in self.shapes.items():
            self.alike.setdefault(shape, []).append(i)
        # What travels between two ranks, in an order that both know: by matrix, then by place in it.
        sent = [[span for m, owner in zip(matrices, owners) if owner == other for span in m.spans if span.rank == rank]
                for other in range(world)]
        arriving = [[(i, span) for i in self.shapes for span in matrices[i].spans if span.rank == other] for other in range(world)]
        self.send_sizes = [sum(map(len, spans)) for spans in sent]
        self.receive_sizes = [sum(len(s) for _, s in spans) for spans in arriving]
        self.sent, self.arriving = list(chain.from_iterable(sent)), list(chain.from_iterable(arriving))

    def orthogonalize(self, flat: Tensor) -> Tensor:
        """flat [n]: this rank's pieces of the matrices. Returns [n], the same pieces of the orthogonalised ones. Collective.

        Each matrix [m, n] is scaled by sqrt(max(1, m / n)) besides, so that one learning rate suits all shapes.
        """
        if len(self.send_sizes) == 1:  # nothing travels
            incoming = [flat[s.place] for s in self.sent]
        else:
            outgoing = torch.cat([flat[:0], *(flat[s.place] for s in self.sent)])
            incoming = _exchange(outgoing, self.send_sizes, self.receive_sizes).split([len(s) for _, s in self.arriving])
        batches = {shape: flat.new_empty((len(members), *shape)) for shape, members in self.alike.items()}
        for (i, s), values in zip(self.arriving, incoming):
            self._matrix(batches, i)[s.values] = values
        batches = {shape: orthogonalize(batch, scale=math.sqrt(max(1.0, shape[0] / shape[1]))) for shape, batch in batches.items()}
        returned = [self._matrix(batches, i)[s.values] for i, s in self.arriving]
        if len(self.send_sizes) > 1:
            updates = torch.cat([flat[:0], *returned])
            returned = _exchange(updates, self.receive_sizes, self.send_sizes).split(list(map(len, self.sent)))
        result = torch.zeros_like(flat)
        for s, values in zip(self.sent, returned):
            result[s.place] = values
        return result

    def _matrix(self, batches: dict[torch.Size, Tensor], i: int) -> Tensor:
        """Matrix i in its batch, flattened: a view."""
        return batches[self.shapes[i]][self.alike[self.shapes[i]].index(i)].view(-1)


def assign(matrices: list[Matrix], world: int) -> list[int]:
    """The owner of each matrix: whoever holds the most of it, unless that rank already has more than its share."""
    share = sum(_cost(m.shape) for m in matrices) / world
    loads, owners = [0.0] * world, []
    for m in matrices:
        held = defaultdict(int)
        for span in m.spans:
            held[span.rank] += len(span)
        cost = _cost(m.shape)
        best = max(held, key=lambda rank: (held[rank], -loads[rank], -rank))
        if loads[best] + cost > share:
            best = min(range(world), key=lambda rank: (loads[rank], -held[rank], rank))
        loads[best] += cost
        owners.append(best)
    return owners


def _cost(shape: torch.Size) -> float:
    """Arithmetic of one orthogonalisation, up to a factor: products with the Gram matrix, and of it with itself."""
    small, large = sorted(shape)
    return 2.0 * small * small * large + 3.0 * ROUNDS * small**3


def _exchange(outgoing: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
    """Each rank's parts for the others, laid end to end -> the others' parts for this one."""
    incoming = outgoing.new_empty(sum(receive_sizes))
    dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes)
    return incoming
