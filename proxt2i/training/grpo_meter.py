"""What a GRPO run measures between two log lines, over all ranks, without a device synchronisation per step."""

from __future__ import annotations

import contextlib
import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from proxt2i.diffusion.policy import Policy
from proxt2i.grpo_config import GrpoConfig, trains_last_call
from proxt2i.training.distributed import Ranks
from proxt2i.training.meter import device_peak, peak_memory
from proxt2i.training.rollouts import Experience

TRANSITION = ("objective", "log_ratio_abs", "kl", "clip_fraction")
SHARES = {"rollout": "rollout_share", "reward": "reward_share", "reward_wait": "reward_wait", "train": "train_share"}  # phase: its name in a row


def passes_per_image(config: GrpoConfig, policy: Policy) -> tuple[float, float]:
    """Forward passes of the network over one image, (to draw it, to train on it), a guided evaluation counted twice and a backward pass as two, or with
    LoRA as one: the frozen weights have no gradient.

    What is computed again (old outputs, gradient checkpointing) does not count, nor do the VAE and the rewards.
    """
    how, costs = config.policy, [1 if scale in (0, 1) else 2 for scale in policy.guidance]
    steps = how.steps if how.steps is not None else range(policy.num_transitions)
    transitions = (how.window or len(steps)) * sum(costs[i] for i in steps) / len(steps)
    training = 2 if how.lora_rank else 3
    others = costs[-1] * trains_last_call(config) + bool(how.data_weight)
    return sum(costs), (training * (transitions + others) + bool(how.kl) * transitions) * how.inner_epochs


class GrpoMeter:
    """flops: useful operations of an image, drawn and trained on.  peak: bf16 TFLOP/s of one rank's device; None: as for `Meter`."""

    def __init__(self, ranks: Ranks, flops: float, peak: float | None = None):
        self.ranks, self.flops, self.peak = ranks, flops, peak or device_peak(ranks)
        self.reset()

    def reset(self) -> None:
        self.data_sum, self.data_count = torch.zeros((), dtype=torch.float64, device=self.ranks.device), 0
        self.sums = torch.zeros(len(TRANSITION), dtype=torch.float64, device=self.ranks.device)
        self.count = self.images = self.flat_groups = self.rollouts = 0
        self.largest = torch.zeros((), device=self.ranks.device)
        self.last_calls: dict[str, Tensor] = {}  # reward: sum and number
        self.grad_norms: list[float] = []
        self.rewards: dict[str, list[Tensor]] = {}
        self.spreads: list[float] = []
        self.seconds = {"rollout": 0.0, "train": 0.0, "paused": 0.0, "reward": 0.0, "reward_wait": 0.0}
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

    def add_last_call(self, reward: str, values: Tensor) -> None:
        """Of a micro-batch, [B]: what the differentiable path of a reward says of the last call."""
        new = torch.stack([values.detach().double().sum(), torch.full((), len(values), dtype=torch.float64, device=values.device)])
        self.last_calls[reward] = self.last_calls.get(reward, 0) + new.to(self.ranks.device)

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
        self.seconds["reward"] += experience.reward_seconds
        self.seconds["reward_wait"] += experience.reward_wait

    def summary(self) -> dict[str, float]:
        """Means since the last reset, and a reset. Collective. Non-numbers are left out.

        objective, kl (nats of a transition), log_ratio_abs, clip_fraction: over transitions. reward/NAME: over images; reward_std/NAME: within
        groups is what advantages use, this is over all images. last_call/NAME: the differentiable reward of `policy.reward_gradient`.
        Shares are of the time that was not paused, means over ranks: rollout_share (drawing, decoding and waiting for scores) and train_share together are
        nearly all of it; reward_share is what the rewards took, in their own thread while pictures are drawn, and reward_wait the part of the rollout that
        waited for them. tflops_per_s, mfu: of useful operations (`passes_per_image`).
        """
        spread = [s for s in self.spreads if math.isfinite(s)]
        phases = [self.seconds[phase] for phase in SHARES]
        counts = torch.tensor([self.data_count, self.count, sum(spread), len(spread), *phases], dtype=torch.float64, device=self.ranks.device)
        totals = torch.cat([self.sums, self.data_sum[None], counts])
        dist.all_reduce(totals)
        *sums, data_sum, data_count, count, spread_sum, spread_count = totals[:-len(SHARES)].tolist()
        phases = totals[-len(SHARES):] / self.ranks.world_size
        largest = torch.stack([self.largest.double(), torch.tensor(float(peak_memory(self.ranks)), dtype=torch.float64, device=self.ranks.device)])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        seconds = time.perf_counter() - self.started - self.seconds["paused"]
        row = {name: value / max(count, 1) for name, value in zip(TRANSITION, sums)}
        if data_count:
            row["data_loss"] = data_sum / data_count
        row |= {"log_ratio_max": float(largest[0]), "grad_norm": sum(self.grad_norms) / max(len(self.grad_norms), 1)}
        for name, total in self.last_calls.items():
            dist.all_reduce(total)
            row[f"last_call/{name}"] = (total[0] / total[1]).item()
        for name, parts in self.rewards.items():
            scores = torch.cat(parts)
            row |= {f"reward/{name}": scores.mean().item(), f"reward_std/{name}": scores.std().item()}
        tflops_per_s = self.images * self.flops / seconds / 1e12
        row |= {"flat_groups": self.flat_groups / max(self.rollouts, 1), "spread": spread_sum / max(spread_count, 1),
                "images_per_s": self.images / seconds, "tflops_per_s": tflops_per_s,
                **{name: value / seconds for name, value in zip(SHARES.values(), phases.tolist())}, "memory_gib": float(largest[1]) / 2**30}
        if self.peak:
            row["mfu"] = tflops_per_s / (self.peak * self.ranks.world_size)
        self.reset()
        return {key: value for key, value in row.items() if math.isfinite(value)}
