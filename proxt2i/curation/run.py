"""One invocation of a curation, and what its stages share: markers of what is finished, and shards that are tried again."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from proxt2i.curation import state
from proxt2i.curation.config import Curation
from proxt2i.curation.sources import Unit, find_units
from proxt2i.progress import Progress

TRIES = 3  # of a shard that cannot be read or written
PAUSE_S = 2.0  # before the second of them; longer before the next


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
                from proxt2i.curation.captioner import Captioner

                self.models[name] = Captioner(self.config.caption, self.device)
            else:
                from proxt2i.curation import models

                self.models[name] = {"scores": models.Scores, "hands": models.Hands}[name](self.config, self.device)
        return self.models[name]

    def bar(self, units: list[Unit], what: str) -> Progress:
        """Progress in bytes, whose total is known beforehand; images/s beside."""
        total = sum(unit.size for unit in units)
        return Progress(total=total, desc=what, unit="B", unit_scale=True, disable=self.quiet or not total,
                        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]", mininterval=0.5)


def num_workers(config: Curation) -> int:
    return config.run.workers or len(os.sched_getaffinity(0))


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
