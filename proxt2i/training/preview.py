"""The sample grid: fixed prompts and fixed seeds, so that grids of one run show the same noise becoming better images."""

from __future__ import annotations

import numpy as np
import torch

from proxt2i.config import Config
from proxt2i.diffusion import VPSchedule, guidance_scales, guided, make_plan, sample, sample_score, score_plan
from proxt2i.images import to_uint8


@torch.no_grad()
def draw_grid(uvit, text_encoder, codec, config: Config) -> np.ndarray:
    """uint8 [prompts, per_prompt, H, W, 3] by the sample section of the config (DDIM for the score baseline)."""
    diffusion, how = config.diffusion, config.sample
    prompts = [prompt for prompt in how.prompts for _ in range(how.per_prompt)]
    schedule = VPSchedule(diffusion.beta_min, diffusion.beta_max)
    device = next(uvit.parameters()).device
    seeds = torch.arange(how.seed, how.seed + len(prompts), device=device)
    eps_fn = guided(uvit, text_encoder(prompts), text_encoder([""]))
    shape = (uvit.config.in_channels, uvit.config.sample_size, uvit.config.sample_size)
    if diffusion.objective == "score":
        plan = score_plan("ddim", how.steps, schedule, diffusion.grid)
        latents = sample_score(eps_fn, plan, shape, seeds, guidance_scale=guidance_scales(plan.t, how.guidance, how.guidance_below))
    else:
        plan = make_plan(how.plan, how.steps, schedule, diffusion.grid)
        latents = sample(eps_fn, plan, shape, seeds, guidance_scale=guidance_scales(plan.tau, how.guidance, how.guidance_below))
    images = to_uint8(codec.decode(latents)).permute(0, 2, 3, 1).cpu().numpy()
    return images.reshape(len(how.prompts), how.per_prompt, *images.shape[1:])
