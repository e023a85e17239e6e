"""What a run on the cluster is doing, and what has happened to it: state, progress, jobs so far, and why the last one failed.

    python -m launchers.status RUN          RUN: the run folder that launchers.train (grpo, latents, ...) works on
    python -m launchers.status RUN --json   the same for programs

Reads RUN/launch and the run's own files; asks Slurm for the job's state, where there is a Slurm. Works without an accounting database.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from itertools import takewhile
from pathlib import Path

from launchers import progress, slurm
from launchers.items import summary
from launchers.job import CANCELLED, tail
from launchers.record import LAUNCH, History, checkpoints, last_row, num_workers, read_job

TAIL_LINES = 12
MANY = 5  # starts


def status(run_dir: Path) -> dict:
    """Everything that is known, as plain values. ValueError where `run_dir` is no run of the launchers."""
    launch = run_dir / LAUNCH
    job = read_job(launch)
    if "stages" in job:
        return _stages(run_dir, job)
    histories = [History(launch, worker) for worker in range(num_workers(job))] or [History(launch)]
    rows = sorted((row for history in histories for row in history.rows()), key=lambda row: row["time"])
    attempts = sorted((attempt for history in histories for attempt in history.attempts()), key=lambda attempt: attempt["start"])
    numbers = [[row["job"] for row in history.rows() if row["event"] == "submitted"][-1:] for history in histories]
    numbers = [number for one in numbers for number in one]
    states = {number: slurm.job_state(number) for number in numbers}
    state = next((state for state in states.values() if not slurm.is_over(state)), next(iter(states.values()), "NOT QUEUED"))
    given_up = [row["reason"] for row in rows if row["event"] == "given up"]
    found = {
        "run": str(run_dir), "kind": job["kind"], "code": job["code"], "ranks": job["nodes"] * job["tasks_per_node"], "nodes": job["nodes"],
        "job": numbers[-1].split("_")[0] if numbers else None, "state": state, "attempts": attempts,
        "why": slurm.job_facts(numbers[-1]).get("Reason", "None") if numbers else "None",
        "working": [number for number, state in states.items() if state != "UNKNOWN" and not slurm.is_over(state)],
        "given_up": given_up[-1] if given_up and not _running(attempts) else None, "notes": [row["text"] for row in rows if row["event"] == "note"],
    }  # fmt: skip
    if job["resumes"]:
        found["progress"] = _progress(run_dir)
        if (idle := _idle_starts(attempts)) >= MANY:
            found["notes"].append(f"the last {idle} starts were stopped before they had got any further: does --time, less --signal-before, leave enough of a start?")
    if "items" in job:
        found["items"] = summary(launch)
    if "output" in job and job["kind"] == "latents":
        found["data"] = progress.latents(Path(job["output"]))
    found["last"] = _last_outcome(histories[0])
    found["workers"] = [_last_outcome(history) for history in histories] if num_workers(job) and "items" not in job else []
    found["doing"] = _doing(found)
    if found["last"] is None and found["state"] in ("FAILED", "UNKNOWN"):
        found["output"] = _output(launch, numbers)
    failures = [attempt for attempt in attempts if attempt.get("outcome") in ("failed", "input")]
    if failures and attempts[-1] is failures[-1]:
        found["failure"] = _failure(launch, failures[-1])
    return found


def _stages(run_dir: Path, job: dict) -> dict:
    """Of a curation: each of its stages is a run of its own, in a folder below."""
    stages = {stage: status(run_dir / stage) for stage in job["stages"] if (run_dir / stage / LAUNCH / "job.json").exists()}
    out = Path(job["out"])
    states = [found["doing"] for found in stages.values()]
    failed = [stage for stage, found in stages.items() if found["doing"] in ("failed", "given up", "refused its input")]
    doing = next((f"{stage}: {found['doing']}" for stage, found in stages.items() if found["doing"] != "finished"), "finished")
    return {"run": str(run_dir), "kind": job["kind"], "data": job["data"], "out": job["out"], "stages": stages, "states": states,
            "doing": f"failed in {failed[0]}" if failed else doing, "working": [number for found in stages.values() for number in found["working"]],
            "progress": progress.curation(out, job["shards"], job["shard_size"]), "failed_shards": progress.failed_shards(out),
            "result": _result(out / "manifest.json") if doing == "finished" else None}  # fmt: skip


def _result(manifest: Path) -> dict | None:
    try:
        found = json.loads(manifest.read_text())
        return {key: found[key] for key in ("samples_in", "samples_out", "dropped", "damaged_shards")}
    except (OSError, ValueError, KeyError):
        return None


def _last_outcome(history: History) -> str | None:
    """Of a job, since it was last submitted: finished, failed, ..., "running", or None: not started."""
    outcome = None
    for row in history.rows():
        outcome = {"submitted": None, "start": "running", "end": row.get("outcome"), "given up": "given up"}.get(row["event"], outcome)
    return outcome


def _idle_starts(attempts: list[dict]) -> int:
    """How many of the last starts were stopped (by a time limit, a preemption) without a new image."""
    over = [attempt for attempt in attempts if "outcome" in attempt]
    return len(list(takewhile(lambda attempt: attempt["outcome"] == "stopped" and attempt["images"] == attempt["from"], reversed(over))))


def _running(attempts: list[dict]) -> bool:
    return bool(attempts) and "outcome" not in attempts[-1]


def _doing(found: dict) -> str:
    """The state in a word or two: Slurm's where the job lives, the record's where it is over."""
    last = found["last"]
    if "items" in found:
        return "finished" if not found["items"]["left"] else _slurms_word(found)
    if found["workers"]:
        return _array_doing(found)
    if last == "finished":
        return "finished"
    if found["given_up"]:
        return "cancelled" if found["given_up"] == CANCELLED else "given up"
    if last in ("input", "by hand"):
        return "refused its input" if last == "input" else "stopped by hand"
    return _slurms_word(found)


def _slurms_word(found: dict) -> str:
    if found["state"] == "PENDING":
        return "waiting in the queue" + (f" ({found['why']})" if found["why"] != "None" else "")
    if found["state"] == "UNKNOWN":
        return "over" if found["last"] not in (None, "running") else "gone: Slurm knows the job no more, and it left no word of its end"
    if slurm.is_over(found["state"]):
        return f"over: Slurm says {found['state']}"
    return found["state"].lower()


def _output(launch: Path, numbers: list[str]) -> dict | None:
    """The end of what the batch step has written, for a job that ended before it could note anything."""
    paths = [path for number in numbers[-1:] for path in (launch / "submitit").glob(f"{number}_*_log.out")]
    return {"log": str(paths[0]), "tail": tail(paths[0]).splitlines()[-TAIL_LINES:]} if paths else None


def _array_doing(found: dict) -> str:
    workers = found["workers"]
    if all(outcome == "finished" for outcome in workers):
        return "finished"
    if not found["working"] and any(outcome in ("given up", "input", "failed") for outcome in workers):
        return "failed"
    return _slurms_word(found)


def _progress(run_dir: Path) -> dict:
    import yaml

    row, saved = last_row(run_dir / "stats.jsonl"), checkpoints(run_dir)
    config = run_dir / "config.yaml"
    total = yaml.safe_load(config.read_text())["train"]["images"] if config.exists() else None
    speed = row.get("images_per_s")
    images = row.get("images", 0)
    return {"images": images, "total": total, "images_per_s": speed, "seconds_left": (total - images) / speed if total and speed else None,
            "checkpoint": saved[-1].name if saved else None, "saved_ago": time.time() - saved[-1].stat().st_mtime if saved else None,
            "written_ago": time.time() - (run_dir / "stats.jsonl").stat().st_mtime if row else None}  # fmt: skip


def _failure(launch: Path, attempt: dict) -> dict:
    """Which rank, and the end of its log."""
    logs = launch / attempt["logs"]
    named = re.search(r"\brank (\d+)", attempt["reason"].split("; ", 1)[-1]) or re.search(r"\brank (\d+)", attempt["reason"])
    path = logs / f"rank-{named[1] if named else 0}.log"
    path = path if path.exists() else logs / "srun.log"
    lines = tail(path).splitlines()[-TAIL_LINES:] if path.exists() else []
    return {"reason": attempt["reason"], "log": str(path), "tail": lines}


# ---------------------------------------------------------------------------------------------------------------------
# For people.


def show(found: dict) -> str:
    if "stages" in found:
        return _show_stages(found)
    code = found["code"]
    version = f"code {code['commit'][:10]}{' with changes (launch/code.diff)' if code['dirty'] else ''}" if code["commit"] else "code without git"
    lines = [f"{found['run']}: {found['kind']}, {found['doing']}", f"  job {found['job']}, {found['ranks']} rank(s) on {found['nodes']} node(s), {version}"]
    lines += [f"  note: {note}" for note in found["notes"]]
    if found["given_up"]:
        lines.append(f"  given up: {found['given_up']}")
    if "progress" in found:
        lines += _show_progress(found["progress"])
    if "items" in found:
        lines += _show_items(found["items"])
    if "data" in found:
        lines.append(f"  {_show_data(found['data'])}")
    lines.append("\n  starts" if found["attempts"] else "\n  not started yet")
    for attempt in found["attempts"]:
        end = attempt["time"] if "outcome" in attempt else time.time()
        images = f"{attempt['from']:,} -> {attempt['images']:,} images" if "outcome" in attempt else f"from {attempt['from']:,} images"
        outcome = f"{attempt['outcome']}: {attempt['reason']}" if "outcome" in attempt else "running" if found["working"] else "no word of its end"
        when = time.strftime("%m-%d %H:%M", time.localtime(attempt["start"]))
        lines.append(f"  {attempt['job']}.{attempt['restart']:<3} {when}  {duration(end - attempt['start']):>8}  {attempt['nodes']}  "
                     + (f"{images}  " if "progress" in found else "") + outcome)
    for ended in filter(None, (found.get("failure"), found.get("output"))):
        lines += [f"\n  end of {ended['log']}", *(f"    {line}" for line in ended["tail"])]
    return "\n".join(lines)


def _show_stages(found: dict) -> str:
    lines = [f"{found['run']}: {found['kind']}, {found['doing']}", f"  {found['data']} -> {found['out']}"]
    for stage, one in found["stages"].items():
        lines.append(f"  {stage:<8}job {one['job']}, {one['doing']}: {_show_data(found['progress'][stage])}")
        if one["doing"] in ("failed", "given up", "refused its input"):
            lines += [f"    end of {one['failure']['log']}", *(f"      {line}" for line in one["failure"]["tail"])] if "failure" in one else []
            lines.append(f"    python -m launchers.status {one['run']}")
    lines += [f"  failed: {row['shard']} in {row['stage']}: {row['reason']}" for row in found["failed_shards"]]
    if result := found["result"]:
        lines.append(f"  {result['samples_out']:,} of {result['samples_in']:,} samples kept, {len(result['damaged_shards']):,} damaged shards; {found['out']}/report.html")
        lines += [f"    {count:>12,}  {cause}" for cause, count in result["dropped"].items()]
    return "\n".join(lines)


def _show_data(data: dict) -> str:
    if data["total"] == 1 and "images" not in data:
        return "done" if data["done"] else "not done"
    total = f" of {data['total']:,}" if data["total"] is not None else ""
    speed = f", {data['images_per_s']:,.0f} images/s" if data["images_per_s"] and data["done"] != data["total"] else ""
    left = f", {duration(data['seconds_left'])} left at that" if speed and data["seconds_left"] else ""
    return f"{data['done']:,}{total} shards, {data['images']:,} images{speed}{left}"


def _show_progress(progress: dict) -> list[str]:
    total = f" of {progress['total']:,} ({progress['images'] / progress['total']:.1%})" if progress["total"] else ""
    speed = f", {progress['images_per_s']:,.0f} images/s, {duration(progress['seconds_left'])} left at that" if progress["seconds_left"] else ""
    ago = f", written {duration(progress['written_ago'])} ago" if progress["written_ago"] is not None else ""
    saved = f"{progress['checkpoint']}, {duration(progress['saved_ago'])} old" if progress["checkpoint"] else "none yet"
    return [f"  {progress['images']:,} images{total}{speed}{ago}", f"  last checkpoint: {saved}"]


def _show_items(items: dict) -> list[str]:
    lines = [f"  {items['done']} of {items['total']} items done, {len(items['failed'])} failed, {items['left']} left"]
    return lines + [f"  failed: item {failure['index']} ({failure['item']}) after {failure['tries']} tries: {failure['reason']}; {failure['log']}"
                    for failure in items["failed"]]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launchers.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--json", action="store_true", help="for programs")
    given = parser.parse_args(argv)
    try:
        found = status(given.run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if given.json else show(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
