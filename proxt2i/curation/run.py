"""The stages of a curation, each over whole units (shards), each skipping what is finished. docs/curation.md draws the picture.

    scan      every unit: read, check, decode once, filter, hash, score         -> work/scan/NAME.npy    tasks share the units
    dedup     all units at once: who is a duplicate of whom                     -> work/dedup/NAME.npy   one task
    caption   every unit: captions of what is left, and where each sample goes  -> work/caption/NAME.jsonl
    write     every shard of the result                                         -> train/, held_out/, hands/
    merge     checks that all is there; index, manifest, prompts, datacard, report                        one task
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from proxt2i.curation import dedup, pictures, state
from proxt2i.curation.config import Curation, read_placeholders
from proxt2i.curation.pictures import REPAIRS, Chunk, Inspection, Rules, Shown
from proxt2i.curation.sources import IMAGE, Listing, Raw, Unit, find_units
from proxt2i.curation.workers import Workers
from proxt2i.progress import Progress

STAGES = ("scan", "dedup", "caption", "write", "merge")
SHARED = ("scan", "caption", "write")  # by the tasks of an array
SPLITS = ("train", "held_out", "hands")
CHUNK = 32  # samples a worker gets at once
TRIES = 3  # of a shard that cannot be read or written
PAUSE_S = 2.0  # before the second of them; longer before the next
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


@dataclass
class Run:
    """One invocation: what is to be curated, where to, and this task's part."""

    data: Path
    out: Path
    config: Curation
    task: int = 0
    tasks: int = 1
    quiet: bool = False
    models: dict = field(default_factory=dict)

    @cached_property
    def units(self) -> list[Unit]:
        return find_units(self.data, self.config.read.files_per_part)

    @cached_property
    def device(self):
        from proxt2i.pipeline import pick_device

        return pick_device(self.config.run.device)

    def mine(self, things: list) -> list:
        return things[self.task :: self.tasks]

    def marker_path(self, stage: str, name: str) -> Path:
        return self.out / "work" / stage / f"{name}.json"

    def load(self, name: str):
        """The model of that name, loaded once. ValueError if it cannot be had."""
        if name not in self.models:
            if name == "captioner":
                from proxt2i.curation.caption import Captioner

                self.models[name] = Captioner(self.config.caption, self.device)
            else:
                from proxt2i.curation import models

                self.models[name] = {"scores": models.Scores, "hands": models.Hands}[name](self.config, self.device)
        return self.models[name]

    def bar(self, units: list[Unit], what: str) -> Progress:
        """Progress in bytes, whose total is known beforehand; images/s beside."""
        return Progress(total=sum(unit.size for unit in units), desc=what, unit="B", unit_scale=True, disable=self.quiet or not sum(unit.size for unit in units),
                    bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]", mininterval=0.5)


def run_stages(run: Run, stages: tuple[str, ...] = STAGES) -> dict:
    """Run `stages` in their order; returns the last one's summary. ValueError for what stands in the way, before any work on pictures."""
    units = run.units  # nothing to curate is said first
    read_placeholders(run.config.filter.placeholders)
    names = [unit.name for unit in units]
    if len(set(names)) < len(names):
        raise ValueError(f"{run.data}: two shards have the same name")
    if run.out.resolve() == run.data.resolve() or run.data.resolve() in run.out.resolve().parents or run.out.resolve() in run.data.resolve().parents:
        raise ValueError(f"the output folder {run.out} must not lie in the input folder {run.data}, nor the other way round")
    _load_models(run, stages)
    state.claim(run.out, run.config, str(run.data.resolve()))
    state.remove_leftovers(run.out, 0.0 if run.tasks == 1 else 3600.0)
    from proxt2i.curation.report import merge
    from proxt2i.curation.write import write

    functions = {"scan": scan, "dedup": find_duplicates, "caption": caption, "write": write, "merge": merge}
    summary = {}
    for stage in stages:
        summary = functions[stage](run)
    return summary


