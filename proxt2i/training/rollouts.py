"""Rollouts: this rank's share of a round of images, drawn, decoded and scored; advantages among the images of all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from proxt2i.data.prompts import Prompts
from proxt2i.diffusion import Policy, guided, prox_from_eps, rollout
from proxt2i.diffusion.proximal import EpsFn
from proxt2i.grpo_config import GrpoConfig, images_per_update, micro_batch_of, trains_last_call
from proxt2i.models.bundle import Settings
from proxt2i.rewards import Scorer, load_reward, settings_of
from proxt2i.training.advantage import Spread, advantages, coarse, group_spread, reward_scales
from proxt2i.training.distributed import Ranks
from proxt2i.training.randomness import sample_seeds


@dataclass
class Experience:
    """One rank's images of a rollout, M of them, those of an update standing together: update u has rows u * m to (u + 1) * m - 1.

    seeds: int64 [M].  states[i]: where transition i starts, float32 [M, *shape].  text: a row for each of the rank's groups.
    eps[i]: the guided output of the network that drew them there, for later updates; empty where it would not be the same bits (see `Roller.draw`).
    row: int64 [M], an image's row in text.  advantage: float32 [M].  scores: of the images of all ranks, {reward: [images]}.
    flat_groups: of all ranks, those whose images all have the same rewards.  spread: std of the x0 of a prompt, mean over elements and groups.
    last: the state that the last evaluation saw, float32 [M, *shape], where `trains_last_call`.  prompts, metadata: of every image.
    reward_scale: see `advantage.reward_scales`.  group_spread: of every image's group, [M, ...], where `policy.variety` needs it.
    reward_seconds: this rank's rewards took, most of it while the next pictures were drawn; reward_wait: it waited for them with nothing else to do.
    """

    seeds: Tensor
    states: dict[int, Tensor]
    eps: dict[int, Tensor]
    text: list[Tensor]
    row: Tensor
    prompts: list[str]
    metadata: list[dict | None]
    last: Tensor | None
    reward_scale: dict[str, float]
    group_spread: Spread | None
    advantage: Tensor
    scores: dict[str, Tensor]
    flat_groups: int
    spread: float
    reward_seconds: float
    reward_wait: float


class Roller:
    """Draws rollouts. Which prompts and which noise follow from (seed, images seen) alone; groups may lie across ranks."""

    def __init__(self, config: GrpoConfig, settings: Settings, policy: Policy, prompts: Prompts, text_encoder, codec, shape, ranks: Ranks,
                 dtype: torch.dtype = torch.float32):
        self.config, self.settings, self.policy, self.prompts, self.ranks = config, settings, policy, prompts, ranks
        self.text_encoder, self.codec, self.shape, self.dtype = text_encoder, codec, shape, dtype
        self.null_text = text_encoder([""])
        self.reward_settings = settings_of(config.rewards.train, "rewards.train")
        self.scorer = Scorer([load_reward(s, ranks.device) for s in self.reward_settings])
        self.per_update = images_per_update(config)
        self.per_rank = self.per_update // ranks.world_size

    @property
    def images(self) -> int:
        """Of one rollout, all ranks together."""
        return self.per_update * self.config.rollout.updates

    def eps_fn(self, network, text: list[Tensor]) -> EpsFn:
        """The network as `diffusion` takes it, with the frozen parts of guidance: text [B, L_i, D_i]."""
        eps_fn = guided(network, text, self.null_text)
        is_prox_of_score = self.settings.objective == "score" and hasattr(self.policy.plan, "lam")
        return prox_from_eps(eps_fn, self.policy.plan.schedule) if is_prox_of_score else eps_fn

    def pictures(self, x0: Tensor) -> Tensor:
        """As a rollout's rewards see them, [B, 3, H, W] in [0, 1]: decoded in the run's dtype. Differentiable."""
        return self.codec.decode(x0, self.dtype).add(1).div(2)

    def positions(self) -> np.ndarray:
        """Of this rank's images among those of the rollout, int64 [M]: its slice of every update's."""
        first = np.arange(self.config.rollout.updates)[:, None] * self.per_update + self.ranks.rank * self.per_rank
        return (first + np.arange(self.per_rank)).reshape(-1)

    @torch.no_grad()
    def draw(self, network, images_seen: int, steps: tuple[int, ...], stop=lambda: False) -> Experience | None:
        """The rollout that begins after `images_seen` images, of which the transitions `steps` will be trained. Collective.

        stop: collective, asked after every batch; None comes back when it says so. RewardError when a reward fails.
        A network's output for an image depends on its batch by rounding. Where a batch here is a micro-batch of the update, the outputs are kept: a later
        update needs just these, and would otherwise compute them again.
        """
        how, device = self.config.rollout, self.ranks.device
        positions = self.positions()
        groups = positions // how.group_size
        first_group = images_seen // how.group_size
        own = np.unique(groups)
        scored_before = self.scorer.seconds
        numbers = self.prompts.order(self.config.train.seed, first_group + int(own[0]), int(own[-1] - own[0]) + 1)[own - own[0]]
        text = self.text_encoder([self.prompts.texts[n] for n in numbers])
        row = np.searchsorted(own, groups)
        seeds = torch.from_numpy(sample_seeds(self.config.train.seed, images_seen + positions)).to(device)
        rows = torch.from_numpy(row).to(device)
        store = "cpu" if how.store == "cpu" else None
        keep_eps = keeps_outputs(self.config, self.ranks.world_size)
        keep_last = trains_last_call(self.config)
        asked = numbers[row].tolist()
        prompts, metadata = ([of[n] for n in asked] for of in (self.prompts.texts, self.prompts.metadata))
        parts, latents, looks, futures = [], [], [], []
        for chosen in torch.arange(len(positions), device=device).split(how.batch):
            eps_fn = self.eps_fn(network, [t[rows[chosen]] for t in text])
            part = rollout(eps_fn, self.policy, self.shape, seeds[chosen], steps=steps, keep_eps=keep_eps, keep_last=keep_last, store=store)
            pictures = self.pictures(part.x0)
            first, end = len(latents) * how.batch, len(latents) * how.batch + len(chosen)
            futures.append(self.scorer.submit(pictures, prompts[first:end], metadata[first:end]))
            parts.append(part)
            latents.append(part.x0)
            if self.config.policy.variety:
                looks.append(coarse(pictures))
            if stop():
                return None
        states = {i: torch.cat([part.states[i] for part in parts]) for i in steps}
        eps = {i: torch.cat([part.eps[i] for part in parts]) for i in steps if keep_eps}
        waiting = time.perf_counter()
        results = [future.result() for future in futures]
        waited = time.perf_counter() - waiting
        scores = {s.key: self._gather(torch.cat([r[s.key] for r in results])) for s in self.reward_settings}
        advantage, flat = advantages(scores, self.reward_settings, how.group_size, self.config.policy.advantage_clip)
        last = torch.cat([part.states[self.policy.num_transitions] for part in parts]) if keep_last else None
        scales = reward_scales(scores, self.reward_settings, how.group_size)
        spread = group_spread(self._gather(torch.cat(looks)), how.group_size).of(positions, device) if looks else None
        return Experience(seeds, states, eps, text, rows, prompts, metadata, last, scales, spread, advantage[positions].to(device), scores, flat,
                          _spread(torch.cat(latents), rows), self.scorer.seconds - scored_before, waited)

    def _gather(self, own: Tensor) -> Tensor:
        """Of each image of this rank [M, ...] -> of all ranks, in the rollout's order, on the CPU."""
        own = own.to(self.ranks.device)
        parts = [torch.empty_like(own) for _ in range(self.ranks.world_size)]
        dist.all_gather(parts, own)
        return torch.stack([part.reshape(self.config.rollout.updates, -1, *own.shape[1:]) for part in parts], 1).flatten(0, 2).cpu()


def keeps_outputs(config: GrpoConfig, world_size: int) -> bool:
    """Whether later updates of a rollout have use for its outputs, and a batch of it is a micro-batch of theirs."""
    return config.rollout.updates > 1 and config.rollout.batch == micro_batch_of(config, world_size)


def _spread(latents: Tensor, rows: Tensor) -> float:
    """Mean standard deviation of the elements of a group's latents; groups with one image on this rank do not count."""
    spreads = [latents[rows == row].var(0).mean().sqrt() for row in rows.unique() if (rows == row).sum() > 1]
    return float(torch.stack(spreads).mean()) if spreads else float("nan")
