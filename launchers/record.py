"""What a run remembers of its jobs, in RUN/launch: reading and writing it. Standard library alone: the batch step starts with it.

    job.json             what is run and how: command, ranks, limits, site, version of the code
    code.diff            what the working tree had beyond the commit
    history.jsonl        one row an event: submitted, start, signal, end (history-003.jsonl: of array task 3)
    job-RESTART/         logs of one start of one job: rank-0.log ..., srun.log
    submitit/            submission script, and the batch step's own output
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the code, where commands run
LAUNCH = "launch"


def write(path: Path, text: str) -> None:
    """At once: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_job(launch: Path) -> dict:
    """RUN/launch/job.json. ValueError where there is none."""
    try:
        return json.loads((launch / "job.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{launch / 'job.json'} cannot be read ({error}): give the folder of a run that launchers.* has started") from None


def num_workers(job: dict) -> int:
    """Jobs in the array; 0: one job, and no array."""
    return job["items"]["workers"] if "items" in job else job.get("workers", 0)


def in_container(job: dict) -> list[str]:
    """The python of every rank, behind the site's container if it has one: what a rank's command begins with."""
    return [*shlex.split(job["site"].get("container") or ""), job["site"].get("container_python") or job["command"][0]]


class History:
    """Rows of one worker, oldest first; several processes may append. `worker`: index in an array of jobs."""

    def __init__(self, launch: Path, worker: int | None = None):
        self.path = launch / ("history.jsonl" if worker is None else f"history-{worker:03d}.jsonl")

    def add(self, event: str, **values) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict]:
        return list(_rows(self.path))

    def attempts(self, job: str | None = None) -> list[dict]:
        """Every start (of job number `job` alone), each with its end's values beside it and the "signals" that came to its batch step."""
        attempts: list[dict] = []
        for row in self.rows():
            if row["event"] == "start":
                attempts.append({**row, "start": row["time"], "from": row["images"], "signals": []})
            elif attempts and row["event"] == "signal":
                attempts[-1]["signals"].append(row["signal"])
            elif attempts and row["event"] == "end":
                attempts[-1].update(row)
        return [attempt for attempt in attempts if job in (None, attempt["job"])]


def _rows(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:  # cut short by a full disk or a dead node
            continue


def last_row(stats: Path) -> dict:
    """The newest whole row of a run's stats.jsonl, which may be long; {} if there is none."""
    try:
        with open(stats, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
            row["images"]
            return row
        except (ValueError, KeyError, TypeError):
            continue
    return {}


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished ones, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit())


def images_reached(run_dir: Path) -> int:
    """The furthest that a run is known to have got."""
    saved = [int(path.name[5:]) for path in checkpoints(run_dir)[-1:]]
    return int(max([last_row(run_dir / "stats.jsonl").get("images", 0), *saved]))


def code_version() -> tuple[dict, str]:
    """({"commit", "dirty"}, the difference of the working tree to that commit); the commit is None where there is no git."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        difference = git("diff", "HEAD")
        untracked = git("ls-files", "--others", "--exclude-standard")
        if untracked:
            difference += "".join(f"untracked: {name}\n" for name in untracked.splitlines())
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(difference)}, difference
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}, ""