def _load_models(run: Run, stages) -> None:
    """What is missing shall be said at once, not after hours of other work; weights are loaded when their stage comes."""
    c = run.config
    if "scan" in stages and any(scan_marker(run, unit) is None for unit in run.mine(run.units)):
        if c.aesthetic.reward is not None:
            run.load("scores")
        if c.hands.detector is not None:
            run.load("hands")
    if "caption" in stages and c.caption.model is not None:
        from proxt2i.curation.caption import check_folder

        check_folder(c.caption.model)


def num_workers(config: Curation) -> int:
    return config.run.workers or len(os.sched_getaffinity(0))


# -- scan -------------------------------------------------------------------------------------------------------------


def rules_of(config: Curation) -> Rules:
    c, f = config, config.filter
    return Rules(c.read.max_bytes, c.read.max_pixels, c.read.check_pairs, c.require_caption, f.min_short, f.max_aspect, f.max_punsafe, f.max_pwatermark,
                 tuple(f.nsfw), read_placeholders(f.placeholders), tuple(c.hands.keys), c.aesthetic.image_size if c.aesthetic.reward or c.hands.detector else 0)


class Failed(ValueError):
    """Shards that could not be treated, though they were tried again; the others are finished."""


def each_tried(run: Run, stage: str, todo: list, name_of, treat) -> dict:
    """treat(todo, failed) -> summary, again with what it put into `failed`: {name: OSError}. What fails TRIES times is noted in OUT/work/failed. Failed names them."""
    summary: dict = {}
    failed: dict[str, OSError] = {}
    for attempt in range(TRIES):
        failed.clear()
        for key, value in treat(todo, failed).items():
            summary[key] = summary.get(key, 0) + value
        for error in failed.values():
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise error  # no shard's fault
        todo = [item for item in todo if name_of(item) in failed]
        if not todo:
            return summary
        if attempt < TRIES - 1:
            time.sleep(PAUSE_S * (attempt + 1))
    folder = run.out / "work" / "failed"
    for item in todo:
        folder.mkdir(parents=True, exist_ok=True)
        state.write_atomically(folder / f"{stage}-{name_of(item)}.json", json.dumps({"stage": stage, "shard": name_of(item), "reason": str(failed[name_of(item)])}) + "\n")
    listed = "".join(f"\n  {name_of(item)}: {failed[name_of(item)]}" for item in todo[:20])
    raise Failed(f"{stage}: {len(todo):,} shards could not be treated after {TRIES} tries, all others of this task are finished:{listed}\n"
                 "Repair them or move them away, and call the same command again: it goes on from here")


def finish(run: Run, stage: str, name: str, data: bytes, inputs: str, **more) -> None:
    """Write a result, and forget that it once failed."""
    state.finish(run.marker_path(stage, name).with_suffix(".npy" if stage == "scan" else ".jsonl"), data, inputs, **more)
    (run.out / "work" / "failed" / f"{stage}-{name}.json").unlink(missing_ok=True)


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
        for (unit, stamp, last), inspections in workers.ordered(jobs(), pictures.inspect_chunk, pictures.split, pictures.crashed):
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


# -- dedup ------------------------------------------------------------------------------------------------------------


def scanned(run: Run) -> list[dict]:
    """The scan's marker of every unit. ValueError if some are missing."""
    markers = [scan_marker(run, unit) for unit in run.units]
    missing = [unit.name for unit, marker in zip(run.units, markers) if marker is None]
    if missing:
        raise ValueError(f"{len(missing):,} of {len(markers):,} shards are not scanned, or have changed since ({missing[0]}, ...): run --stage scan, every task of it, first")
    return markers


def records_of(run: Run, marker: dict) -> np.ndarray:
    return state.from_bytes(state.checked_bytes(run.out / "work" / "scan", marker))


