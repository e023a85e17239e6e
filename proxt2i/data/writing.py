"""Files that are whole or absent, and the writing of WebDataset tar shards."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` at once: temporary name, fsync, rename."""
    data = data.encode() if isinstance(data, str) else data
    tmp = temporary(path)
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file's contents durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}")     # hidden, so that no reader takes it for a shard


def write_samples(folder: str | os.PathLike, samples: Iterable[dict], shard_size: int = 1000,
                  *, image_format: str = "png", overwrite: bool = False) -> list[Path]:
    """Write samples as shards 00000.tar, 00001.tar, ... of `shard_size` samples each; returns the shards' paths.

    A sample is {"key": str, "image": PIL image or uint8 array [H, W, 3], "caption": str, "json": dict, optional}. All
    shards are written under temporary names and renamed at the end, so a killed run leaves no shard behind. Equal
    samples give equal bytes. ValueError if the folder already holds shards (unless `overwrite`, which replaces them),
    if a key is unusable or repeated within its shard, or if there are no samples.
    """
    import webdataset

    if image_format not in IMAGE_EXTENSIONS:
        raise ValueError(f"image_format={image_format!r}: choose one of {', '.join(IMAGE_EXTENSIONS)}")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old = tars_in(folder)
    if old and not overwrite:
        raise ValueError(f"{folder} already holds {len(old)} shards ({old[0].name}, ...): choose another folder, "
                         f"or pass overwrite=True")
    finished: list[tuple[Path, Path]] = []                    # (temporary name, name)
    iterator = iter(samples)
    try:
        while (sample := next(iterator, None)) is not None:
            path = folder / f"{len(finished):05d}.tar"
            tmp = temporary(path)
            finished.append((tmp, path))
            keys: set[str] = set()
            with open(tmp, "wb") as f:
                with webdataset.TarWriter(f, encoder=False, mtime=0) as tar:
                    while sample is not None:
                        tar.write(_encode_sample(sample, image_format, keys))
                        sample = next(iterator, None) if len(keys) < shard_size else None
                f.flush()
                os.fsync(f.fileno())
        if not finished:
            raise ValueError(f"no samples to write to {folder}")
        for tmp, path in finished:
            os.replace(tmp, path)
        for path in set(old) - {path for _, path in finished}:
            path.unlink()
    finally:
        for tmp, _ in finished:
            tmp.unlink(missing_ok=True)
    return [path for _, path in finished]


def _encode_sample(sample: dict, image_format: str, keys: set[str]) -> dict:
    key, image = sample["key"], sample["image"]
    if not re.fullmatch(r"[^./\s]+", key) or key in keys:
        raise ValueError(f"key {key!r}: keys must be unique within a shard, not empty, and free of '.', '/' and spaces")
    keys.add(key)
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg" if image_format == "jpg" else image_format)
    fields = {"__key__": key, image_format: buffer.getvalue(), "txt": sample["caption"].encode()}
    if sample.get("json") is not None:
        fields["json"] = json.dumps(sample["json"], ensure_ascii=False).encode()
    return fields


def tars_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(".tar") and not p.name.startswith("."))
