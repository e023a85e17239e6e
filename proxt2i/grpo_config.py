"""Typed configuration of a GRPO run (proxt2i/grpo.py): the defaults below are the portraits. Read as config.py's is.

Progress is counted in images that were drawn and trained on, so a setting means the same on one rank and on a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional

from proxt2i.config import LR_SCHEDULES, OPTIMIZERS, PRECISIONS, DataConfig, OptimConfig, SampleConfig, check_optim
from proxt2i.config_files import check_choices, check_ranges, read_config

ALARMS = ("warn", "stop", "restore", "raise_kl")
STORES = ("device", "cpu")


@dataclass
class ModelConfig:
    init_from: Optional[str] = None  # model folder to start from, and the reference of the KL penalty; null: the shipped portraits model
    components: Optional[str] = None  # folder with text_encoder/, tokenizer/, vae/; null: the model folder's own, or the embedded ones
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, ~1/3 slower


@dataclass
class PromptsConfig:
    source: str = "portraits"  # file: a prompt a line, or .jsonl: {"prompt": ..., "metadata": {...}} a line; "portraits": captions of its grammar
    num: int = 4_096  # portraits' captions to draw (prompts); files are taken whole
    seed: int = 0  # seed of the portraits' captions
    complete: bool = True  # portraits' captions state all attributes


@dataclass
class RolloutConfig:
    plan: str = "relaxed"  # relaxed (without memory), hybrid, backward or variance_preserving; with a score network ddpm or euler_maruyama too
    steps: int = 4  # sampling steps
    guidance: float = 1.5  # guidance scale, in sampling and in the update alike; 1: none
    guidance_below: float = 0.35  # guide only steps with the noise of a time up to this one (1: all, 0: the last)
    group_size: int = 16  # images of a prompt, compared with each other
    groups_per_update: int = 8  # prompts of an optimiser step, all ranks together
    updates: int = 2  # optimiser steps on the images of one rollout (each on its own images)
    batch: int = 64  # images sampled, decoded and scored together on a rank; changes the pictures by rounding at most
    store: str = "device"  # where the chain's states wait for the update: device or cpu


@dataclass
class PolicyConfig:
    clip: float = 1.5  # trust region: largest |log ratio| of a transition that still gets a gradient (nats; docs/grpo.md)
    advantage_clip: float = 5.0  # largest |advantage| (standard deviations of the group)
    kl: float = 0.01  # weight of the KL divergence to the initial network (1 / nats of a transition); 0: no reference is kept
    inner_epochs: int = 1  # passes over a rollout's images
    steps: Optional[List[int]] = None  # transitions to train, counted in sampling order from 0 to rollout.steps - 2; null: all
    window: int = 0  # train only this many neighbouring ones of them in each rollout, in turn; 0: all
    lora_rank: int = 0  # train adapters of this rank beside the blocks' linear layers (LoRA) and nothing else; 0: all weights
    lora_alpha: Optional[float] = None  # the adapters' product counts lora_alpha / lora_rank times; null: once
    reward_gradient: float = 0.0  # weight of the rewards' own gradient through the last call, which has no density (docs/grpo.md); 0: none
    variety: float = 0.0  # weight of the spread of a prompt's pictures, averaged to 8 x 8, through the same call; 0: none
    data_weight: float = 0.0  # weight of proximal matching on the data section's images, which holds the last call too; 0: no data needed


@dataclass
class RewardsConfig:
    # rewards with weights, as names or mappings of the fields of rewards.RewardSettings
    train: List[Any] = field(default_factory=lambda: [{"name": "pickscore", "path": "portraits"}])  # what is maximised
    panel: List[Any] = field(default_factory=lambda: [{"name": "portraits"}])  # what only watches: rewards that are never trained on


@dataclass
class GuardConfig:
    every: int = 1_024  # draw the guard's fixed prompts and compare with the start this often (images); 0: never
    prompts: int = 16  # number of those prompts, taken from prompts.source
    per_prompt: int = 8  # images of each, with fixed noise
    min_diversity: float = 0.7  # alarm when a measure of the diversity within prompts is below this share of the start's
    alarm: str = "warn"  # warn; stop (end the run); restore (end it with the best weights so far); raise_kl (policy.kl times guard.kl_factor)
    kl_factor: float = 4.0  # of alarm raise_kl


@dataclass
class GrpoOptimConfig(OptimConfig):
    name: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_images: int = 0
    ema_half_life: int = 1_000


@dataclass
class TrainConfig:
    run_dir: str = "runs/grpo"  # everything the run writes
    seed: int = 0  # seed of prompt order and sampling noise
    images: int = 10_240  # length of the run (images drawn)
    micro_batch: Optional[int] = None  # images per forward pass and rank in the update; null: 64 or fewer; any gives the same update
    precision: str = "auto"  # fp32, bf16 (autocast, of the VAE's decoder in rollouts too; parameters stay fp32), or auto: bf16 on GPUs, and on CPUs with instructions for it
    compile: bool = False  # torch.compile every block; ZeRO stages 1 and 2
    threads: int = 0  # CPU threads per rank; 0: cores / ranks on this machine
    max_bad_steps: int = 20  # stop after this many steps in a row with a non-finite gradient or a spike (each is skipped)
    log_every: int = 256  # write statistics this often (images; at least a rollout)
    checkpoint_every: int = 2_560  # save a checkpoint this often (images)
    keep_checkpoints: int = 2  # newest checkpoints to keep
    tensorboard: bool = True  # write TensorBoard events beside stats.jsonl
    wandb: Optional[str] = None  # Weights & Biases project to report to besides; null: none
    peak_tflops: Optional[float] = None  # dense bf16 peak of one rank's device (TFLOP/s), for MFU; null: by the GPU's name, if known


@dataclass
class GrpoSampleConfig:
    every: int = 2_560  # draw the sample grid this often (images); 0: never
    prompts: List[str] = field(default_factory=lambda: SampleConfig().prompts)  # one row of the grid each
    per_prompt: int = 4  # images per prompt (columns of the grid)
    seed: int = 0  # image i of the grid uses noise seed `seed + i`


@dataclass
class GrpoConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: GrpoOptimConfig = field(default_factory=GrpoOptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: GrpoSampleConfig = field(default_factory=GrpoSampleConfig)


def load_config(files: str | Path | list[str | Path] = (), overrides: list[str] = (), world_size: int = 1) -> GrpoConfig:
    """Defaults, then `files` (YAML, later ones win), then `overrides`; checked. Raises ValueError as config.load_config does."""
    config = read_config(GrpoConfig, files, overrides)
    validate(config, world_size)
    return config


def trains_last_call(config: GrpoConfig) -> bool:
    """Whether the last call of the network, which has no density, is trained on the pictures that it makes."""
    return bool(config.policy.reward_gradient or config.policy.variety)


def images_per_update(config: GrpoConfig) -> int:
    return config.rollout.group_size * config.rollout.groups_per_update


def micro_batch_of(config: GrpoConfig, world_size: int) -> int:
    per_rank = images_per_update(config) // world_size
    return config.train.micro_batch or next(size for size in range(min(64, per_rank), 0, -1) if per_rank % size == 0)


def validate(config: GrpoConfig, world_size: int = 1) -> None:
    """Check the rules that types cannot express. Raises ValueError naming the field and the fix."""
    check_ranges(
        config,
        positive=("prompts.num", "rollout.groups_per_update", "rollout.updates", "rollout.batch", "policy.clip", "policy.advantage_clip",
                  "policy.inner_epochs", "optim.lr", "optim.muon_lr", "optim.eps", "optim.ema_half_life", "train.images", "train.max_bad_steps",
                  "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "sample.per_prompt", "guard.prompts", "guard.kl_factor"),
        not_negative=("rollout.guidance", "policy.kl", "policy.window", "policy.lora_rank", "policy.reward_gradient", "policy.variety", "policy.data_weight",
                      "optim.weight_decay", "optim.spike", "optim.warmup_images", "optim.grad_clip", "optim.ema_ramp", "train.threads", "sample.every", "guard.every"),
        fractions=("rollout.guidance_below", "optim.final_lr", "guard.min_diversity"))
    check_choices(config, {"guard.alarm": ALARMS, "rollout.store": STORES, "optim.name": OPTIMIZERS, "train.precision": PRECISIONS, "optim.schedule": LR_SCHEDULES})
    check_optim(config.optim, config.train.images)
    if config.train.peak_tflops is not None and not config.train.peak_tflops > 0:
        raise ValueError(f"train.peak_tflops must be positive, or null, got {config.train.peak_tflops}")
    if config.rollout.group_size < 2:
        raise ValueError(f"rollout.group_size must be at least 2, got {config.rollout.group_size}: an image is judged against others of its prompt")
    if config.rollout.steps < 2:
        raise ValueError(f"rollout.steps must be at least 2, got {config.rollout.steps}: the last step has no density, nothing would be left to train")
    _validate_lora(config)
    if config.guard.per_prompt < 2:
        raise ValueError(f"guard.per_prompt must be at least 2, got {config.guard.per_prompt}: diversity is that of a prompt's images")
    if config.guard.alarm == "raise_kl" and not config.policy.kl:
        raise ValueError("guard.alarm=raise_kl needs policy.kl above 0, or there is nothing to raise")
    if config.guard.every and config.guard.prompts % world_size:
        nearest = max(1, round(config.guard.prompts / world_size)) * world_size
        raise ValueError(f"guard.prompts ({config.guard.prompts}) must be divisible by the number of ranks ({world_size}); the nearest is {nearest}")
    _validate_batch(config, world_size)
    _validate_steps(config)
    _validate_paths(config)
    if not config.sample.prompts or not all(prompt.strip() for prompt in config.sample.prompts):
        raise ValueError("sample.prompts must hold at least one prompt and no empty one")
    from proxt2i.rewards import DIFFERENTIABLE, settings_of

    for i, reward in enumerate(settings_of(config.rewards.train, "rewards.train")):
        if config.policy.reward_gradient and reward.weight and reward.name not in DIFFERENTIABLE:
            raise ValueError(f"rewards.train[{i}] ({reward.name}) has no gradient, which policy.reward_gradient needs: these have one: "
                             f"{', '.join(DIFFERENTIABLE)}; give it weight 0 or policy.reward_gradient=0")
    if config.rewards.panel:
        settings_of(config.rewards.panel, "rewards.panel")


def _validate_lora(config: GrpoConfig) -> None:
    rank, alpha = config.policy.lora_rank, config.policy.lora_alpha
    if rank and config.optim.name != "adamw":
        raise ValueError(f"policy.lora_rank={rank} needs optim.name=adamw, got {config.optim.name}: adapters are thin factors, which Muon is not made for; "
                         "set optim.lr too")
    if alpha is not None and not (rank and alpha > 0):
        raise ValueError(f"policy.lora_alpha ({alpha}) must be positive, and belongs to a policy.lora_rank above 0")


def _validate_batch(config: GrpoConfig, world_size: int) -> None:
    per_update = images_per_update(config)
    if per_update % world_size:
        raise ValueError(f"rollout.group_size x rollout.groups_per_update ({per_update} images) must be divisible by the number of ranks "
                         f"({world_size})")
    per_rank, micro_batch = per_update // world_size, config.train.micro_batch
    if micro_batch is not None and (micro_batch < 1 or per_rank % micro_batch):
        raise ValueError(f"train.micro_batch ({micro_batch}) must divide the images of an update on one rank ({per_rank})")


def _validate_steps(config: GrpoConfig) -> None:
    last, steps = config.rollout.steps - 2, config.policy.steps
    if steps is not None and (not steps or len(set(steps)) < len(steps) or not all(0 <= i <= last for i in steps)):
        raise ValueError(f"policy.steps={steps}: rollout.steps={config.rollout.steps} has the transitions 0 to {last}; name at least one, each once, "
                         "or null for all")
    count = len(steps) if steps is not None else last + 1
    if config.policy.window > count:
        raise ValueError(f"policy.window ({config.policy.window}) is more than the {count} transitions that there are to train")


def _validate_paths(config: GrpoConfig) -> None:
    for key, folder in (("model.init_from", config.model.init_from), ("model.components", config.model.components)):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{key}: folder {folder} does not exist")
    source = config.prompts.source
    if source != "portraits" and not Path(source).is_file():
        raise ValueError(f'prompts.source: {source} is no file; give one with a prompt a line, a .jsonl, or "portraits"')
    if config.policy.data_weight and config.data.shards != "portraits" and not Path(config.data.shards).exists():
        raise ValueError(f'data.shards: {config.data.shards} does not exist; give a folder of tar shards, or "portraits"')
