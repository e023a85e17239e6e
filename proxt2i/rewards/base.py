"""The one interface of rewards: settings, registry, scoring in batches, and the weighted sum of several rewards."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

# name -> module of this package whose `load(settings, device)` makes the reward; imported when it is asked for
REWARDS = {
    "pickscore": "pickscore",
    "pickscore_contrast": "contrast",
    "hpsv2": "hpsv2",
    "imagereward": "imagereward",
    "aesthetic": "aesthetic",
    "clipscore": "clipscore",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
    "portraits": "portraits",
    "http": "http",
}
DIFFERENTIABLE = ("pickscore", "pickscore_contrast", "hpsv2", "imagereward", "aesthetic", "clipscore", "portraits")  # those with a method `differentiable`
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class RewardSettings:
    """One reward; a YAML list of these is what a config holds. `rewards: [{name: pickscore, path: portraits}, {name: portraits, weight: 0.5}]`"""

    name: str  # key of REWARDS
    weight: float = 1.0  # factor in the weighted sum; 0: measured only
    label: Optional[str] = None  # its name in logs and results; null: `name`, or for http the end of the URL
    path: Optional[str] = None  # folder of weights or hub id; null: the folder named after the reward (docs/rewards.md)
    revision: Optional[str] = None  # commit of a hub id, 40 hexadecimal digits
    tokenizer: Optional[str] = None  # folder, or hub id@commit, of the tokenizer; null: in the folder of weights
    std_floor: float = 1e-4  # a group's advantages are divided by its standard deviation, or by this (the reward's own units) if larger
    batch_size: int = 32  # images scored together
    dtype: str = "fp32"  # of the weights and the arithmetic: fp32, bf16 or fp16
    device: Optional[str] = None  # null: that of the caller
    url: Optional[str] = None  # of `http`: http://HOST:PORT/NAME
    timeout_s: float = 60.0  # of `http`: seconds without an answer until an attempt counts as failed
    token_file: Optional[str] = None  # of `http`: file with the worker's token

    @property
    def key(self) -> str:
        """The name under which its scores are kept."""
        return self.label or ((self.url or "").rstrip("/").rpartition("/")[2] if self.name == "http" else self.name)


class Reward(Protocol):
    """What `load_reward` returns. `name`, `batch_size`: see RewardSettings."""

    name: str
    batch_size: int

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        """images: float32 [B, 3, H, W] in [0, 1], on any device -> float32 [B] on the CPU; greater is better."""

    # Optional, of those named in DIFFERENTIABLE:
    # def differentiable(self, images, prompts, metadata=None) -> Tensor: the same on the reward's device with gradients in `images`: nothing is rounded


class RewardError(RuntimeError):
    """A reward failed on an input; the message names the reward and the prompt."""


# -- settings ---------------------------------------------------------------------------------------------------------


def check_settings(settings: Sequence[RewardSettings], source: str = "rewards") -> list[RewardSettings]:
    """Check what types cannot express. Raises ValueError naming the entry, the field and the fix."""
    for i, s in enumerate(settings):
        where = f"{source}[{i}] ({s.name})"
        if s.name not in REWARDS:
            raise ValueError(f"{source}[{i}]: unknown reward {s.name!r}; {_nearest(s.name, REWARDS)}")
        if s.batch_size < 1:
            raise ValueError(f"{where}: batch_size must be at least 1, got {s.batch_size}")
        if not s.std_floor > 0:
            raise ValueError(f"{where}: std_floor must be positive, got {s.std_floor}")
        if not s.timeout_s > 0:
            raise ValueError(f"{where}: timeout_s must be positive, got {s.timeout_s}")
        if s.dtype not in DTYPES:
            raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}; got {s.dtype!r}")
        if s.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", s.revision):
            raise ValueError(f"{where}: revision must be a commit of 40 hexadecimal digits, got {s.revision!r}; branches and tags move")
        if (s.name == "http") != (s.url is not None):
            raise ValueError(f"{where}: url belongs to the reward http, which needs one: url: http://HOST:PORT/NAME")
    keys = [s.key for s in settings]
    for key in set(keys):
        if keys.count(key) > 1:
            raise ValueError(f"{source}: {keys.count(key)} rewards are called {key!r}; give each a label of its own")
    return list(settings)


def settings_of(entries: object, source: str = "rewards") -> list[RewardSettings]:
    """RewardSettings of plain values as YAML gives them: a list of names or of mappings. ValueError names entry and field."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{source} must be a list of rewards, like [{{name: pickscore, path: portraits}}], got {entries!r}")
    return check_settings([_setting(e, f"{source}[{i}]") for i, e in enumerate(entries)], source)


