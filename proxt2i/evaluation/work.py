"""What an evaluation is: models, samplers, prompts, rewards, features; all of it checked before anything is loaded or drawn."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.evaluation.features import Features, Reference, features_of, reference_of
from proxt2i.evaluation.prompts import Picture, PromptList, portraits, read_prompts
from proxt2i.models.bundle import EMBEDDED, Settings, find_components, load_settings
from proxt2i.models.files import check_component, component_digests, files_digest, require_folder
from proxt2i.models.text import encoder_names, unheard_ends
from proxt2i.models.vae import codec_sizes
from proxt2i.pipeline import guidance_of, plan_of
from proxt2i.rewards.base import RewardSettings, settings_of, settings_of_arguments

PORTRAITS = "portraits"  # in place of a prompts file, or of a feature model
COLUMNS = ("sampler", "model", "model_sha256", "plan", "steps", "guidance", "guidance_below", "prompt_number", "image", "seed", "prompt", "negative_prompt", "category", "dtype",
           "frechet_distance", "frechet_distance_low", "frechet_distance_high", "pictures", "ms_per_image", "peak_memory_mib", "device", "num_prompts", "prompts_sha256", "images_per_prompt", "torch", "proxt2i", "git_commit")  # fmt: skip
GROWS = ("models", "rewards", "features")  # of about.json: what a later command may add to


@dataclass(frozen=True, eq=False)  # is itself alone: settings cannot be hashed
class Model:
    label: str  # short name in tables
    folder: Path
    sha256: str  # of its weights and settings, frozen parts included
    settings: Settings
    size: tuple[int, int]  # height and width of its pictures in pixels


@dataclass(frozen=True)
class Sampler:
    """One way to draw a picture for a prompt and a seed: a row of the tables."""

    model: Model
    plan: str
    steps: int
    guidance: float
    guidance_below: float
    one_of_many_models: bool = False

    @property
    def name(self) -> str:
        name = f"{self.plan}-steps{self.steps}-guidance{self.guidance:g}"
        return f"{self.model.label}-{name}" if self.one_of_many_models else name

    def settings(self) -> dict:
        return {"model": self.model.label, "model_sha256": self.model.sha256, "plan": self.plan, "steps": self.steps, "guidance": self.guidance, "guidance_below": self.guidance_below}

    @property
    def folder(self) -> str:
        """Name of its folder: the same for the same pictures, however many other samplers there are."""
        known = {key: value for key, value in self.settings().items() if key != "model"}
        return f"{self.plan}-steps{self.steps}-guidance{self.guidance:g}-{digest(known)[:8]}"


@dataclass(frozen=True)
class Unit:
    """The pictures of one sampler that are drawn and scored together. What a kill can cost."""

    sampler: Sampler
    number: int  # among this sampler's
    pictures: list[Picture]


@dataclass(frozen=True)
class Evaluation:
    out: Path
    samplers: list[Sampler]
    prompts: PromptList
    pictures: list[Picture]  # of each sampler
    rewards: list[RewardSettings]
    features: Features | None
    reference: Reference | None
    seed: int
    images_per_prompt: int
    batch_size: int
    dtype: str
    size: tuple[int, int] | None
    keep_images: bool
    shown: frozenset[int]  # prompts of the side-by-side grid
    latency_runs: int

    @property
    def models(self) -> list[Model]:
        return list(dict.fromkeys(s.model for s in self.samplers))

    def units(self, sampler: Sampler) -> list[Unit]:
        return [Unit(sampler, i, self.pictures[at:at + self.batch_size]) for i, at in enumerate(range(0, len(self.pictures), self.batch_size))]

    def about(self) -> dict:
        """about.json: everything that the figures in the folder depend on."""
        return json.loads(json.dumps({
            "version": 1, "prompts": {"source": self.prompts.source, "sha256": self.prompts.sha256, "number": len(self.prompts.prompts), "digest": self.prompts.digest()},
            "seed": self.seed, "images_per_prompt": self.images_per_prompt, "batch_size": self.batch_size, "dtype": self.dtype,
            "size": self.size, "models": {m.label: m.sha256 for m in self.models}, "rewards": {r.key: reward_settings(r) for r in self.rewards},
            "features": {} if self.features is None else {"model": self.features.sha256, "reference": self.reference.sha256},
        }))  # fmt: skip

    def wants_picture(self, picture: Picture) -> bool:
        return self.keep_images or (picture.prompt in self.shown and picture.image == 0)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def reward_settings(reward: RewardSettings) -> dict:
    """What its scores depend on."""
    return {key: value for key, value in asdict(reward).items() if key in ("name", "path", "revision", "tokenizer", "dtype", "url")}


def is_portraits_model(folder: Path) -> bool:
    """Whether its text encoder is the embedded one, which knows portraits' captions alone."""
    source = find_components(require_folder(folder))
    return source == EMBEDDED or component_digests(source, ["text_encoder"]).get("text_encoder") == component_digests(EMBEDDED, ["text_encoder"])["text_encoder"]


