"""Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for the rest, under ZeRO-1 and ZeRO-2.

Muon's update is the momentum with all its singular values moved to about 1. ZeRO hands an optimizer one flat slice per
parameter group and rank, so whole matrices are gathered first; each rank then orthogonalises only those that its own
slice touches. The state is one momentum per value, in the slice's layout, as AdamW's moments are.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values in (0, 1] go to 0.7 ... 1.2 in five rounds
ROUNDS = 5


class Muon(torch.optim.AdamW):
    """Groups with `matrix_shapes` (the shapes of their parameters, in order) are Muon's; all others are AdamW's.

    A Muon group has the settings lr, momentum and weight_decay, and, once ZeRO has flattened it, one parameter: this
    rank's slice [n], float32, of all matrices laid end to end, zero-padded to n times the number of ranks.
    """

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        for group in groups:
            if "matrix_shapes" in group:
                self._muon_step(group)
        self.param_groups = [group for group in groups if "matrix_shapes" not in group]
        if self.param_groups:
            super().step()
        self.param_groups = groups

    def _muon_step(self, group: dict) -> None:
        (weights,) = group["params"]
        state = self.state[weights]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weights)
        momentum, beta = state["momentum_buffer"], group["momentum"]
        momentum.lerp_(weights.grad, 1 - beta)
        update = orthogonalize_slice(weights.grad.lerp(momentum, beta), group["matrix_shapes"])  # Nesterov's look-ahead
        weights.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def orthogonalize_slice(slice_: Tensor, shapes: list[torch.Size]) -> Tensor:
    """This rank's slice [n] of the orthogonalised matrices, given its slice of the matrices. Collective.

    Each matrix [m, n] is scaled by sqrt(max(1, m / n)) besides, so that one learning rate suits all shapes.
    """
    first = dist.get_rank() * len(slice_) if dist.is_initialized() else 0
    whole = _gather(slice_)
    result, wanted, offset = torch.zeros_like(slice_), defaultdict(list), 0
    for shape in shapes:
        if offset < first + len(slice_) and offset + shape.numel() > first:
            wanted[shape].append(offset)
        offset += shape.numel()
    for shape, offsets in wanted.items():  # equal shapes together: one batched product for all
        matrices = torch.stack([whole[offset:offset + shape.numel()].view(shape) for offset in offsets])
        updates = orthogonalize(matrices).flatten(1) * math.sqrt(max(1.0, shape[0] / shape[1]))
        for offset, update in zip(offsets, updates):
            start, stop = max(offset, first), min(offset + len(update), first + len(slice_))
            result[start - first:stop - first] = update[start - offset:stop - offset]
    return result


def _gather(slice_: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return slice_
    whole = slice_.new_empty(dist.get_world_size() * len(slice_))
    dist.all_gather_into_tensor(whole, slice_.contiguous())
    return whole


def orthogonalize(x: Tensor, rounds: int = ROUNDS) -> Tensor:
    """[K, m, n] float32 -> the same matrices with singular values in about 0.7 ... 1.2 (0 stays 0).

    Newton-Schulz, X <- (a + b X X^T + c (X X^T)^2) X, on the smaller Gram matrix alone: R = X X^T and the product Q of
    the polynomials are k x k with k = min(m, n), and X is touched twice in all instead of twice a round.
    """
    a, b, c = NEWTON_SCHULZ
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, rounds).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, product = x @ x.mT, None
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for i in range(rounds):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        product = polynomial if product is None else polynomial @ product
        if i + 1 < rounds:
            gram = polynomial @ gram @ polynomial
    return product @ x