def read_settings(file: Path | str) -> list[RewardSettings]:
    """RewardSettings of a YAML file: a list, or a mapping with a list under `rewards`. ValueError names the file and the fix."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # yaml, OmegaConf and the file system raise many kinds
        raise ValueError(f"{file} is not a readable YAML file: {error}") from None
    return settings_of(loaded.get("rewards") if isinstance(loaded, dict) else loaded, str(file))


def add_arguments(parser) -> None:
    """The flags by which every command of this package names its rewards; `settings_of_arguments` reads them."""
    parser.add_argument("--reward", default="", metavar="NAME,...", help="rewards, separated by commas: " + ", ".join(REWARDS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME.KEY=VALUE", help="a setting of one of them, e.g. pickscore.path=portraits; may be repeated")
    parser.add_argument("--rewards", metavar="FILE", help="YAML list of rewards with all their settings, instead of --reward; names, separated by commas, are taken too")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")


def settings_of_arguments(args) -> list[RewardSettings]:
    """The rewards that the flags of `add_arguments` name. ValueError names the flag and the fix."""
    if bool(args.reward) == (args.rewards is not None):
        raise ValueError("name rewards either by --reward NAME,... or by --rewards FILE")
    if args.rewards is not None and _is_file_name(args.rewards):
        if args.set:
            raise ValueError("--set goes with --reward; with --rewards FILE, write it into the file")
        return read_settings(args.rewards)
    flag, names = ("--reward", args.reward) if args.reward else ("--rewards", args.rewards)
    entries = {name.strip(): {"name": name.strip()} for name in names.split(",")}
    for change in args.set:
        key, equals, value = change.partition("=")
        name, dot, field = key.partition(".")
        if not (equals and dot and name in entries):
            raise ValueError(f"--set {change}: expected NAME.KEY=VALUE with a NAME of {flag} ({', '.join(entries)})")
        entries[name][field] = value
    return settings_of(list(entries.values()), flag)


def _is_file_name(text: str) -> bool:
    """Rather than names of rewards, separated by commas."""
    return Path(text).suffix in (".yaml", ".yml") or Path(text).name != text or Path(text).is_file()


def _setting(entry, where: str) -> RewardSettings:
    if isinstance(entry, str):
        return RewardSettings(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{where} must be a reward's name or a mapping with one, like {{name: pickscore, path: portraits}}, got {entry!r}")
    fields = [f.name for f in dataclasses.fields(RewardSettings)]
    config = OmegaConf.structured(RewardSettings(entry["name"]))
    for key, value in entry.items():
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key}; {_nearest(str(key), fields)}")
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException:
            raise ValueError(f"{where}: {key} must be {RewardSettings.__dataclass_fields__[key].type}, got {value!r}") from None
    return OmegaConf.to_object(config)


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5) or [n for n in names if n.startswith(name)]
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(names)}"


# -- loading and scoring ----------------------------------------------------------------------------------------------


def load_reward(settings: RewardSettings, device: str | torch.device = "cpu") -> Reward:
    """The reward, ready on `settings.device` or else `device`.

    Raises ValueError for wrong settings, missing or damaged weights (saying how to get them and where to put them) and an unreachable worker.
    """
    check_settings([settings])
    module = importlib.import_module(f".{REWARDS[settings.name]}", __package__)
    reward = module.load(settings, torch.device(settings.device or device))
    reward.name, reward.batch_size = settings.key, settings.batch_size
    return reward


def score(rewards: Sequence[Reward], images: Tensor, prompts: Sequence[str], metadata: Sequence[dict | None] | None = None) -> dict[str, Tensor]:
    """Scores of every reward, {name: float32 [B] on the CPU}, each computed in batches of that reward's `batch_size`.

    images: float [B, 3, H, W] in [0, 1]. prompts, metadata: B each; a reward says what it reads of the metadata.
    Raises ValueError for a wrong input, RewardError when a reward raises, or returns a wrong shape or a value that is not finite.
    """
    prompts = list(prompts)
    _check_input(rewards, images, prompts, metadata)
    metadata = list(metadata) if metadata is not None else [None] * len(prompts)
    images = images.detach().float()
    return {reward.name: torch.cat([_score_batch(reward, images, prompts, metadata, range(i, min(i + reward.batch_size, len(prompts))))
                                    for i in range(0, len(prompts), reward.batch_size)]) for reward in rewards}


def score_differentiably(reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict | None]) -> Tensor:
    """[B] on the images' device, with gradients in images, float [B, 3, H, W] in [0, 1]. RewardError, naming the reward, when it has no such path or fails."""
    if not hasattr(reward, "differentiable"):
        raise RewardError(f"reward {reward.name} is not differentiable")
    try:
        result = reward.differentiable(images, prompts, metadata)
    except Exception as error:
        raise RewardError(f"reward {reward.name}, gradient for images of which the first is {prompts[0]!r}: {type(error).__name__}: {error}") from error
    return result.to(images.device)


