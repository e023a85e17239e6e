"""Where the weights of rewards lie, and what to do when they are not there."""

from __future__ import annotations

import os
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models.files import check_safetensors
from .base import RewardSettings

FOLDER_VARIABLE = "PROXT2I_REWARDS"
CLIP_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Source:
    """What a reward needs: `needed` lists alternatives per file, e.g. (("model.safetensors", "weights.pt"),), any one of which will do.

    downloads: ("hub id", "files") each, from which the folder is filled; tokenizer: files of which one tells that a tokenizer is there (it may
    lie elsewhere); notes: anything that is no hub download.
    """

    needed: tuple[tuple[str, ...], ...]
    downloads: tuple[tuple[str, str], ...]
    tokenizer: tuple[str, ...] = ("tokenizer.json", "vocab.json")
    notes: str = ""

    def missing(self, folder: Path, tokenizer: bool = False) -> list[str]:
        groups = [*self.needed, *([self.tokenizer] if tokenizer and self.tokenizer else [])]
        return [" or ".join(group) for group in groups if not any((folder / f).is_file() for f in group)]


def default_folder(name: str) -> Path:
    """$PROXT2I_REWARDS/NAME, or ~/.cache/proxt2i/rewards/NAME."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "proxt2i" / "rewards") / name


def find_weights(settings: RewardSettings, source: Source) -> Path:
    """The local folder of a reward's weights; a hub id with its revision is downloaded first, unless the hub's cache has it.

    Raises ValueError that says which files are missing, how to get them and where to put them.
    """
    folder = Path(settings.path).expanduser() if settings.path else default_folder(settings.name)
    if settings.path and not folder.exists() and is_hub_id(settings.path):
        if not settings.revision:
            raise ValueError(f"{settings.name}: path {settings.path} is no folder here; as a hub id it needs `revision`, the commit of 40 digits that "
                             f"https://huggingface.co/{settings.path}/commits/main shows")
        folder = download(settings.path, settings.revision, [f for group in source.needed for f in group] + list(CLIP_TOKENIZER) + ["vocab.txt"])
    missing = source.missing(folder)
    if missing:
        raise ValueError(f"{settings.name}: {folder} lacks {', '.join(missing)}.\n{how_to_get(settings.name, source, folder)}")
    return folder


def find_tokenizer(settings: RewardSettings, folder: Path, source: Source) -> Path:
    """The folder of the tokenizer: `settings.tokenizer` (a folder, or hub id@commit), or that of the weights."""
    if settings.tokenizer:
        name, _, commit = settings.tokenizer.partition("@")
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if not (is_hub_id(name) and re.fullmatch(r"[0-9a-f]{40}", commit)):
                raise ValueError(f"{settings.name}: tokenizer {settings.tokenizer} is neither a folder nor hub id@commit with a commit of 40 digits")
            folder = download(name, commit, [*CLIP_TOKENIZER, "vocab.txt"])
    if not any((folder / f).is_file() for f in source.tokenizer):
        raise ValueError(f"{settings.name}: {folder} has no tokenizer ({' or '.join(source.tokenizer)}); put it there, or set `tokenizer`.\n"
                         f"{how_to_get(settings.name, source, folder)}")
    return folder


def is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


def download(hub_id: str, commit: str, files: list[str]) -> Path:
    """A snapshot of `files` in the hub's cache. ValueError when the hub cannot be reached and the cache does not have it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=files))
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(f"cannot download {', '.join(files)} of {hub_id} at {commit}: {type(error).__name__}: {error}\n"
                         "On a machine without the hub, copy these files into a folder and give that as `path`.") from None


def how_to_get(name: str, source: Source, folder: Path) -> str:
    lines = ["To get them (COMMIT: 40 digits, from https://huggingface.co/HUB_ID/commits/main; it is worth noting down):",
             *(f"  hf download {hub} {files} --revision COMMIT --local-dir {folder}" for hub, files in source.downloads)]
    if source.notes:
        lines.append("  " + source.notes)
    lines.append(f"Or put them into another folder and set `path` of the reward {name} to it; without `path` it is ${FOLDER_VARIABLE}/{name}.")
    return "\n".join(lines)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a torch checkpoint read without running any code of it. ValueError if it is damaged."""
    if path.suffix == ".safetensors":
        check_safetensors(path)
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} is not a readable torch checkpoint of plain tensors ({type(error).__name__}: {str(error).splitlines()[0]}); "
                         "download it again, or save its tensors as safetensors") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return content


def first_of(folder: Path, names: tuple[str, ...]) -> Path:
    return next(folder / name for name in names if (folder / name).is_file())


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """load_state_dict in which every name and shape must fit; ValueError names the first that do not."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    reshaped = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if missing or extra or reshaped:
        raise ValueError(f"{path} does not fit the model: " + "; ".join(
            f"{len(keys)} {what}, first {min(keys)}" for what, keys in (("missing", missing), ("unknown", extra), ("of another shape", reshaped)) if keys))
    module.load_state_dict(tensors)


@contextmanager
def quiet_loading():
    """transformers' progress bars are off inside."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
