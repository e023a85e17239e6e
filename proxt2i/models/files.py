"""Reading and writing model folders safely: readable-or-named-error checks, and saves that are never half done."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


def read_json(path: Path) -> dict:
    """The JSON object in `path`; ValueError naming the file when it is missing or not an object."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def check_component(folder: Path) -> dict:
    """Check that `folder` holds config.json and readable safetensors weights; returns the config.

    Raises ValueError naming the missing or corrupt file and the fix. Reads headers only, not the weights.
    """
    if not folder.is_dir():
        raise ValueError(f"the model's {folder.name} folder is missing: {folder}")
    config = read_json(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        hint = f"; {pickles[0].name} is a pickle and is not loaded, convert it to safetensors" if pickles else ""
        raise ValueError(f"{folder} has no .safetensors weights{hint}")
    for path in weights:
        check_safetensors(path)
    return config


def check_safetensors(path: Path) -> None:
    """ValueError when `path` is missing or no complete safetensors file. Reads the header only."""
    if not path.exists():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); "
                         "it is damaged or incomplete, copy or download it again") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_loaded(folder: Path, info: dict) -> None:
    """ValueError when from_pretrained's loading info has parameters missing or of another shape."""
    problems = [f"{kind.split('_')[0]} {min(map(str, info[kind]))}" + (" and more" if len(info[kind]) > 1 else "")
                for kind in ("missing_keys", "mismatched_keys") if info.get(kind)]
    if problems:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}")


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for root, _, files in os.walk(folder):
        for path in [os.path.join(root, name) for name in files] + [root]:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


@contextmanager
def atomic_folder(folder: Path | str) -> Iterator[Path]:
    """Yields a temporary sibling to fill; on success it is flushed and renamed to `folder`, else removed.

    An older `folder` is kept as `.NAME.previous` until the new one is in place, so a kill at any moment leaves one
    complete copy. Leftovers of killed saves are removed by the next save. One writer per folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    previous = folder.parent / f".{folder.name}.previous"
    for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    tmp = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
    tmp.mkdir()
    try:
        yield tmp
        fsync_tree(tmp)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        tmp.rename(folder)
        fd = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def require_folder(folder: Path | str) -> Path:
    """`folder` as a Path; ValueError when it is not a folder, with the fix when an interrupted save left a backup."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    previous = folder.parent / f".{folder.name}.previous"
    hint = f"; an interrupted save left {previous}, rename it to {folder.name}" if previous.is_dir() else ""
    raise ValueError(f"model folder {folder} does not exist{hint}")


def component_digests(folder: Path, encoders: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of the frozen parts in a model folder: "vae" ("pixels" where there is none), and those of `encoders` ("text_encoder_2",
    with its tokenizer) that exist. Of the files' bytes, so that it does not depend on the precision they are loaded in."""
    digests = {"vae": files_digest([folder / "vae"]) if (folder / "vae").is_dir() else "pixels"}
    for name in encoders:
        if (folder / name).is_dir():
            digests[name] = files_digest([folder / name, folder / name.replace("text_encoder", "tokenizer")])
    return digests


def files_digest(folders: list[Path]) -> str:
    """SHA-256 of the names and bytes of the JSON, safetensors, text and SentencePiece files directly in `folders`."""
    h = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.is_file()):
        if path.suffix in (".json", ".safetensors", ".txt", ".model"):
            h.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    h.update(block)
    return h.hexdigest()


def weights_digest(component) -> str:
    """SHA-256 of a component: its type, its modules' weights, and the plain values among its attributes and config."""
    h = hashlib.sha256(type(component).__name__.encode())
    if isinstance(component, nn.Module):
        for name, tensor in sorted(component.state_dict().items()):
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    _update(h, vars(component) if hasattr(component, "__dict__") else {})
    config = getattr(component, "config", None)
    if isinstance(config, Mapping):
        _update(h, config)
    return h.hexdigest()


def _update(h, values: Mapping) -> None:
    for name, value in sorted(values.items()):
        if name.startswith("_") or name in ("training", "device"):
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, nn.Module):
                h.update(f"{name} {weights_digest(item)}".encode())
            elif isinstance(item, (bool, int, float, str)):
                h.update(f"{name} {item!r}".encode())
