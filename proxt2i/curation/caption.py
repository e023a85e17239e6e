"""The stage that captions what is left, and says of every sample where it goes."""

from __future__ import annotations

import json
import time

import numpy as np
from proxt2i.curation import samples, state
from proxt2i.curation.config import Curation
from proxt2i.curation.dedup import deduplicated, survivors
from proxt2i.curation.run import Run, each_tried, finish, num_workers
from proxt2i.curation.samples import Shown
from proxt2i.curation.scan import raw_of, scanned
from proxt2i.curation.sources import IMAGE
from proxt2i.curation.workers import Workers

SPLITS = ("train", "held_out", "hands")


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
    with Workers(num_workers(run.config) if captioner else 0) as workers, run.bar([run.units[number] for number, _ in todo] if captioner else [], "captioning") as bar:
        for (number, inputs, last), shown in workers.ordered(jobs(), samples.show_chunk, ahead=1):
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
    with samples.Files([str(path) for path in run.units[number].files]) as files:
        for i, record in enumerate(records):
            line = {"split": split_of(run.config, record)}
            if answers:
                line |= {"caption": answers[i].caption or None, "trouble": answers[i].trouble}
                if answers[i].trouble:
                    troubles[answers[i].trouble] = troubles.get(answers[i].trouble, 0) + 1
                if not answers[i].caption and (run.config.caption.on_failure == "drop" or not samples.read_text(files, raw_of(record), False)[1]):
                    line["split"] = None
            failed += line["split"] is None
            if line["split"]:
                splits[line["split"]] += 1
            lines.append(json.dumps(line, ensure_ascii=False))
    finish(run, "caption", run.units[number].name, "".join(line + "\n" for line in lines).encode(), inputs, splits=splits,
           dropped={"no caption could be made": failed} if failed else {}, troubles=troubles, captions=sum(bool(one.caption) for one in answers))


def captioned(run: Run, markers: list[dict], codes: list[str]) -> list[dict]:
    found = [state.read_marker(run.marker_path("caption", unit.name), caption_inputs(markers, codes, number)) for number, unit in enumerate(run.units)]
    missing = [unit.name for unit, marker in zip(run.units, found) if marker is None]
    if missing:
        raise ValueError(f"{len(missing):,} of {len(found):,} shards have not been through the stage caption ({missing[0]}, ...): run --stage caption, every task of it, first")
    return found