def dedup_inputs(run: Run, markers: list[dict]) -> str:
    return state.digest([[unit.name, marker["sha256"]] for unit, marker in zip(run.units, markers)])


def dedup_marker(run: Run, markers: list[dict]) -> dict | None:
    return state.read_marker(run.out / "work" / "dedup.json", dedup_inputs(run, markers))


def find_duplicates(run: Run) -> dict:
    if run.task:
        return {}
    markers = scanned(run)
    if (marker := dedup_marker(run, markers)) is not None:
        return marker
    c, folder = run.config.dedup, run.out / "work" / "dedup"
    folder.mkdir(parents=True, exist_ok=True)
    counts = [marker["records"] for marker in markers]
    with Progress(total=sum(counts) * (1 + pictures.BANDS * (c.near and c.distance > 0)), desc="finding duplicates", unit="", unit_scale=True, disable=run.quiet) as bar:
        def samples():
            for number, marker in enumerate(markers):
                yield number, records_of(run, marker)

        found = dedup.find_duplicates(samples(), run.out / "work" / "dedup.sqlite", exact=c.exact, near=c.near, distance=c.distance, color=c.color, mirrored=c.mirrored,
                                      placeholder_repeats=run.config.filter.placeholder_repeats, advance=bar.update)
    starts = np.cumsum([0, *counts])
    parts = []
    for unit, start, stop in zip(run.units, starts, starts[1:]):
        part = state.to_bytes(found.codes[start:stop])
        state.write_atomically(folder / f"{unit.name}.npy", part)
        parts.append([len(part), hashlib.sha256(part).hexdigest()])

    def place(i: int) -> list[int]:
        unit = int(np.searchsorted(starts, i, "right")) - 1
        return [unit, i - int(starts[unit])]

    summary = {"dropped": {dedup.CAUSES[code]: int(n) for code in (dedup.EXACT, dedup.NEAR, dedup.PLACEHOLDER) if (n := (found.codes == code).sum())},
               "repeated_keys": found.repeated_keys, "pairs": [[place(kept), place(dropped), cause] for kept, dropped, cause in found.pairs],
               "placeholders": sorted(found.placeholders)}
    return state.finish(run.out / "work" / "dedup.codes", json.dumps(parts).encode(), dedup_inputs(run, markers), **summary)


def deduplicated(run: Run, markers: list[dict]) -> list[str]:
    """SHA-256 of every unit's codes. ValueError if the stage has not been run on these scans."""
    marker = dedup_marker(run, markers)
    if marker is None:
        raise ValueError("duplicates have not been looked for, or shards have been scanned anew since: run --stage dedup first")
    return [sha for _, sha in json.loads(state.checked_bytes(run.out / "work", marker))]


def survivors(run: Run, number: int, marker: dict, codes_sha: str) -> np.ndarray:
    """Records of a unit that are no duplicates."""
    codes = state.checked_bytes(run.out / "work" / "dedup", {"file": f"{run.units[number].name}.npy", "sha256": codes_sha})
    return records_of(run, marker)[state.from_bytes(codes) == dedup.KEPT]


# -- caption ----------------------------------------------------------------------------------------------------------


def split_of(config: Curation, record) -> str:
    """train, held_out or hands: by the hash of the content, so the same picture goes the same way in every curation."""
    if int.from_bytes(record["sha256"][:8].tobytes(), "big") < config.write.held_out * 2**64:
        return "held_out"
    return "hands" if config.write.hands_apart and record["hands"] == 1 else "train"


def caption(run: Run) -> dict:
    markers = scanned(run)
    codes = deduplicated(run, markers)
    todo = [(number, inputs) for number in run.mine(list(range(len(run.units))))
            if state.read_marker(run.marker_path("caption", run.units[number].name), inputs := caption_inputs(markers, codes, number)) is None]
    captioner = run.load("captioner") if run.config.caption.model is not None and todo else None
    return each_tried(run, "caption", todo, lambda item: run.units[item[0]].name, lambda todo, failed: _caption(run, markers, codes, captioner, todo, failed))


