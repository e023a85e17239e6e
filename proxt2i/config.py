"""Typed configuration of a training run: dataclass defaults <= YAML file <= command-line overrides.

The defaults below are the embedded *portraits* run. A YAML file and `section.key=value` overrides change single
fields; an unknown key or a value of the wrong type is an error that names the key, where it came from and the nearest
valid name. `load_config` also checks every rule that ties fields together, before any expensive work.

Progress is counted in images everywhere, so a setting means the same on one rank and on a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from proxt2i.config_files import check_choices, check_ranges, from_tree, keys_of, read_config, to_yaml

__all__ = ["Config", "check_optim", "config_of", "field_names", "load_config", "to_yaml", "validate"]

OBJECTIVES = ("prox", "score")
TARGETS = ("noise", "expected")
SCORE_TIMES = ("uniform", "pairs")
PRECISIONS = ("auto", "fp32", "bf16")
LR_SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("muon", "adamw")


@dataclass
class DataConfig:
    shards: str = "portraits"  # folder of img2dataset tar shards, or of latents made of them; "portraits": draw the embedded data set on first use
    portraits_dir: str = "data/portraits"  # folder the drawn portraits are kept in, one subfolder per recipe
    num_images: int = 12_000  # portraits to draw (images); other data sets are taken whole
    portraits_seed: int = 0  # seed of the drawings
    shard_size: int = 1_000  # portraits per tar file (images)
    image_size: int = 64  # side of the square training images (pixels), and with buckets the root of their area; images are resized and cropped
    buckets: List[str] = field(default_factory=list)  # sizes to train at, "HEIGHTxWIDTH" each (pixels): an image is cut to that of the nearest shape
    max_aspect: float = 1.0  # without data.buckets: make them, of about image_size^2 pixels and up to this many times as long as wide; 1: squares only
    cache_latents: bool = True  # encode images and captions once and keep the results in memory (data sets that fit); folders of latents are read from disk
    cache_dir: str = "data/latents"  # folder those latents and the captions' embeddings are kept in between runs
    flip: bool = False  # mirror images at random; folders of latents need `--flip`, cache_latents encodes the mirrored images as well
    workers: int = 2  # loader processes per rank (0: load in the training process); unused with cache_latents
    timeout_s: float = 600.0  # end the run when a loader process brings no batch for this long, and name the shard that hangs (seconds); 0: wait for ever
    max_bad: Optional[int] = None  # bad samples to skip before giving up (null: 1 % of the data set); all are listed in RUN/bad_samples.jsonl


@dataclass
class ModelConfig:
    preset: str = "portraits"  # name in proxt2i.models.uvit.PRESETS; the fields below override it (null: the preset's)
    components: Optional[str] = None  # model folder with vae/, text_encoder/, tokenizer/; null: the embedded ones
    init_from: Optional[str] = None  # model folder whose weights a new run starts from (another image size: positions are interpolated)
    embed_dim: Optional[int] = None  # width of the U-ViT
    depth: Optional[int] = None  # number of blocks (odd: in-blocks, one middle, out-blocks)
    num_heads: Optional[int] = None  # attention heads; must divide embed_dim
    patch_size: Optional[int] = None  # side of a patch (latent pixels)
    qk_norm: Optional[bool] = None  # normalise queries and keys
    gradient_checkpointing: Optional[bool] = None  # recompute activations in the backward pass: less memory, ~1/3 slower


@dataclass
class DiffusionConfig:
    objective: str = "prox"  # prox (proximal matching) or score (the eps-MSE baseline)
    score_times: str = "uniform"  # noise levels of objective=score: uniform in t, or those of the pairs that the prox would train on
    plan: str = "hybrid"  # sampling plan whose (t, lambda) pairs are trained (relaxed has the same)
    step_counts: List[int] = field(default_factory=lambda: [4, 5, 6, 8, 10])  # step counts N to train for
    step_weights: Optional[List[float]] = None  # chance of each step count, up to a factor; null: equal
    snr_power: float = 0.25  # draw step k of a plan in proportion to its signal-to-noise ratio to this power; 0: uniformly
    grid: str = "uniform"  # time grid of the plans
    beta_min: float = 0.1  # beta(0) of the variance-preserving diffusion
    beta_max: float = 20.0  # beta(1)
    target: str = "expected"  # what eps is matched to: noise (n, as in ProxT2I) or expected (E[n | x0, y]: less gradient noise)
    precondition: bool = True  # let the network predict only what its input does not tell by itself
    weight_power: float = 0.5  # divide the loss of a pair by its share of picture, c_out^2, to this power; 0: as in ProxT2I
    zeta: float = 1.0  # width of the proximal matching loss (noise standard deviations)
    l1_images: int = 0  # train with the L1 loss for this long first (images)
    caption_dropout: float = 0.1  # chance that a caption is replaced by "" (trains the null branch of guidance)


@dataclass
class OptimConfig:
    name: str = "muon"  # muon (matrices of the blocks by Muon, the rest by AdamW) or adamw
    muon_lr: float = 0.02  # peak learning rate of Muon
    momentum: float = 0.95  # Muon's momentum
    lr: float = 5e-3  # peak learning rate of AdamW
    betas: List[float] = field(default_factory=lambda: [0.9, 0.99])  # AdamW's running-average factors
    eps: float = 1e-8  # AdamW's denominator floor
    weight_decay: float = 0.01  # decoupled decay, on matrices only (no biases, norms or position embeddings)
    schedule: str = "cosine"  # after the warm-up: cosine (down to lr * final_lr) or constant
    warmup_images: int = 10_000  # linear warm-up from 0 (images)
    final_lr: float = 0.0  # learning rate at the end of the cosine, as a fraction of lr
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    spike: float = 10.0  # skip a step whose gradient norm is this many times the mean of the last 100; 0: never
    ema_half_life: int = 10_000  # half-life of the averaged weights (images)
    ema_ramp: float = 0.1  # the half-life is at most this fraction of the images seen so far


@dataclass
class TrainConfig:
    run_dir: str = "runs/portraits"  # everything the run writes
    seed: int = 0  # seed of initial weights, data order, noise, dropout
    images: int = 350_000  # length of the run (images)
    batch_size: int = 64  # images per optimiser step, all ranks together
    micro_batch: Optional[int] = None  # images per forward pass and rank; null: batch_size / ranks (no accumulation)
    precision: str = "auto"  # fp32, bf16 (autocast; parameters stay fp32), or auto: bf16 on GPUs, and on CPUs with instructions for it
    compile: bool = False  # torch.compile every block, which takes a minute or so at the start; ZeRO stages 1 and 2
    threads: int = 0  # CPU threads per rank; 0: cores / ranks on this machine
    max_bad_steps: int = 20  # stop after this many steps in a row with a non-finite gradient or a spike (each is skipped)
    log_every: int = 2_560  # write statistics this often (images)
    checkpoint_every: int = 50_000  # save a checkpoint this often (images)
    keep_checkpoints: int = 2  # newest checkpoints to keep
    tensorboard: bool = True  # write TensorBoard events beside stats.jsonl
    wandb: Optional[str] = None  # Weights & Biases project to report to besides, under the run folder's name; null: none
    peak_tflops: Optional[float] = None  # dense bf16 peak of one rank's device (TFLOP/s), for MFU; null: by the GPU's name, if known


@dataclass
class SampleConfig:
    every: int = 50_000  # draw the sample grid this often (images); 0: never
    prompts: List[str] = field(default_factory=lambda: [
        "a smiling woman with long red hair and glasses on a blue background",
        "a serious man with short black hair and sunglasses on a yellow background",
        "a surprised lady with blond hair in a bun on a green background",
        "a happy dark skinned gentleman with curly gray hair and a beanie on a pink background",
    ])  # one row of the grid each
    per_prompt: int = 4  # images per prompt (columns of the grid)
    seed: int = 0  # image i of the grid uses noise seed `seed + i`
    size: Optional[str] = None  # HEIGHTxWIDTH of the grid's pictures (pixels), a size that is trained at; null: the square of data.image_size
    steps: int = 8  # sampling steps
    guidance: float = 1.5  # guidance scale; 1: none
    guidance_below: float = 0.35  # guide only steps with the noise of a time up to this one (1: all, 0: the last)
    plan: str = "relaxed"  # sampling plan; hybrid: as in ProxT2I


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def load_config(files: str | Path | list[str | Path] = (), overrides: list[str] = (), world_size: int = 1) -> Config:
    """Defaults, then `files` (YAML, later ones win), then `overrides` ("section.key=value"); checked by `validate`.

    Raises ValueError for an unreadable file, an unknown key, a wrong type or a broken rule.
    """
    config = read_config(Config, files, overrides)
    validate(config, world_size)
    return config


def config_of(tree: dict, source: str) -> Config:
    """The Config that dataclasses.asdict made `tree` of, not validated. ValueError, naming `source`, if it is none."""
    return from_tree(Config, tree, source)


def field_names() -> list[str]:
    """Every dotted key, e.g. "optim.lr"."""
    return keys_of(Config)


def validate(config: Config, world_size: int = 1) -> None:
    """Check the rules that types cannot express. Raises ValueError naming the field and the fix."""
    _validate_ranges(config)
    _validate_batch(config.train, world_size)
    _validate_paths(config)
    _validate_sizes(config)
    _validate_plans(config)


# ---------------------------------------------------------------------------------------------------------------------
# Rules.


def _validate_ranges(config: Config) -> None:
    positive = ("data.num_images", "data.shard_size", "data.image_size", "optim.lr", "optim.muon_lr", "optim.eps", "optim.ema_half_life",
                "diffusion.zeta", "diffusion.beta_max", "train.images", "train.batch_size", "train.max_bad_steps",
                "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "sample.per_prompt", "sample.steps")
    not_negative = ("data.workers", "data.timeout_s", "optim.weight_decay", "optim.spike", "optim.warmup_images", "optim.grad_clip",
                    "optim.ema_ramp", "diffusion.beta_min", "diffusion.snr_power", "diffusion.weight_power", "diffusion.l1_images", "train.threads", "sample.every")
    fractions = ("diffusion.caption_dropout", "optim.final_lr", "sample.guidance_below")
    choices = {"optim.name": OPTIMIZERS, "diffusion.objective": OBJECTIVES, "diffusion.target": TARGETS,
               "diffusion.score_times": SCORE_TIMES, "train.precision": PRECISIONS, "optim.schedule": LR_SCHEDULES}
    check_ranges(config, positive, not_negative, fractions)
    check_choices(config, choices)
    check_optim(config.optim, config.train.images)
    if config.train.peak_tflops is not None and not config.train.peak_tflops > 0:
        raise ValueError(f"train.peak_tflops must be positive, or null, got {config.train.peak_tflops}")
    if config.train.wandb is not None and not config.train.wandb.strip():
        raise ValueError("train.wandb must be the name of a project, or null")
    if not config.sample.prompts or not all(prompt.strip() for prompt in config.sample.prompts):
        raise ValueError("sample.prompts must hold at least one prompt and no empty one")


def check_optim(optim: OptimConfig, images: int) -> None:
    """The rules of the optim section of a run of `images` images, but for simple ranges."""
    if not 0 <= optim.momentum < 1:
        raise ValueError(f"optim.momentum must lie in [0, 1), got {optim.momentum}")
    betas = optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optim.betas must be two numbers in [0, 1), got {betas}")
    if optim.warmup_images >= images:
        raise ValueError(f"optim.warmup_images ({optim.warmup_images}) must be less than train.images ({images})")


def _validate_batch(train: TrainConfig, world_size: int) -> None:
    if train.batch_size % world_size:
        raise ValueError(f"train.batch_size ({train.batch_size}) must be divisible by the number of ranks ({world_size}); "
                         f"the nearest is {max(1, round(train.batch_size / world_size)) * world_size}")
    per_rank = train.batch_size // world_size
    if train.micro_batch is not None and (train.micro_batch < 1 or per_rank % train.micro_batch):
        raise ValueError(f"train.micro_batch ({train.micro_batch}) must divide train.batch_size / ranks ({per_rank})")


def _validate_sizes(config: Config) -> None:
    from proxt2i.data.buckets import parse_size

    data = config.data
    for field_name, sizes in (("data.buckets", data.buckets), ("sample.size", [config.sample.size] if config.sample.size else [])):
        for size in sizes:
            try:
                parse_size(size)
            except ValueError as error:
                raise ValueError(f"{field_name}: {error}") from None
    if not 1 <= data.max_aspect <= 16:
        raise ValueError(f"data.max_aspect must lie between 1 (squares only) and 16, got {data.max_aspect}")
    if data.buckets and data.max_aspect != 1:
        raise ValueError("data.buckets names the sizes and data.max_aspect makes them: set one of the two")


def _validate_plans(config: Config) -> None:
    from proxt2i.diffusion.plan import make_plan  # imports torch: only once the cheap checks have passed
    from proxt2i.diffusion.schedule import VPSchedule

    diffusion, sample = config.diffusion, config.sample
    if not diffusion.step_counts or min(diffusion.step_counts) < 1:
        raise ValueError(f"diffusion.step_counts must be positive whole numbers, got {diffusion.step_counts}")
    weights = diffusion.step_weights
    if weights is not None and (len(weights) != len(diffusion.step_counts) or min(weights) < 0 or sum(weights) <= 0):
        raise ValueError(f"diffusion.step_weights must hold one weight >= 0 for each of diffusion.step_counts "
                         f"({len(diffusion.step_counts)}), got {weights}")
    if not diffusion.beta_min < diffusion.beta_max:
        raise ValueError(f"diffusion.beta_min ({diffusion.beta_min}) must be less than diffusion.beta_max ({diffusion.beta_max})")
    schedule = VPSchedule(diffusion.beta_min, diffusion.beta_max)
    wanted = [("diffusion.plan with diffusion.step_counts", diffusion.plan, steps) for steps in diffusion.step_counts]
    wanted.append(("sample.plan with sample.steps", sample.plan, sample.steps))
    for field_name, plan, steps in wanted:
        try:
            make_plan(plan, steps, schedule, diffusion.grid)
        except ValueError as error:
            raise ValueError(f"{field_name}={steps}: {error}") from None


def _validate_paths(config: Config) -> None:
    shards, components, init_from = config.data.shards, config.model.components, config.model.init_from
    if shards != "portraits" and not Path(shards).exists():
        raise ValueError(f'data.shards: {shards} does not exist; give a folder of tar shards or of latents, or "portraits"')
    if components is not None and not Path(components).is_dir():
        raise ValueError(f"model.components: folder {components} does not exist")
    if init_from is not None and not Path(init_from).is_dir():
        raise ValueError(f"model.init_from: folder {init_from} does not exist; `python -m proxt2i.export RUN` makes one of a run")
