"""Checkpoints that a crash can neither damage nor lose.

    RUN/checkpoints/step-000050000/     named by images seen
        rank-00000-of-00002.safetensors what one rank owns: weights, averaged weights, optimizer state (see training.state)
        state.json                      progress, resolved config, the network, size and SHA-256 of every other file
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

from safetensors import SafetensorError

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
        self.protected: str | None = None  # name of a checkpoint that stays, however old

    def save(self, state: dict, write_rank: Callable[[Path], Path]) -> Path:
        """Collective. Every rank calls write_rank(folder), which returns the file it wrote. Returns the finished checkpoint's folder.

        `state` must hold "images_seen". Raises ValueError on every rank when one could not write (disk full, say): what
        was written is removed again, and older checkpoints stay as they were.
        """
        final = self.folder / f"step-{state['images_seen']:09d}"
        partial = final.with_suffix(".tmp")
        first_rank_does(self.ranks, lambda: self._attempt(final, lambda: _make_empty(partial)))
        own, problem = {}, None
        try:
            own = self._attempt(final, lambda: _written(write_rank(partial)))
        except ValueError as error:
            problem = f"rank {self.ranks.rank}: {error}"
        parts = gather_objects((own, problem))
        problems = [problem for _, problem in parts if problem]
        files = {name: fingerprint for part, _ in parts for name, fingerprint in part.items()}

        def finish():
            try:
                if problems:
                    raise ValueError("; ".join(problems))
                self._attempt(final, lambda: self._finish(partial, final, state, files))
            except ValueError:
                shutil.rmtree(partial, ignore_errors=True)
                raise

        first_rank_does(self.ranks, finish)
        return final

    def _attempt(self, final: Path, work: Callable):
        """work(), with what a disk can do to it as a ValueError that says what is left."""
        try:
            return work()
        except (OSError, SafetensorError) as error:
            kept = finished(self.folder)
            rest = f"the last good checkpoint is {self.folder / kept[0]}" if kept else "there is no earlier checkpoint"
            raise ValueError(f"cannot save {final}: {error}; {rest}. Make room or mend the disk, then continue with --resume") from None

    def _finish(self, partial: Path, final: Path, state: dict, files: dict) -> None:
        (partial / STATE).write_text(json.dumps({**state, "files": files}, indent=1))
        fsync_tree(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        fsync(self.folder)
        replace_text(self.folder / LATEST, final.name)
        for old in finished(self.folder)[self.keep:]:
            if old != self.protected:
                shutil.rmtree(self.folder / old)

    def exist(self) -> bool:
        return bool(finished(self.folder))

    def find(self, wanted: str, say: Callable[[str], None] = print) -> Checkpoint | None:
        """Collective. The checkpoint to resume from: this run's newest intact one for "auto", else find_checkpoint(wanted)."""
        run_dir = self.folder.parent
        found = first_rank_does(self.ranks, lambda: None if wanted == "auto" and not run_dir.is_dir() else
                                find_checkpoint(run_dir if wanted == "auto" else Path(wanted), say))
        return None if found is None else Checkpoint(found, read_state(found))


    def choose(self, resume: str | None, config: dict, say: Callable[[str], None]) -> Checkpoint | None:
        """Collective. Where a run begins: at nothing (None), or at the checkpoint that `resume` asks for ("auto" or a path; see `find`).

        config: the run's settings, to say which have changed. ValueError when the run folder holds checkpoints and `resume` is None.
        """
        if resume is None:
            if first_rank_does(self.ranks, self.exist):
                raise ValueError(f"{self.folder} already holds checkpoints: add --resume to continue that run, "
                                 "or choose another train.run_dir")
            return None
        checkpoint = self.find(resume, say)
        if checkpoint is None:
            say(f"--resume: no checkpoint in {self.folder}; starting from the beginning")
        else:
            say(f"resuming from {checkpoint.folder} ({checkpoint.images_seen:,} images)")
            for change in _changed_settings(checkpoint.state["config"], config):
                say(f"  changed since that checkpoint: {change}")
        return checkpoint


def _changed_settings(old: dict, new: dict) -> list[str]:
    """"section.key: old -> new" for every setting that differs, except the run folder's place."""
    return [f"{section}.{key}: {old.get(section, {}).get(key)} -> {value}"
            for section, values in new.items() for key, value in values.items()
            if old.get(section, {}).get(key) != value and key != "run_dir"]


def finished(folder: Path) -> list[str]:
    """Names of the finished checkpoints in a run's checkpoints folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p.name for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()), reverse=True)


def find_checkpoint(path: Path, say: Callable[[str], None] = print) -> Path | None:
    """`path` is a checkpoint: that, if it is intact. `path` is a run folder: its newest intact one; None if it has none at all.

    Damaged ones are skipped with a message. Raises ValueError when none is intact, naming the damaged file.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a run folder or one of its checkpoints/step-*")
    if (path / STATE).exists() or path.name.startswith("step-"):
        check_intact(path)
        return path
    names = finished(path / "checkpoints")
    for name in names:
        try:
            check_intact(path / "checkpoints" / name)
            return path / "checkpoints" / name
        except ValueError as error:
            say(f"skipping a damaged checkpoint: {error}")
    if names:
        raise ValueError(f"none of the {len(names)} checkpoints in {path / 'checkpoints'} is intact; "
                         "start over in another train.run_dir, or delete that folder")
    return None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _written(path: Path) -> dict:
    """{name: fingerprint} of a file that is safely on the disk."""
    fsync(path)
    return {path.name: _fingerprint(path)}


def read_state(folder: Path) -> dict:
    path = folder / STATE
    try:
        state = json.loads(path.read_text())
        state["images_seen"], state["files"], state["config"], state["network"]
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
