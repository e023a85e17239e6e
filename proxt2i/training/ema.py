"""Exponential moving average of the weights, its half-life counted in images (as in EDM2)."""

from __future__ import annotations

import torch
from torch import Tensor


class EMA:
    """`averages` trail `weights` (lists of fp32 tensors of the same shapes) with a half-life of `half_life` images.

    While the run is young the half-life is `ramp` times the images seen so far, so that the random initial weights
    are forgotten. Under ZeRO the weights are this rank's partitions: every rank averages what it owns, and nothing else.
    """

    def __init__(self, weights: list[Tensor], half_life: int, ramp: float):
        self.weights, self.averages = weights, [w.detach().clone() for w in weights]
        self.half_life, self.ramp = half_life, ramp

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Weight of the old average at the step that ends with `images_seen` images."""
        half_life = min(self.half_life, self.ramp * images_seen)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        torch._foreach_lerp_(self.averages, self.weights, 1 - self.decay(images_seen, batch_size))
