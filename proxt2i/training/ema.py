"""Exponential moving average of the weights, its half-life counted in images (as in EDM2)."""

from __future__ import annotations

import copy

import torch


class EMA:
    """`ema.model` is a frozen fp32 copy of `module` that trails it with a half-life of `half_life` images.

    While the run is young the half-life is `ramp` times the images seen so far, so that the random initial weights
    are forgotten. Every rank keeps the whole average: under ZeRO-1 and -2 every rank has the whole weights as well,
    so no gather is needed.
    """

    def __init__(self, module: torch.nn.Module, half_life: int, ramp: float):
        self.model = copy.deepcopy(module).eval().requires_grad_(False)
        self.half_life, self.ramp = half_life, ramp
        self._averages, self._weights = list(self.model.parameters()), list(module.parameters())

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Weight of the old average at the step that ends with `images_seen` images."""
        half_life = min(self.half_life, self.ramp * images_seen)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay(images_seen, batch_size))
