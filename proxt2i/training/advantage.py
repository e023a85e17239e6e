"""GRPO's arithmetic: advantages within groups, the clipped surrogate of a transition, and how far a group's pictures are apart. No networks, no ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from proxt2i.rewards import RewardSettings, combine


def advantages(scores: dict[str, Tensor], settings: Sequence[RewardSettings], group_size: int, clip: float) -> tuple[Tensor, int]:
    """(advantage of every image, float32 [B]; number of groups that can teach nothing).

    scores: of each reward, [B], images of a group standing together. An image's advantage is the weighted sum of its rewards, each less its
    group's mean and over its group's standard deviation (`rewards.combine`), clipped to +-clip. Where no reward tells a group's
    images apart it is exactly 0.
    """
    group = torch.arange(len(next(iter(scores.values())))) // group_size
    by_group = torch.stack([scores[s.key].cpu().reshape(-1, group_size) for s in settings if s.weight])
    flat = (by_group.amax(2) == by_group.amin(2)).all(0)  # [groups]
    total = combine(scores, settings, group).clamp(-clip, clip)
    return torch.where(flat[group], 0.0, total), int(flat.sum())


def reward_scales(scores: dict[str, Tensor], settings: Sequence[RewardSettings], group_size: int) -> dict[str, float]:
    """What a unit of each reward is worth in an advantage, for its gradient: weight over the root mean square of its standard deviations within groups.

    One number for all groups: a group whose images hardly differ would else count without bound. Of a reward that tells no images apart it is 0.
    """
    within = {s.key: scores[s.key].double().cpu().reshape(-1, group_size).var(1, correction=0).mean().sqrt().item() for s in settings if s.weight}
    return {s.key: s.weight / max(within[s.key], s.std_floor) if within[s.key] else 0.0 for s in settings if s.weight}


def surrogate(log_ratio: Tensor, advantage: Tensor, clip: float, elements: int) -> tuple[Tensor, Tensor]:
    """(what is to be maximised [B], whether an image is outside the trust region and gets no gradient, bool [B]).

    With r the likelihood ratio of a transition of d = `elements` dimensions, the d-th root r^(1/d) is PPO's ratio here, as in Flow-GRPO and
    DanceGRPO (log densities averaged over d), and clip / d its range; times d, so that gradients and the weight of the KL divergence do
    not depend on d:    min(s A, clamp(s, -clip, clip) A),    s = d (r^(1/d) - 1), which is log r for large d.

    Why the root: r itself is e^N(-K, 2K), and its variance makes an update on a transition of K nats useless at once; s has the same
    gradient at r = 1, and log r's everywhere. Why a range that is constant in nats of the whole transition: it bounds how
    far the two densities are apart, whatever the size of the picture. Flow-GRPO's 1e-4 at d = 16,384 is clip = 1.6.
    """
    s = elements * torch.expm1(log_ratio / elements)
    value = torch.minimum(s * advantage, s.clamp(-clip, clip) * advantage)
    outside = torch.where(advantage > 0, s > clip, s < -clip) & (advantage != 0)
    return value, outside


# -- variety ----------------------------------------------------------------------------------------------------------

COARSE = 8  # pixels a side: where things are and in which colour, not whether a prompt's words are to be seen in them


def coarse(pictures: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], averaged to 8 x 8: float32 [B, 192]."""
    return F.adaptive_avg_pool2d(pictures.float(), COARSE).flatten(1)


@dataclass
class Spread:
    """Of the group of each image, as it was drawn: mean [B, F] and variance, the mean of |look - mean|^2, [B]."""

    mean: Tensor
    variance: Tensor

    def of(self, images, device: torch.device) -> Spread:
        return Spread(self.mean[images].to(device), self.variance[images].to(device))

    def apart(self, looks: Tensor) -> Tensor:
        """|look - mean|^2 / (2 variance), [B]. Where the pictures are still as drawn, the gradient of its sum over a group of G is that of
        G/2 log(variance): to be maximised, so that a group that draws together is held apart, whatever the scale. Each image needs only
        itself, so it does not matter how groups are cut into micro-batches."""
        return (looks - self.mean).square().sum(1) / (2 * self.variance)


def group_spread(looks: Tensor, group_size: int) -> Spread:
    """looks: [B, F], those of a group standing together."""
    groups = looks.reshape(-1, group_size, looks.shape[1])
    variance = groups.var(1, correction=0).sum(1).clamp_min(1e-12)  # pictures that are all the same stay where they are
    return Spread(groups.mean(1).repeat_interleave(group_size, 0), variance.repeat_interleave(group_size))
