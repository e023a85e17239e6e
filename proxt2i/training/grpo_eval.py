"""The guard's look at a GRPO run: fixed prompts and noise, drawn, decoded and scored by all ranks together."""

from __future__ import annotations

import numpy as np
import torch

from proxt2i.grpo_config import GrpoConfig
from proxt2i.images import to_uint8
from proxt2i.rewards import load_reward, score, settings_of
from proxt2i.training.advantage import coarse
from proxt2i.training.distributed import gather_objects
from proxt2i.training.guard import Evaluation, attribute_entropy, variances
from proxt2i.training.randomness import sample_seeds
from proxt2i.training.rollouts import Roller

STREAM = 2**32  # positions of the guard's noise: no run draws as many images


class Evaluator:
    """On portraits, diversity is also that of the judge's features, and of the attributes that prompts leave open."""

    def __init__(self, config: GrpoConfig, roller: Roller):
        self.config, self.roller = config, roller
        self.panel = [load_reward(s, roller.ranks.device) for s in settings_of(config.rewards.panel, "rewards.panel")] if config.rewards.panel else []
        self.numbers = roller.prompts.order(config.train.seed + 1, 0, config.guard.prompts)
        self.judge = None
        if config.prompts.source == "portraits":
            from proxt2i.embedded.judge import Judge

            self.judge = Judge(device=roller.ranks.device)

    @torch.no_grad()
    def __call__(self, network) -> Evaluation:
        """Of `network` as it is. Collective."""
        size, ranks = self.config.guard.per_prompt, self.roller.ranks
        own = np.array_split(np.arange(len(self.numbers)), ranks.world_size)[ranks.rank]
        found = {"trained": {}, "panel": {}, "diversity": {}}
        for chosen in np.array_split(own, -(-len(own) * size // self.config.rollout.batch)) if len(own) else ():
            self._draw(network, chosen, found)
        parts = gather_objects(found)
        merged = {kind: {name: [value for part in parts for value in part[kind].get(name, ())]
                         for name in dict.fromkeys(n for part in parts for n in part[kind])} for kind in found}
        return Evaluation(merged["trained"], merged["panel"], {name: sum(v) / len(v) for name, v in merged["diversity"].items() if v})

    def _draw(self, network, chosen: np.ndarray, found: dict) -> None:
        """The images of the guard's prompts number `chosen`."""
        roller, size = self.roller, self.config.guard.per_prompt
        numbers = np.repeat(self.numbers[chosen], size).tolist()
        prompts, metadata = [roller.prompts.texts[n] for n in numbers], [roller.prompts.metadata[n] for n in numbers]
        positions = STREAM + (chosen[:, None] * size + np.arange(size)).reshape(-1)
        seeds = torch.from_numpy(sample_seeds(self.config.train.seed, positions)).to(roller.ranks.device)
        for _, _, x0 in roller.policy.states(roller.eps_fn(network, roller.text_encoder(prompts)), roller.shape, seeds):
            pass
        decoded = roller.codec.decode(x0)  # in fp32, as users' pictures
        pictures = decoded.add(1).div(2)
        diversity = {"latents": variances(x0, size), "pictures": variances(coarse(pictures), size)}
        if self.judge is not None:
            from proxt2i.embedded.train_judge import stated

            predicted, features = self.judge(to_uint8(decoded).cpu())
            diversity |= {"judge": variances(features, size), "attributes": attribute_entropy(predicted, stated(metadata), size)}
        trained = score(roller.scorer.rewards, pictures, prompts, metadata)
        panel = score(self.panel, pictures, prompts, metadata) if self.panel else {}
        for kind, values in (("trained", trained), ("panel", panel), ("diversity", diversity)):
            for name, scores in values.items():
                found[kind].setdefault(name, []).extend(torch.as_tensor(scores).tolist())
