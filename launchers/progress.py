"""How far jobs over data are, by the files that they have finished: curation's stages and latents. Standard library alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

WINDOW_S = 900.0  # the speed is that of the last quarter of an hour of work


def curation(out: Path, shards: int, shard_size: int) -> dict[str, dict]:
    """{stage: progress} of an OUT of proxt2i.curation."""
    work = out / "work"
    found = {"scan": _finished((work / "scan").glob("*.json"), shards, lambda marker: marker["samples"]),
             "dedup": {"done": int((work / "dedup.json").exists()), "total": 1},
             "caption": _finished((work / "caption").glob("*.json"), shards, lambda marker: sum(marker["splits"].values()))}
    total = None
    if found["caption"]["done"] == shards:
        splits: dict[str, int] = {}
        for path in (work / "caption").glob("*.json"):
            for name, samples in _read(path).get("splits", {}).items():
                splits[name] = splits.get(name, 0) + samples
        total = sum(-(-samples // shard_size) for samples in splits.values())
    found["write"] = _finished((work / "write").glob("*.json"), total, lambda marker: marker["samples"])
    found["merge"] = {"done": int((out / "manifest.json").exists()), "total": 1}
    return found


def latents(out: Path) -> dict:
    """Progress of an OUT of proxt2i.data.latents."""
    total = _read(out / "about.json").get("source", {}).get("shards")
    return _finished((path for path in out.glob("*.json") if path.stem.isdigit()), total, lambda entry: sum(entry["counts"]))


def failed_shards(out: Path) -> list[dict]:
    """[{"stage", "shard", "reason"}] that proxt2i.curation has given up for now."""
    return [row for path in sorted((out / "work" / "failed").glob("*.json")) if (row := _read(path))]


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _finished(paths, total: int | None, images_of: Callable[[dict], int]) -> dict:
    """{"done", "total" files, "images", "images_per_s", "seconds_left"}; None where it is not known."""
    rows = []
    for path in paths:
        try:
            rows.append((path.stat().st_mtime, images_of(_read(path))))
        except (OSError, KeyError, TypeError):  # gone meanwhile, or no such file
            continue
    rows.sort()
    images = sum(count for _, count in rows)
    recent = [row for row in rows if row[0] >= rows[-1][0] - WINDOW_S]
    seconds = recent[-1][0] - recent[0][0] if recent else 0.0
    speed = sum(count for _, count in recent[1:]) / seconds if seconds > 0 else None
    left = (total - len(rows)) * images / len(rows) / speed if speed and total is not None and rows else None
    return {"done": len(rows), "total": total, "images": images, "images_per_s": speed, "seconds_left": left}
