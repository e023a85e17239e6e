"""One worker of an array: its share of the items, one command an item. Started by launchers.array's jobs, one worker a job.

Item i is worker (i mod workers)'s. What has become of it stands in RUN/items/000012.json, beside the command's output in 000012.log. An item
that fails is tried again, a bounded number of times, and given up; the others go on. A worker that is stopped or killed goes on at the
item it was at: a try that was cut short by SIGTERM, SIGUSR2 or SIGINT does not count, one that took the worker with it does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from launchers.record import LAUNCH, read_job, write

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Stopped(Exception):
    def __init__(self, number: int):
        self.number = number


def work(run_dir: Path, worker: int) -> int:
    """Returns 0 when every item of this worker is done or given up, or 128 + the signal that stopped it."""
    job = read_job(run_dir / LAUNCH)["items"]
    (run_dir / "items").mkdir(exist_ok=True)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        for index in range(worker, len(job["items"]), job["workers"]):
            _do(run_dir, job, index)
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.number).name}", flush=True)
        return 128 + stopped.number
    found = summary(run_dir / LAUNCH)
    if not found["left"]:
        write(run_dir / "summary.json", json.dumps(found, indent=1))
    print(f"worker {worker}: through; of all, {found['done']} done, {len(found['failed'])} failed, {found['left']} left", flush=True)
    return 0


def _stop(number: int, frame) -> None:
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def _do(run_dir: Path, job: dict, index: int) -> None:
    record, log = run_dir / "items" / f"{index:06d}.json", run_dir / "items" / f"{index:06d}.log"
    item = job["items"][index]
    before = json.loads(record.read_text()) if record.exists() else {"outcome": None, "tries": 0}
    command = [part.replace("{item}", item).replace("{index}", str(index)) for part in job["command"]]
    tries, outcome, reason = before["tries"], before["outcome"], before.get("reason", "it took its worker with it")
    while outcome not in ("done", "failed"):
        if tries >= job["tries"]:
            outcome = "failed"
            break
        tries += 1
        write(record, json.dumps({"item": item, "outcome": "running", "tries": tries}))
        print(f"item {index} ({item}), try {tries} of {job['tries']}: {shlex.join(command)}", flush=True)
        began = time.time()
        try:
            status = _run(command, log)
        except Stopped:
            write(record, json.dumps({"item": item, "outcome": "stopped", "tries": tries - 1}))
            raise
        outcome = "done" if status == 0 else "again"
        reason = None if status == 0 else f"exit status {status}" if status > 0 else f"by signal {-status}"
    if outcome != before["outcome"]:
        seconds = round(time.time() - began, 3) if tries > before["tries"] else None
        write(record, json.dumps({"item": item, "outcome": outcome, "tries": tries, "reason": reason, "seconds": seconds}))


def _run(command: list[str], log: Path) -> int:
    """Its exit status, negative for a signal; a command that cannot be started has 127, as in a shell."""
    with open(log, "a") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        except OSError as error:
            print(error, file=output)
            return 127
        try:
            return process.wait()
        except Stopped:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


def summary(launch: Path) -> dict:
    """{"total", "done", "left", "failed": [{"index", "item", "tries", "reason", "log"}]} of an array's run."""
    run_dir, items = launch.parent, read_job(launch)["items"]["items"]
    done, failed = 0, []
    for index, item in enumerate(items):
        record = run_dir / "items" / f"{index:06d}.json"
        known = json.loads(record.read_text()) if record.exists() else {"outcome": None}
        done += known["outcome"] == "done"
        if known["outcome"] == "failed":
            failed.append({"index": index, "item": item, "tries": known["tries"], "reason": known["reason"], "log": str(record.with_suffix(".log"))})
    return {"total": len(items), "done": done, "left": len(items) - done - len(failed), "failed": failed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m launchers.items", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--worker", type=int, required=True, metavar="K")
    given = parser.parse_args(argv)
    return work(given.run, given.worker)


if __name__ == "__main__":
    sys.exit(main())