def make_evaluation(args: argparse.Namespace) -> Evaluation:
    """ValueError, naming flag, file and fix, for all that can be wrong and be seen without loading weights."""
    for flag, value in (("--batch-size", args.batch_size), ("--images-per-prompt", args.images_per_prompt), ("--num-prompts", 1 if args.num_prompts is None else args.num_prompts)):
        if value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if min(args.latency_runs, args.grid) < 0:
        raise ValueError("--latency-runs and --grid must be at least 0")
    of_portraits = str(args.prompts) == PORTRAITS
    prompts = portraits(args.num_prompts or 1024, args.seed, args.images_per_prompt) if of_portraits else read_prompts(args.prompts, args.num_prompts)
    pictures = prompts.pictures(args.seed, args.images_per_prompt)
    if args.reward or args.rewards is not None or args.set:
        rewards = settings_of_arguments(args)
    else:
        rewards = settings_of([PORTRAITS]) if of_portraits else []
    for reward in rewards:
        if reward.key in COLUMNS:
            raise ValueError(f"a reward cannot be called {reward.key}, which is a column of the tables: give it another label")
    models = _models(args.model or [SHIPPED_MODEL], args.size)
    samplers = _samplers(models, args)
    for model in models if not args.cut_long else []:
        prompts.refuse_long(model.label, lambda texts, folder=model.folder: unheard_ends(find_components(folder), texts))
    features, reference = _features(args, models, of_portraits)
    if not rewards and features is None:
        raise ValueError("nothing to measure: name rewards (--rewards pickscore,hpsv2), or a reference set (--reference FOLDER --fd-model FOLDER)")
    number = len(prompts.prompts)
    shown = frozenset(round(i * (number - 1) / max(1, min(args.grid, number) - 1)) for i in range(min(args.grid, number)))  # spread over the list, and so over categories
    return Evaluation(args.out, samplers, prompts, pictures, rewards, features, reference, args.seed, args.images_per_prompt, args.batch_size, args.dtype,
                      args.size, not args.no_images, shown, args.latency_runs)


def _models(folders: list[Path], size: tuple[int, int] | None) -> list[Model]:
    resolved = [require_folder(folder).resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ValueError(f"--model {folder} is given twice")
    models = []
    for folder, label in zip(resolved, labels(resolved)):
        components = find_components(folder)
        config, factor = {"patch_size": 2, **check_component(folder / "uvit")}, codec_sizes(components)[1]
        if not isinstance(config.get("sample_size"), int) or not isinstance(config["patch_size"], int):
            raise ValueError(f"{folder / 'uvit' / 'config.json'} describes no U-ViT: it gives no sample_size")
        side, step = config["sample_size"] * factor, factor * config["patch_size"]
        if size and (min(size) < step or any(n % step for n in size)):
            raise ValueError(f"--size {size[0]}x{size[1]}: height and width must be multiples of {step} pixels for {label}")
        names = encoder_names(components)
        parts = {"uvit": files_digest([folder / "uvit", folder / "scheduler"]), **component_digests(components, names)}
        models.append(Model(label, folder, digest(parts), load_settings(folder), size or (side, side)))
    return models


def labels(folders: list[Path]) -> list[str]:
    """A short name for each: the last part of its path that is not "model", with as many before it as tell them apart."""
    parts = [[part for part in folder.parts[1:] if part != "model"] or ["model"] for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["-".join(p[-length:]) for p in parts]
        if len(set(found)) == len(found):
            return found
    return [str(folder).strip("/").replace("/", "-") for folder in folders]


def _samplers(models: list[Model], args: argparse.Namespace) -> list[Sampler]:
    samplers = []
    for model in models:
        for plan in args.plan.split(",") if args.plan else [model.settings.plan]:
            for steps in args.steps or [model.settings.num_steps]:
                try:
                    plan_of(model.settings, steps, plan)
                except ValueError as error:
                    raise ValueError(f"--steps {steps}: {error}") from None
                for scale in args.guidance or [None]:
                    guidance, below = guidance_of(model.settings, scale, args.guidance_below)
                    samplers.append(Sampler(model, plan, steps, guidance, below, len(models) > 1))
    names = [sampler.name for sampler in samplers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is asked for {names.count(name)} times: --plan, --steps and --guidance must each name a value once")
    return samplers


def _features(args: argparse.Namespace, models: list[Model], of_portraits: bool) -> tuple[Features | None, Reference | None]:
    if args.reference is None and args.fd_model is None and not of_portraits:
        return None, None
    if args.reference is None and not of_portraits:
        raise ValueError("--fd-model needs --reference: a folder of pictures, or of tar shards, that those drawn are compared with")
    sizes = {model.size for model in models}
    if len(sizes) > 1:
        raise ValueError("a Fréchet distance needs pictures of one size, and these models draw "
                         + ", ".join(f"{m.size[0]}x{m.size[1]} ({m.label})" for m in models) + ": give --size HEIGHTxWIDTH")
    if args.fd_model is None and not all(is_portraits_model(model.folder) for model in models):
        raise ValueError("--reference needs --fd-model: the folder of a network whose features are compared (DINOv2 or another vision model of transformers, or FID's Inception); "
                         "without it the features are those of the portraits' judge, which knows nothing else")
    features = features_of(args.fd_model)
    reference = reference_of(args.reference, models[0].size, args.num_prompts or 1024 if args.reference is None else 0)
    return features, reference