def combine(scores: dict[str, Tensor], settings: Sequence[RewardSettings], group: Tensor) -> Tensor:
    """Weighted sum of rewards that are normalised within their groups: sum_r w_r (r - mean_g r) / max(std_g r, std_floor_r), float32 [B].

    group: int64 [B], the same number for pictures of the same prompt (of all ranks, where ranks share a group). mean_g and std_g (population
    standard deviation) are those of the picture's own group, so units and scales of the rewards do not matter, only their weights. The floor
    is in the reward's own units; it keeps rounding noise from counting where a reward says the same of a whole group. A group of one gives 0.
    Raises ValueError when a score is missing or a length is wrong.
    """
    missing = [s.key for s in settings if s.key not in scores]
    if missing:
        raise ValueError(f"no scores of {', '.join(missing)}; there are scores of {', '.join(scores) or 'nothing'}")
    members, index, counts = group.cpu().unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(group), dtype=torch.float64)
    for s in settings:
        r = scores[s.key].double().cpu()
        if r.shape != group.shape:
            raise ValueError(f"{s.key}: {len(r)} scores for {len(group)} group numbers")
        centred = r - (torch.zeros(len(members), dtype=torch.float64).index_add_(0, index, r) / counts)[index]
        std = (torch.zeros(len(members), dtype=torch.float64).index_add_(0, index, centred.square()) / counts).sqrt()
        total += s.weight * centred / std.clamp_min(s.std_floor)[index]
    return total.float()


def _check_input(rewards, images: Tensor, prompts: list, metadata) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not len(images):
        raise ValueError(f"images must be float [B, 3, H, W] with B >= 1, got {images.dtype} {list(images.shape)}")
    if len(prompts) != len(images) or (metadata is not None and len(metadata) != len(images)):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {'no' if metadata is None else len(metadata)} metadata: give one of each per image")
    if not all(isinstance(p, str) for p in prompts):
        raise ValueError("prompts must be strings")
    low, high = images.detach().aminmax()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too
        bad = next(i for i, x in enumerate(images.detach()) if not (x.min() >= -1e-3 and x.max() <= 1 + 1e-3))
        raise ValueError(f"image {bad} ({prompts[bad]!r}) has values outside [0, 1], or NaN; decoded pictures in [-1, 1] become (x + 1) / 2")
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"two rewards have the same name: {', '.join(names)}; give each a label of its own")


def _score_batch(reward: Reward, images: Tensor, prompts: list[str], metadata: list, rows: range) -> Tensor:
    first, last = rows[0], rows[-1]
    where = f"reward {reward.name}, " + (f"prompt {prompts[first]!r}" if first == last else f"images {first} to {last}, first prompt {prompts[first]!r}")
    try:
        result = reward(images[first : last + 1].clamp(0, 1), prompts[first : last + 1], metadata[first : last + 1])
    except Exception as error:
        raise RewardError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(result, Tensor) or result.shape != (len(rows),):
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise RewardError(f"{where}: returned {got} for {len(rows)} images, not [{len(rows)}]")
    result = result.detach().to("cpu", torch.float32)
    bad = (~result.isfinite()).nonzero()
    if len(bad):
        i = bad[0].item()
        raise RewardError(f"reward {reward.name}, prompt {prompts[first + i]!r}: returned {result[i].item()} for image {first + i}")
    return result
