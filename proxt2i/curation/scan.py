"""The stage that looks at every byte: a unit in, a record (see record_dtype) of every sample out that got through, and the others counted by cause."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from proxt2i.curation import samples, state
from proxt2i.curation.config import Curation, read_placeholders
from proxt2i.curation.pictures import REPAIRS
from proxt2i.curation.run import Run, each_tried, finish, num_workers
from proxt2i.curation.samples import Chunk, Inspection, Rules
from proxt2i.curation.sources import IMAGE, Listing, Raw, Unit
from proxt2i.curation.workers import Workers

CHUNK = 32  # samples a worker gets at once
EXAMPLES = 4  # dropped samples named per cause and unit
HISTOGRAMS = {  # name -> edges of its bins
    "short edge (pixels)": np.array([0, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 1 << 31]),
    "aspect ratio (width / height)": np.array([0, 0.25, 0.4, 0.5, 0.5625, 0.65, 0.75, 0.85, 0.95, 1.05, 1.18, 1.33, 1.54, 1.78, 2, 2.5, 4, 1e9]),
    "score": np.linspace(0, 10, 41),
}  # fmt: skip


def record_dtype(key_bytes: int) -> np.dtype:
    """One sample that a scan has let through."""
    return np.dtype([("key", f"S{max(1, key_bytes)}"), ("extension", "S4"), ("spans", "<i8", (3, 3)), ("sha256", "u1", (32,)), ("hashes", "<u8", (2, 3)),
                     ("key_hash", "<u8"), ("width", "<i4"), ("height", "<i4"), ("thumb", "u1", (192,)), ("repairs", "u1"), ("score", "<f4"), ("hands", "i1")])


def rules_of(config: Curation) -> Rules:
    c, f = config, config.filter
    return Rules(c.read.max_bytes, c.read.max_pixels, c.read.check_pairs, c.require_caption, f.min_short, f.max_aspect, f.max_punsafe, f.max_pwatermark,
                 tuple(f.nsfw), read_placeholders(f.placeholders), tuple(c.hands.keys), c.aesthetic.image_size if c.aesthetic.reward or c.hands.detector else 0)


def scan(run: Run) -> dict:
    todo = [(unit, stamp) for unit in run.mine(run.units) if scan_marker(run, unit, stamp := state.digest(unit.stamp())) is None]
    return each_tried(run, "scan", todo, lambda item: item[0].name, lambda todo, failed: _scan(run, todo, failed))


def _scan(run: Run, todo: list, failed: dict[str, OSError]) -> dict:
    listings: dict[str, Listing] = {}
    found: list[Inspection] = []
    rules = rules_of(run.config)

    def jobs() -> Iterator[tuple]:
        for unit, stamp in todo:
            try:
                listing = listings[unit.name] = unit.list()
            except OSError as error:
                failed[unit.name] = error
                continue
            files = tuple(map(str, unit.files))
            rules_here = replace(rules, check_pairs=rules.check_pairs and unit.is_tar)  # files of one name in a folder belong together
            starts = range(0, max(1, len(listing.samples)), CHUNK)
            for start in starts:
                yield (unit, stamp, start == starts[-1]), Chunk(files, tuple(listing.samples[start : start + CHUNK]), rules_here)

    started, seen = time.monotonic(), 0
    with Workers(num_workers(run.config)) as workers, run.bar([unit for unit, _ in todo], "scanning") as bar:
        judge = _Judge(run)
        for (unit, stamp, last), inspections in workers.ordered(jobs(), samples.inspect_chunk, samples.split, samples.crashed):
            listing = listings[unit.name]
            if isinstance(inspections, OSError):
                failed[unit.name] = inspections
            if unit.name in failed:
                judge.waiting.clear()
                found = []
                if last:
                    del listings[unit.name]
                continue
            judge(inspections)
            found += inspections
            seen += len(inspections)
            bar.update(unit.size * len(inspections) // max(1, len(listing.samples)))
            bar.set_postfix_str(f"{seen / (time.monotonic() - started):,.0f} images/s", refresh=False)
            if last:
                judge.finish()
                _write_scan(run, unit, stamp, listings.pop(unit.name), found)
                found = []
    return {"images": seen, "seconds": time.monotonic() - started}


def scan_marker(run: Run, unit: Unit, stamp: str | None = None) -> dict | None:
    return state.read_marker(run.marker_path("scan", unit.name), stamp or state.digest(unit.stamp()))


class _Judge:
    """The models over the pictures that got through, in batches within a unit (so results do not depend on other units). Sets cause, score and hands."""

    def __init__(self, run: Run):
        c = run.config
        self.scores = run.load("scores") if c.aesthetic.reward is not None else None
        self.hands = run.load("hands") if c.hands.detector is not None else None
        self.min_score = c.aesthetic.min_score
        self.batch_size = self.scores.batch_size if self.scores else self.hands.batch_size if self.hands else 0
        self.waiting: list[Inspection] = []

    def __call__(self, inspections: list[Inspection]) -> None:
        if self.batch_size:
            self.waiting += [one for one in inspections if not one.cause]
            while len(self.waiting) >= self.batch_size:
                self._batch(self.batch_size)

    def finish(self) -> None:
        if self.waiting:
            self._batch(len(self.waiting))

    def _batch(self, count: int) -> None:
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        crops = np.stack([one.crop for one in batch])
        if self.scores is not None:
            for one, score in zip(batch, self.scores(crops, [one.caption for one in batch]).tolist()):
                one.score = score
                if score < self.min_score:
                    one.cause = "score too low"
        rows = [i for i, one in enumerate(batch) if not one.cause and one.hands < 0] if self.hands is not None else []
        if rows:
            for i, yes in zip(rows, self.hands(crops[rows]).tolist()):
                batch[i].hands = int(yes)
        for one in batch:
            one.crop = None


def _write_scan(run: Run, unit: Unit, stamp: str, listing: Listing, found: list[Inspection]) -> None:
    kept = [(raw, one) for raw, one in zip(listing.samples, found) if not one.cause]
    records = np.zeros(len(kept), record_dtype(max((len(raw.key.encode(errors="surrogateescape")) for raw, _ in kept), default=1)))
    for row, (raw, one) in zip(records, kept):
        key = raw.key.encode(errors="surrogateescape")
        row["key"], row["extension"], row["spans"] = key, raw.extension, [span or (-1, -1, -1) for span in raw.spans]
        row["sha256"], row["thumb"] = np.frombuffer(one.sha256, np.uint8), np.frombuffer(one.thumb, np.uint8)
        row["hashes"], row["key_hash"] = one.hashes, int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
        row["width"], row["height"] = one.size
        row["repairs"], row["score"], row["hands"] = one.repairs, one.score, one.hands
    dropped: dict[str, int] = {}
    examples: dict[str, list] = {}
    for key, cause, span in [(key, cause, None) for key, cause in listing.dropped] + [
            (raw.key, one.cause, raw.spans[IMAGE]) for raw, one in zip(listing.samples, found) if one.cause]:
        dropped[cause] = dropped.get(cause, 0) + 1
        if len(examples.setdefault(cause, [])) < EXAMPLES:
            examples[cause].append([key.encode(errors="backslashreplace").decode(), span])
    repaired = {name: sum(one.repairs >> bit & 1 for _, one in kept) for bit, name in enumerate(REPAIRS)}
    sizes = np.array([one.size for one in found if one.size], dtype=float).reshape(-1, 2)
    scores = [one.score for one in found if np.isfinite(one.score)]
    values = {"short edge (pixels)": sizes.min(1), "aspect ratio (width / height)": sizes[:, 0] / sizes[:, 1], "score": np.clip(scores, 0, 10)}
    finish(run, "scan", unit.name, state.to_bytes(records), stamp,
           samples=len(listing.samples) + len(listing.dropped), lost=listing.lost, damage=listing.damage, records=len(records), dropped=dropped,
           repaired={name: n for name, n in repaired.items() if n}, examples=examples,
           histograms={name: np.histogram(values[name], edges)[0].tolist() for name, edges in HISTOGRAMS.items()})


# -- what later stages read -------------------------------------------------------------------------------------------


def scanned(run: Run) -> list[dict]:
    """The scan's marker of every unit. ValueError if some are missing."""
    markers = [scan_marker(run, unit) for unit in run.units]
    missing = [unit.name for unit, marker in zip(run.units, markers) if marker is None]
    if missing:
        raise ValueError(f"{len(missing):,} of {len(markers):,} shards are not scanned, or have changed since ({missing[0]}, ...): run --stage scan, every task of it, first")
    return markers


def records_of(run: Run, marker: dict) -> np.ndarray:
    return state.from_bytes(state.checked_bytes(run.out / "work" / "scan", marker))


def raw_of(record) -> Raw:
    return Raw(record["key"].decode(errors="surrogateescape"), record["extension"].decode(),
               tuple(None if span[0] < 0 else tuple(span) for span in record["spans"].tolist()))
