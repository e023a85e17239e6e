"""Averages between two log lines, over all ranks, without a device synchronisation per step."""

from __future__ import annotations

import math
import resource
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from proxt2i.training.distributed import Ranks
from proxt2i.training.objective import Objective


class Meter:
    def __init__(self, objective: Objective, ranks: Ranks):
        self.group_names, self.ranks = objective.group_names, ranks
        self.group_of_bucket = objective.group_of_bucket
        self.reset()

    def reset(self) -> None:
        self.loss_sum = torch.zeros(len(self.group_names), dtype=torch.float64, device=self.ranks.device)
        self.loss_count = torch.zeros_like(self.loss_sum)
        self.grad_norms: list[float] = []
        self.images = 0
        self.data_seconds = self.paused_seconds = 0.0
        self.started = time.perf_counter()

    def add_losses(self, losses: Tensor, bucket: Tensor) -> None:
        """losses: [B], detached; bucket: int64 [B] on the CPU. Non-finite losses are left out."""
        group = self.group_of_bucket[bucket].to(losses.device)
        finite = losses.isfinite()
        self.loss_sum.index_add_(0, group, torch.where(finite, losses, 0.0).double())
        self.loss_count.index_add_(0, group, finite.double())

    def summary(self) -> dict[str, float]:
        """Means since the last reset, and a reset. Collective. Non-numbers are left out."""
        totals = torch.stack([self.loss_sum, self.loss_count])
        dist.all_reduce(totals)
        sums, counts = totals.tolist()
        seconds = time.perf_counter() - self.started - self.paused_seconds
        row = {
            "loss": sum(sums) / max(sum(counts), 1.0),
            "grad_norm": sum(self.grad_norms) / max(len(self.grad_norms), 1),
            "images_per_s": self.images / seconds,
            "data_wait": self.data_seconds / seconds,
            "memory_gib": peak_memory(self.ranks) / 2**30,
        }
        row |= {f"loss/{name}": s / c for name, s, c in zip(self.group_names, sums, counts) if c}
        self.reset()
        return {key: value for key, value in row.items() if math.isfinite(value)}


def peak_memory(ranks: Ranks) -> int:
    """Largest memory of this rank so far, in bytes: allocated on the GPU, or resident in the process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
