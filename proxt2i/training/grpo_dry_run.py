"""What a GRPO run would do and need: `proxt2i/grpo.py --dry-run [--world-size N]`. No GPU, no network loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.grpo_config import GrpoConfig, images_per_update, micro_batch_of, trains_last_call
from proxt2i.models.bundle import find_components, load_settings
from proxt2i.models.files import read_json
from proxt2i.models.flops import forward_flops
from proxt2i.models.uvit import UViT2DModel
from proxt2i.rewards import settings_of
from proxt2i.training.grpo import lora_of, policy_of, read_prompts
from proxt2i.training.grpo_meter import passes_per_image
from proxt2i.training.lora import add_adapters
from proxt2i.training.rollouts import keeps_outputs


def dry_run(config: GrpoConfig, world_size: int, say=print) -> None:
    """Check everything and print it. Raises ValueError where the run would."""
    how, initial = config.rollout, Path(config.model.init_from or SHIPPED_MODEL)
    policy = policy_of(config, load_settings(initial))
    prompts = read_prompts(config, Path(config.model.components or find_components(initial)))
    with torch.device("meta"):
        uvit = UViT2DModel.from_config(read_json(initial / "uvit" / "config.json"))
    num_params, lora = sum(p.numel() for p in uvit.parameters()), lora_of(config)
    if lora:
        with torch.device("meta"):
            add_adapters(uvit, lora)
    images, micro_batch = images_per_update(config), micro_batch_of(config, world_size)
    trained = config.policy.window or len(config.policy.steps or range(policy.num_transitions))
    evaluations, update = passes_per_image(config, policy)
    say(f"dry run: {world_size:,} rank(s), {num_params / 1e6:,.2f} M parameters from {initial}")
    if lora:
        adapters = sum(p.numel() for p in uvit.parameters() if p.requires_grad)
        say(f"LoRA: adapters of rank {lora.rank}, {adapters / 1e6:,.2f} M parameters, are trained; the network stays frozen and is the reference")
    say(f"prompts: {len(prompts):,}, the first: {prompts.texts[0]!r}")
    say(f"rollout: {how.updates} update(s) x {how.groups_per_update} prompts x {how.group_size} images = {how.updates * images:,} images, "
        f"{how.updates * images // world_size:,} on each rank in batches of {how.batch}")
    say(f"update: {images:,} images = {world_size:,} rank(s) x {images // world_size // micro_batch} micro-batch(es) of {micro_batch}; "
        f"{trained} of {policy.num_transitions} transitions of plan {how.plan}, {how.steps} steps, "
        f"guidance {', '.join(f'{g:g}' for g in policy.guidance)}")
    say(f"an image costs about {evaluations} evaluations of the network to draw and {update:.0f} to train on, "
        f"{forward_flops(uvit.config) * (evaluations + update) / 1e9:,.1f} GFLOP (VAE and rewards not counted)")
    kept = trained * (2 if keeps_outputs(config, world_size) else 1) + trains_last_call(config)
    state = how.updates * images // world_size * kept * uvit.config.in_channels * uvit.config.sample_size**2 * 4
    say(f"states (and outputs) kept for the update: {state / 2**20:,.1f} MiB a rank, on the {how.store}; "
        f"reference network: {num_params * 4 / 2**30 if config.policy.kl and not lora else 0:.2f} GiB")
    for name, entries in (("trained on", config.rewards.train), ("panel", config.rewards.panel)):
        if entries:
            say(f"rewards, {name}: " + ", ".join(f"{s.key} x {s.weight:g}" for s in settings_of(entries)))
    say(f"{config.train.images:,} images are {-(-config.train.images // (how.updates * images)):,} rollouts and "
        f"{-(-config.train.images // (how.updates * images)) * how.updates * config.policy.inner_epochs:,} updates")
