"""What is learned: the prox by proximal matching, or the score baseline by noise prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from proxt2i.config import DiffusionConfig
from proxt2i.diffusion import PairSampler, TimeSampler, VPSchedule, pair_coefficients, precondition
from proxt2i.ops import noised_pair, prox_matching_loss
from proxt2i.training.randomness import DROPOUT, PAIR, sample_seeds, uniforms
from proxt2i.transfer import send


@dataclass(frozen=True)
class Example:
    """Network inputs, and what the loss makes the target of. x0, y: float32 [B, C, H, W]; t, lam, weight: float32 [B];
    seeds: int64 [B]; coefficients: float32 [B, 3]; bucket: int64 [B] on the CPU.

    weight: factor of the sample's loss in the training objective.
    """

    x0: Tensor
    y: Tensor
    t: Tensor
    lam: Tensor
    seeds: Tensor
    coefficients: Tensor
    weight: Tensor
    bucket: Tensor


class Objective:
    """Makes training examples out of clean latents, and scores the network's answers. Knows nothing of ranks."""

    def __init__(self, config: DiffusionConfig, run_seed: int):
        self.config, self.run_seed = config, run_seed
        self.schedule = VPSchedule(config.beta_min, config.beta_max)
        self.is_score = config.objective == "score"
        self.pairs = TimeSampler() if self.is_score and config.score_times == "uniform" else PairSampler(
            config.step_counts, config.plan, self.schedule, config.step_weights, config.grid, config.snr_power)

    def example(self, x0: Tensor, positions: Tensor) -> Example:
        """Noise x0 (float32 [B, C, H, W]); every random number is a function of (run seed, position)."""
        seeds = sample_seeds(self.run_seed, positions.numpy())
        t, lam, bucket = self.pairs.draw(torch.from_numpy(uniforms(seeds, PAIR)))
        if self.is_score and self.config.score_times == "pairs":  # the same noise, asked as a score: y / sqrt(1 + lam) at tau
            t, lam = self.schedule.tau(t, lam), torch.zeros_like(lam)
        seeds, t, lam = (send(values, x0.device) for values in (torch.from_numpy(seeds), t, lam))
        coefficients = pair_coefficients(t, lam, self.schedule)
        y = noised_pair(x0, seeds, coefficients)
        weight = precondition(t, lam, self.schedule)[1].pow(-2 * self.config.weight_power)
        return Example(x0, y, t, lam, seeds, coefficients, weight, bucket)

    def loss(self, eps: Tensor, example: Example, images_seen: int) -> Tensor:
        """Loss of each sample, not weighted: float32 [B]."""
        target, kind = self.config.target, "l1" if images_seen < self.config.l1_images else "prox"
        if self.is_score:
            target, kind = "diffusion_noise", "l2"
        return prox_matching_loss(eps, example.x0, example.y, example.seeds, example.coefficients, target=target, kind=kind,
                                  zeta=self.config.zeta)[0]

    def drop_captions(self, text: list[Tensor], null_text: list[Tensor], positions: Tensor) -> list[Tensor]:
        """Replace a share `caption_dropout` of the embeddings [B, L_i, D_i] by the empty caption's [1, L_i, D_i]."""
        drop = uniforms(sample_seeds(self.run_seed, positions.numpy()), DROPOUT) < self.config.caption_dropout
        drop = send(torch.from_numpy(np.asarray(drop)), text[0].device)[:, None, None]
        return [torch.where(drop, null, embedding) for embedding, null in zip(text, null_text)]
