"""What a GRPO run measures between two log lines, over all ranks, without a device synchronisation per step."""

from __future__ import annotations

import contextlib
import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from proxt2i.training.distributed import Ranks
from proxt2i.training.meter import peak_memory
from proxt2i.training.rollouts import Experience

TRANSITION = ("objective", "log_ratio_abs", "kl", "clip_fraction")


class GrpoMeter:
    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.reset()

    def reset(self) -> None:
        self.data_sum, self.data_count = torch.zeros((), dtype=torch.float64, device=self.ranks.device), 0
        self.sums = torch.zeros(len(TRANSITION), dtype=torch.float64, device=self.ranks.device)
        self.count = self.images = self.flat_groups = self.rollouts = 0
        self.largest = torch.zeros((), device=self.ranks.device)
        self.grad_norms: list[float] = []
        self.rewards: dict[str, list[Tensor]] = {}
        self.spreads: list[float] = []
        self.seconds = {"rollout": 0.0, "train": 0.0, "paused": 0.0}
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def timed(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def add_transition(self, value: Tensor, log_ratio: Tensor, kl: Tensor, outside: Tensor) -> None:
        """Of a micro-batch, [B] each."""
        values = torch.stack([value.detach(), log_ratio.detach().abs(), kl.detach(), outside.to(value.dtype)]).double()
        self.sums += values.sum(1)
        self.largest = torch.maximum(self.largest, log_ratio.detach().abs().max())
        self.count += len(value)

    def add_data(self, losses: Tensor) -> None:
        """Weighted losses of a micro-batch of data, [B]."""
        self.data_sum += losses.detach().double().sum()
        self.data_count += len(losses)

    def add_rollout(self, experience: Experience) -> None:
        for name, scores in experience.scores.items():
            self.rewards.setdefault(name, []).append(scores)
        self.images += len(next(iter(experience.scores.values())))
        self.flat_groups += experience.flat_groups
        self.rollouts += 1
        self.spreads.append(experience.spread)

    def summary(self) -> dict[str, float]:
        """Means since the last reset, and a reset. Collective. Non-numbers are left out.

        objective, kl (nats of a transition), log_ratio_abs, clip_fraction: over transitions. reward/NAME: over images; reward_std/NAME: within
        groups is what advantages use, this is over all images. rollout_share, train_share: of the time that was not paused.
        """
        spread = [s for s in self.spreads if math.isfinite(s)]
        counts = torch.tensor([self.data_count, self.count, sum(spread), len(spread)], dtype=torch.float64, device=self.ranks.device)
        totals = torch.cat([self.sums, self.data_sum[None], counts])
        dist.all_reduce(totals)
        *sums, data_sum, data_count, count, spread_sum, spread_count = totals.tolist()
        largest = torch.stack([self.largest.double(), torch.tensor(float(peak_memory(self.ranks)), dtype=torch.float64, device=self.ranks.device)])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        seconds = time.perf_counter() - self.started - self.seconds["paused"]
        row = {name: value / max(count, 1) for name, value in zip(TRANSITION, sums)}
        if data_count:
            row["data_loss"] = data_sum / data_count
        row |= {"log_ratio_max": float(largest[0]), "grad_norm": sum(self.grad_norms) / max(len(self.grad_norms), 1)}
        for name, parts in self.rewards.items():
            scores = torch.cat(parts)
            row |= {f"reward/{name}": scores.mean().item(), f"reward_std/{name}": scores.std().item()}
        row |= {"flat_groups": self.flat_groups / max(self.rollouts, 1), "spread": spread_sum / max(spread_count, 1),
                "images_per_s": self.images / seconds, "rollout_share": self.seconds["rollout"] / seconds,
                "train_share": self.seconds["train"] / seconds,
                "memory_gib": float(largest[1]) / 2**30}
        self.reset()
        return {key: value for key, value in row.items() if math.isfinite(value)}
