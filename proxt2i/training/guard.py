"""Watching for reward hacking: the same prompts and noise, drawn every so often, scored by what is trained and by a panel that is not.

Because prompts and noise stay the same, every image is compared with itself at the start: differences are paired, and small ones count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIGNIFICANT = 2.0  # standard errors


@dataclass
class Evaluation:
    """What one look at the fixed prompts found.

    trained, panel: {reward: score of every image}, images of a prompt standing together.  diversity: {measure: value}.
    """

    trained: dict[str, list[float]]
    panel: dict[str, list[float]]
    diversity: dict[str, float]

    def row(self) -> dict[str, float]:
        """For the statistics: means, and the diversities."""
        means = {f"eval/{name}": sum(v) / len(v) for name, v in (self.trained | self.panel).items()}
        return means | {f"diversity/{name}": value for name, value in self.diversity.items()}


@dataclass
class Guard:
    """min_diversity: share of the start's diversity below which it has collapsed.  alarms: those so far.

    best: name of the checkpoint that looked best without alarm, and its gain.
    """

    min_diversity: float
    start: Evaluation | None = None
    alarms: int = 0
    best: str | None = None
    best_gain: float = -float("inf")
    last_row: dict[str, float] = field(default_factory=dict)

    def judge(self, now: Evaluation) -> str:
        """What is wrong, or "". The first evaluation is the start that others are compared with."""
        self.last_row = now.row()
        if self.start is None:
            self.start = now
            return ""
        problems = [f"diversity of {name} is down to {value / self.start.diversity[name]:.0%} of the start's (guard.min_diversity {self.min_diversity:g})"
                    for name, value in now.diversity.items() if value < self.min_diversity * self.start.diversity[name]]
        risen = [name for name in now.trained if change(self.start.trained[name], now.trained[name])[1] > SIGNIFICANT]
        fallen = {name: change(self.start.panel[name], now.panel[name]) for name in now.panel}
        problems += [f"{', '.join(risen)} rose while {name} of the panel fell by {-mean:.3g} ({-errors:.1f} standard errors)"
                     for name, (mean, errors) in fallen.items() if risen and errors < -SIGNIFICANT]
        self.alarms += bool(problems)
        return "; ".join(problems)

    def gain(self, now: Evaluation) -> float:
        """How much better than the start, in standard errors: the trained rewards' mean, held to the panel's where there is one."""
        gains = [sum(change(start[name], scores[name])[1] for name in scores) / len(scores)
                 for start, scores in ((self.start.trained, now.trained), (self.start.panel, now.panel)) if scores]
        return min(gains)

    def state(self) -> dict:
        start = None if self.start is None else vars(self.start)
        return {"start": start, "alarms": self.alarms, "best": self.best, "best_gain": self.best_gain if self.best else None}

    def load(self, state: dict) -> None:
        self.start = None if state["start"] is None else Evaluation(**state["start"])
        self.alarms, self.best = state["alarms"], state["best"]
        self.best_gain = -float("inf") if state["best_gain"] is None else state["best_gain"]


def change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """(mean of the paired differences, the same in standard errors)."""
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    error = difference.std() / len(difference) ** 0.5
    return difference.mean().item(), (difference.mean() / error.clamp_min(1e-12)).item()


def variances(x: Tensor, group_size: int) -> list[float]:
    """Variance within every group, mean over elements: x [groups * group_size, ...], images of a group standing together."""
    return x.double().reshape(-1, group_size, x[0].numel()).var(1).mean(1).tolist()


def attribute_entropy(predicted: Tensor, stated: Tensor, group_size: int) -> list[float]:
    """Of every group that leaves attributes open: entropy (nats) of what the judge sees there in its pictures, mean over those attributes.

    predicted: int64 [B, A], the judge's; stated: bool [B, A], what the prompt says.
    """
    entropies = []
    for values, said in zip(predicted.split(group_size), stated[::group_size]):
        shares = [values[:, a].bincount().double() / len(values) for a in (~said).nonzero().flatten().tolist()]
        if shares:
            entropies.append(sum(-(p[p > 0] * p[p > 0].log()).sum().item() for p in shares) / len(shares))
    return entropies
