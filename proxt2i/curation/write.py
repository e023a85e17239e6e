"""The shards of the result: samples in the order of their source, cut into shards of equal size, each split in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import time

import numpy as np

from proxt2i.curation import pictures, samples, state
from proxt2i.curation.caption import SPLITS, captioned
from proxt2i.curation.dedup import dedup_marker, deduplicated, survivors
from proxt2i.curation.pictures import REPAIRS
from proxt2i.curation.run import Run, each_tried
from proxt2i.curation.samples import Files
from proxt2i.curation.scan import raw_of, scanned
from proxt2i.curation.sources import IMAGE
from proxt2i.data.buckets import assign, make_buckets
from proxt2i.data.index import index_line
from proxt2i.progress import Progress


def plan(run: Run, captions: list[dict]) -> list[tuple[str, int, list[tuple[int, int, int]]]]:
    """(split, number, [(unit, start, stop) within that unit's samples of the split]) of every shard of the result."""
    shards, size = [], run.config.write.shard_size
    for split in SPLITS:
        counts = [marker["splits"][split] for marker in captions]
        ends = np.cumsum(counts, dtype=np.int64)
        for start in range(0, int(ends[-1]), size):
            stop = min(start + size, int(ends[-1]))
            units = range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left")) + 1)
            parts = [(u, max(0, start - int(ends[u] - counts[u])), min(counts[u], stop - int(ends[u] - counts[u]))) for u in units]
            shards.append((split, start // size, [part for part in parts if part[2] > part[1]]))
    return shards


def shard_inputs(run: Run, markers, codes, captions, shard) -> str:
    return state.digest([shard, [[markers[u]["sha256"], codes[u], captions[u]["sha256"]] for u, _, _ in shard[2]]])


def shard_name(shard) -> str:
    return f"{shard[0]}-{shard[1]:05d}"


def shard_marker_path(run: Run, shard):
    return run.marker_path("write", shard_name(shard))


def written(run: Run, shard, inputs: str) -> dict | None:
    """The marker of a finished shard, if its tar is there."""
    marker = state.read_json(shard_marker_path(run, shard))
    tar = run.out / shard[0] / f"{shard[1]:05d}.tar"
    return marker if marker.get("inputs") == inputs and tar.is_file() and tar.stat().st_size == marker["bytes"] else None


def write(run: Run) -> dict:
    markers = scanned(run)
    codes = deduplicated(run, markers)
    captions = captioned(run, markers, codes)
    shards = plan(run, captions)
    if not shards:
        causes: dict[str, int] = {}
        for marker in [*markers, dedup_marker(run, markers), *captions]:
            for cause, count in marker.get("dropped", {}).items():
                causes[cause] = causes.get(cause, 0) + count
        raise ValueError("no sample is left: " + ", ".join(f"{count:,} {cause}" for cause, count in sorted(causes.items(), key=lambda item: -item[1])))
    todo = [(shard, inputs) for shard in run.mine(shards) if written(run, shard, inputs := shard_inputs(run, markers, codes, captions, shard)) is None]
    cache: dict[int, dict[str, list]] = {}

    def treat(todo, failed):
        started, written = time.monotonic(), 0
        with Progress(total=sum(stop - start for shard, _ in todo for _, start, stop in shard[2]), desc="writing", unit="image", disable=run.quiet or not todo) as bar:
            for shard, inputs in todo:
                try:
                    written += _write_shard(run, shard, inputs, lambda u: _samples(run, u, markers, codes, captions, cache), bar)
                except OSError as error:
                    failed[shard_name(shard)] = error
        return {"images": written, "seconds": time.monotonic() - started}

    return each_tried(run, "write", todo, lambda item: shard_name(item[0]), treat)


def _samples(run: Run, number: int, markers, codes, captions, cache: dict) -> dict[str, list]:
    """{split: [(record, line of the caption stage)]} of a unit; the last one is kept, because the next shard often begins in it."""
    if number not in cache:
        cache.clear()
        records = survivors(run, number, markers[number], codes[number])
        lines = [json.loads(line) for line in state.checked_bytes(run.out / "work" / "caption", captions[number]).decode().splitlines()]
        cache[number] = {split: [(record, line) for record, line in zip(records, lines) if line["split"] == split] for split in SPLITS}
    return cache[number]


class _Hashing:
    """A file that is hashed as it is written."""

    def __init__(self, file):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)


def _write_shard(run: Run, shard, inputs: str, samples_of, bar) -> int:
    """Returns the number of samples."""
    import webdataset

    split, number, parts = shard
    buckets = make_buckets(run.config.write.image_size, run.config.write.bucket_step, max_aspect=min(16.0, run.config.filter.max_aspect))
    about = {"samples": 0, "repaired": {}, "buckets": {}, "hands": 0, "words": [0] * 26, "captions": [], "examples": []}
    with state.whole_file(run.out / split / f"{number:05d}.tar") as file:
        hashing = _Hashing(file)
        with webdataset.TarWriter(hashing, encoder=False, mtime=0) as tar:
            for unit, start, stop in parts:
                rows = samples_of(unit)[split][start:stop]
                with Files([str(path) for path in run.units[unit].files]) as files:
                    for record, line in rows:
                        tar.write(_sample(run, unit, files, record, line, buckets, about))
                        bar.update()
    about["captions"] = sorted(about["captions"])[: run.config.write.prompts]
    marker = shard_marker_path(run, shard)
    marker.parent.mkdir(parents=True, exist_ok=True)
    state.write_atomically(marker.with_suffix(".index"), index_line(run.out / split / f"{number:05d}.tar"))  # here, where tasks share the work
    state.write_atomically(marker, json.dumps(
        {"split": split, "number": number, "bytes": hashing.size, "sha256": hashing.sha256.hexdigest(), "inputs": inputs, **about}) + "\n")
    (run.out / "work" / "failed" / f"write-{marker.stem}.json").unlink(missing_ok=True)
    return about["samples"]


def _sample(run: Run, unit: int, files: Files, record, line: dict, buckets, about: dict) -> dict:
    """The sample as webdataset's TarWriter takes it. Its key is its content's hash, so keys never repeat."""
    raw = raw_of(record)
    data = files.read(raw.spans[IMAGE])
    if hashlib.sha256(data).digest() != record["sha256"].tobytes():
        raise RuntimeError(f"{run.units[unit].name}/{raw.key}: the image has changed since it was scanned, while its file kept size and time")
    extension, image = pictures.repaired(data, int(record["repairs"]), run.config.read.max_pixels)
    metadata, original = samples.read_text(files, raw, False)
    caption = line.get("caption") or original
    width, height = int(record["width"]), int(record["height"])
    bucket = "{}x{}".format(*buckets[int(assign(np.array([[height, width]]), buckets)[0])])
    key, hands = record["sha256"].tobytes().hex()[:24], int(record["hands"])
    repairs = [name for bit, name in enumerate(REPAIRS) if record["repairs"] >> bit & 1]
    ours = {"key": key, "caption": caption, "original_caption": original, "width": width, "height": height, "aspect_ratio": round(width / height, 4), "bucket": bucket,
            "score": round(float(record["score"]), 4) if np.isfinite(record["score"]) else None, "hands": {1: True, 0: False}.get(hands),
            "sha256": record["sha256"].tobytes().hex(), "phash": f"{int(record['hashes'][0, 0]):016x}", "repaired": repairs,
            "source": f"{run.units[unit].name}/{raw.key}".encode(errors="backslashreplace").decode(), "metadata": metadata}
    about["samples"] += 1
    about["buckets"][bucket] = about["buckets"].get(bucket, 0) + 1
    about["hands"] += hands == 1
    about["words"][min(len(caption.split()) // 10, 25)] += 1
    for name in repairs:
        about["repaired"][name] = about["repaired"].get(name, 0) + 1
    if line["split"] == "held_out":
        about["captions"].append([key, " ".join(caption.split()), hands])
    about["examples"] = sorted([*about["examples"], [key, unit, list(map(int, raw.spans[IMAGE]))]])[:4]
    return {"__key__": key, extension: image, "txt": caption.encode(errors="replace"), "json": json.dumps(ours, ensure_ascii=False).encode(errors="replace")}

