"""Checkpoints that a crash can neither damage nor lose.

    RUN/checkpoints/step-000050000/     named by images seen
        uvit/, uvit_ema/                weights and averaged weights, diffusers layout (config.json + safetensors)
        optimizer-00000-of-00002.safetensors   AdamW state of one rank's ZeRO partition
        state.json                      progress, resolved config, size and SHA-256 of every other file
    RUN/checkpoints/latest              name of the newest one

Everything is written under step-IMAGES.tmp, synced to disk and renamed; `latest` moves last and old checkpoints go only
then. A folder without the final name is not a checkpoint. All tensors are safetensors: nothing here is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch.distributed as dist

from proxt2i.models.files import fsync_tree
from proxt2i.training.distributed import Ranks, first_rank_does, gather_objects

STATE = "state.json"
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    state: dict

    @property
    def images_seen(self) -> int:
        return self.state["images_seen"]


class CheckpointStore:
    """The checkpoints of one run folder. `keep`: how many of the newest stay on disk."""

    def __init__(self, run_dir: str | Path, ranks: Ranks, keep: int = 2):
        self.folder = Path(run_dir) / "checkpoints"
        self.ranks, self.keep = ranks, keep

    def save(self, state: dict, write_weights: Callable[[Path], None], write_rank: Callable[[Path], Path]) -> Path:
        """Collective. Rank 0 calls write_weights(folder); every rank calls write_rank(folder), which returns the file it wrote.

        `state` must hold "images_seen". Returns the finished checkpoint's folder.
        """
        final = self.folder / f"step-{state['images_seen']:09d}"
        partial = final.with_suffix(".tmp")
        if self.ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        own_file = write_rank(partial)
        own = {own_file.relative_to(partial).as_posix(): _fingerprint(own_file)}
        fsync(own_file)
        if self.ranks.is_first:
            write_weights(partial)
        files = {name: fingerprint for part in gather_objects(own) for name, fingerprint in part.items()}
        if self.ranks.is_first:
            self._finish(partial, final, state, files)
        dist.barrier()
        return final

    def _finish(self, partial: Path, final: Path, state: dict, files: dict) -> None:
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            files.setdefault(path.relative_to(partial).as_posix(), _fingerprint(path))
        (partial / STATE).write_text(json.dumps({**state, "files": files}, indent=1))
        fsync_tree(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        fsync(self.folder)
        replace_text(self.folder / LATEST, final.name)
        for old in self._names()[self.keep:]:
            shutil.rmtree(self.folder / old)

    def exist(self) -> bool:
        return bool(self._names())

    def find(self, wanted: str, say: Callable[[str], None] = print) -> Checkpoint | None:
        """Collective. The checkpoint to resume from: the newest intact one for "auto", else the folder `wanted`.

        `wanted` may also be a run folder. Damaged checkpoints are skipped with a message naming the file. None when
        there is no checkpoint at all. Raises ValueError when there are some but none is intact, or `wanted` is unusable.
        """
        folder = first_rank_does(self.ranks, lambda: self._find(wanted, say))
        return None if folder is None else Checkpoint(Path(folder), read_state(Path(folder)))

    def _find(self, wanted: str, say) -> str | None:
        store = self
        if wanted != "auto":
            path = Path(wanted)
            if not path.is_dir():
                raise ValueError(f"--resume {wanted}: no such folder")
            if not (path / "checkpoints").is_dir():
                check_intact(path)
                return str(path)
            store = CheckpointStore(path, self.ranks)
        names = store._names()
        for name in names:
            try:
                check_intact(store.folder / name)
                return str(store.folder / name)
            except ValueError as error:
                say(f"skipping a damaged checkpoint: {error}")
        if names:
            raise ValueError(f"none of the {len(names)} checkpoints in {store.folder} is intact; "
                             f"start over in another train.run_dir, or delete that folder")
        return None

    def _names(self) -> list[str]:
        """Finished checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        return sorted((p.name for p in self.folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()), reverse=True)


def read_state(folder: Path) -> dict:
    path = folder / STATE
    try:
        state = json.loads(path.read_text())
        state["images_seen"], state["files"]
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint's state ({type(error).__name__}: {error})") from None


def check_intact(folder: Path) -> None:
    """Raises ValueError naming the first file that is missing, cut short or altered."""
    for name, expected in read_state(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        if _fingerprint(path) != expected:
            raise ValueError(f"{path} has changed since it was written (SHA-256 differs)")


def _fingerprint(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def fsync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)