def _caption(run: Run, markers: list[dict], codes: list[str], captioner, todo: list, failed: dict[str, OSError]) -> dict:
    size, most = run.config.caption.batch_size, run.config.caption.max_pixels
    alive: dict[int, np.ndarray] = {}

    def jobs():
        for number, inputs in todo:
            records = alive[number] = survivors(run, number, markers[number], codes[number])
            starts = range(0, max(1, len(records)), size) if captioner else range(1)
            for start in starts:
                spans = [tuple(record["spans"][IMAGE].tolist()) for record in records[start : start + size]] if captioner else []
                yield (number, inputs, start == starts[-1]), Shown(tuple(map(str, run.units[number].files)), tuple(spans), most, run.config.read.max_pixels)

    started, seen, answers = time.monotonic(), 0, []
    with Workers(num_workers(run.config) if captioner else 0) as workers, run.bar([run.units[number] for number, _ in todo], "captioning") as bar:
        for (number, inputs, last), shown in workers.ordered(jobs(), pictures.show_chunk, ahead=1):
            name = run.units[number].name
            if isinstance(shown, OSError):
                failed[name] = shown
            if name in failed:
                answers = []
                if last:
                    del alive[number]
                continue
            if shown:
                answers += captioner(shown)
                seen += len(shown)
                bar.update(run.units[number].size * len(shown) // len(alive[number]))
                bar.set_postfix_str(f"{seen / (time.monotonic() - started):,.1f} images/s", refresh=False)
            if last:
                try:
                    _write_captions(run, number, inputs, alive.pop(number), answers)
                except OSError as error:
                    failed[name] = error
                answers = []
    return {"images": seen, "seconds": time.monotonic() - started}


def caption_inputs(markers: list[dict], codes: list[str], number: int) -> str:
    return state.digest([markers[number]["sha256"], codes[number]])


def _write_captions(run: Run, number: int, inputs: str, records: np.ndarray, answers: list) -> None:
    """A line a record: {"split"; "caption": the new one, or null; "trouble"}; split null: dropped."""
    troubles: dict[str, int] = {}
    splits = dict.fromkeys(SPLITS, 0)
    failed, lines = 0, []
    with pictures.Files([str(path) for path in run.units[number].files]) as files:
        for i, record in enumerate(records):
            line = {"split": split_of(run.config, record)}
            if answers:
                line |= {"caption": answers[i].caption or None, "trouble": answers[i].trouble}
                if answers[i].trouble:
                    troubles[answers[i].trouble] = troubles.get(answers[i].trouble, 0) + 1
                if not answers[i].caption and (run.config.caption.on_failure == "drop" or not pictures.read_text(files, raw_of(record), False)[1]):
                    line["split"] = None
            failed += line["split"] is None
            if line["split"]:
                splits[line["split"]] += 1
            lines.append(json.dumps(line, ensure_ascii=False))
    finish(run, "caption", run.units[number].name, "".join(line + "\n" for line in lines).encode(), inputs, splits=splits,
           dropped={"no caption could be made": failed} if failed else {}, troubles=troubles, captions=sum(bool(one.caption) for one in answers))


def raw_of(record) -> Raw:
    return Raw(record["key"].decode(errors="surrogateescape"), record["extension"].decode(),
               tuple(None if span[0] < 0 else tuple(span) for span in record["spans"].tolist()))


def captioned(run: Run, markers: list[dict], codes: list[str]) -> list[dict]:
    found = [state.read_marker(run.marker_path("caption", unit.name), caption_inputs(markers, codes, number)) for number, unit in enumerate(run.units)]
    missing = [unit.name for unit, marker in zip(run.units, found) if marker is None]
    if missing:
        raise ValueError(f"{len(missing):,} of {len(found):,} shards have not been through the stage caption ({missing[0]}, ...): run --stage caption, every task of it, first")
    return found
