"""The sample grid: fixed prompts and fixed seeds, so that grids of one run show the same noise becoming better images."""

from __future__ import annotations

import numpy as np

from proxt2i.config import Config, SampleConfig
from proxt2i.data.buckets import parse_size
from proxt2i.models.bundle import Bundle, Settings
from proxt2i.pipeline import generate


def settings_of(config: Config) -> Settings:
    """How the run's model is to be sampled: the sample section of the config, on the diffusion that it is trained for."""
    diffusion, how = config.diffusion, config.sample
    return Settings(how.plan, how.steps, how.guidance, diffusion.beta_min, diffusion.beta_max, diffusion.grid, how.guidance_below,
                    diffusion.objective)


def draw_grid(bundle: Bundle, how: SampleConfig, size: str | None = None) -> np.ndarray:
    """uint8 [prompts, per_prompt, H, W, 3]. size: HEIGHTxWIDTH in pixels; None: the model's own."""
    prompts = [prompt for prompt in how.prompts for _ in range(how.per_prompt)]
    images = generate(bundle, prompts, range(how.seed, how.seed + len(prompts)), size=parse_size(size) if size else None).permute(0, 2, 3, 1).numpy()
    return images.reshape(len(how.prompts), how.per_prompt, *images.shape[1:])
