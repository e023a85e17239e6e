"""The output folder: whose it is, what of it is finished, and files that are whole or absent.

A result is a data file and, written after it, NAME.json, which holds the data's SHA-256 and what it was made from (`inputs`). It counts only
if both fit, so that a kill at any moment costs one unit of work, and a changed input has what depends on it made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from proxt2i.curation.config import Curation
from proxt2i.data.index import write_atomically

VERSION = 3  # of the results: raised when the same settings give other results


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def claim(out: Path, config: Curation, source: str) -> None:
    """Make OUT this curation's, or find that it is. ValueError as check_free's."""
    if check_free(out, config, source):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "curation.json", json.dumps(_settings(config, source), indent=1) + "\n")


def _settings(config: Curation, source: str) -> dict:
    return json.loads(json.dumps({"version": VERSION, "source": source, **config.results()}))


def check_free(out: Path, config: Curation, source: str) -> bool:
    """Whether OUT is nobody's, not this curation's already. ValueError when it holds results of other settings, or something else."""
    mine, path = _settings(config, source), out / "curation.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} cannot be read; choose another output folder, or remove this one") from None
        for section in mine.keys() | theirs.keys():
            one, other = mine.get(section), theirs.get(section)
            if one != other:
                keys = [k for k in one.keys() | other.keys() if one.get(k) != other.get(k)] if isinstance(one, dict) and isinstance(other, dict) else []
                what = f"{section}.{min(keys)} = {other.get(min(keys))!r}, not {one.get(min(keys))!r}" if keys else f"{section} = {other!r}, not {one!r}"
                raise ValueError(f"{out} holds results of other settings ({what}); choose another output folder, or remove this one")
        return False
    if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no curation; choose another output folder")
    return True


def read_marker(path: Path, inputs: str) -> dict | None:
    """The JSON of a finished result that was made from `inputs` and is undamaged, else None."""
    try:
        marker = json.loads(path.read_text())
        data = path.with_name(marker["file"])
        if marker["inputs"] != inputs or data.stat().st_size != marker["bytes"]:
            return None
        return marker
    except (OSError, ValueError, KeyError):
        return None


def read_json(path: Path) -> dict:
    """{} when it is missing or unreadable."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def finish(path: Path, data: bytes, inputs: str, **more) -> dict:
    """Write a result's data to `path` and its marker beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return mark(path, len(data), hashlib.sha256(data).hexdigest(), inputs, **more)


def mark(path: Path, size: int, sha256: str, inputs: str, **more) -> dict:
    marker = {"file": path.name, "bytes": size, "sha256": sha256, "inputs": inputs, **more}
    write_atomically(path.with_suffix(".json"), json.dumps(marker) + "\n")
    return marker


def checked_bytes(folder: Path, marker: dict) -> bytes:
    """The data of a result. RuntimeError if it is not what was written."""
    data = (folder / marker["file"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != marker["sha256"]:
        raise RuntimeError(f"{folder / marker['file']} is damaged (its SHA-256 differs): remove it and start again")
    return data


@contextmanager
def whole_file(path: Path):
    """A binary file to write to that appears as `path` when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, age_s: float) -> None:
    """Temporary files of killed runs. Young ones may be another task's that is at work."""
    for path in folder.rglob(".*.tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > age_s:
                path.unlink()
        except OSError:
            continue


def to_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def from_bytes(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
