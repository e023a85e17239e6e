"""Builds the CUDA kernels for this machine's GPU, tests them on it and times them:  make gpu-check [ARGS='...']

    python benchmarks/gpu_check.py [--stages build checks ...] [--budget 1400] [--out DIR] [--write-table]
    python benchmarks/gpu_check.py --dry-run        goes through every stage on the CPU with tiny sizes, to test this script

Needs a CUDA build of torch, nvcc, a C++ compiler, cmake, ninja, pybind11 and setuptools; installs and fetches nothing. What is missing is
said at once, each with its fix, before any work. Every stage runs in a process of its own with a time limit, and one that fails, hangs or
crashes does not stop the next ones. benchmarks/results/gpu_check-DEVICE-DATE.json is written after every check; a dry run writes to
benchmarks/out. Exit status: 0 if nothing failed, 1 if something did or the machine lacks something, 130 when interrupted.
"""

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_machine
from gpu_report import FAIL, PASS, RUN_AGAIN, SKIPPED, entry, read_json, status_of, summary, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, WORK = ROOT / "benchmarks" / "results", ROOT / "build" / "gpu-check"
STAGES = {  # name: (seconds for the stage, seconds for one check of it); what matters most comes first
    "build": (600, 600), "checks": (240, 60), "prox_step": (60, 30), "attention": (180, 60), "ops": (180, 90),
    "large_sample": (150, 120), "large_model": (260, 250), "grpo": (110, 105), "pytest": (90, 90), "sanitizer": (240, 80), "trainer": (480, 420),
}


class Interrupted(BaseException):
    """Ctrl-C, or the end that a job scheduler announces by SIGTERM."""


class Run:
    """The result so far, on disk after every change."""

    def __init__(self, path: Path, facts: dict, device: str):
        self.path, self.device = path, device
        self.result = {"device": facts.get("device") or "cpu", "date": datetime.date.today().isoformat(), "dry_run": device == "cpu",
                       "finished": False, "seconds": 0.0, "stages": {},
                       "machine": facts | {"tools": {name: path is not None for name, path in facts["tools"].items()}}}
        self.started = time.monotonic()

    def record(self, stage: str, checks: list[dict], seconds: float = 0.0, status: str | None = None, reason: str = "") -> None:
        checks = [check | {"reason": without_paths(check["reason"])} for check in checks]
        self.result["stages"][stage] = {"status": status or status_of(checks), "reason": reason, "seconds": round(seconds, 1),
                                        "checks": checks}
        self.result["seconds"] = round(time.monotonic() - self.started, 1)
        write_json(self.path, self.result)

    def failed(self) -> bool:
        return any(record["status"] == FAIL for record in self.result["stages"].values())


def without_paths(text: str) -> str:
    """Results are published: where the repository and Python lie on this machine is nobody's business."""
    return text.replace(str(ROOT), ".").replace(sys.prefix, "PYTHON")


def run_stage(run: Run, name: str, command: list[str], env: dict[str, str], limit: float, check_limit: float) -> None:
    """Starts the stage's process, again as long as checks kill it, until all are made or its time is up; recorded check by check."""
    report, log = WORK / f"{name}.json", WORK / f"{name}.log"
    WORK.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    start, shown = time.monotonic(), 0
    while True:
        with open(log, "ab") as output:
            process = subprocess.Popen(command + [str(report)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        overdue, interrupt, seen = "", None, None
        try:
            while process.poll() is None and not overdue:
                time.sleep(0.05)
                data, now = read_json(report), time.monotonic()
                current = data.get("current")
                shown = show(name, data, shown)
                if len(data.get("checks", [])) != seen:
                    seen = len(data.get("checks", []))
                    run.record(name, data.get("checks", []), now - start)
                if now - start > limit:
                    overdue = f"the stage's time limit of {limit:.0f} s"
                elif current and time.time() - current["since"] > check_limit:
                    overdue = f"the time limit of {check_limit:.0f} s"
        except Interrupted as stop:
            interrupt, overdue = stop, "interrupted"
        finally:
            end_group(process)
        data = {"checks": [], "current": None, **read_json(report)}
        current, status = data["current"], process.returncode
        why = overdue or f"its process ended with {status}" + (f" (signal {signal.Signals(-status).name})" if status < 0 else "")
        if current:
            data["checks"].append(entry(current["name"], FAIL, f"{why}; last lines: {last_lines(log)}", time.time() - current["since"]))
            data["current"] = None
            write_json(report, data)
        elif overdue or status not in (0, RUN_AGAIN):
            data["checks"].append(entry("process", FAIL, f"{why}; last lines: {last_lines(log)}"))
        shown = show(name, data, shown)
        run.record(name, data["checks"], time.monotonic() - start)
        if interrupt:
            raise interrupt
        again = (current and not overdue.startswith("the stage")) or status == RUN_AGAIN
        if not again or time.monotonic() - start > limit:
            return


def end_group(process: subprocess.Popen) -> None:
    """Kills what is left of the stage, its own children too, and waits; a process stuck in the driver is left after a while."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.returncode = -signal.SIGKILL


def last_lines(log: Path, count: int = 4) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    return " | ".join(lines[-count:])[-600:]


def show(stage: str, data: dict, shown: int) -> int:
    for check in data.get("checks", [])[shown:]:
        reason = f": {without_paths(check['reason'])}" if check["reason"] else ""
        print(f"{check['status']:8s} {stage} / {check['name']} ({check['seconds']:.1f} s){reason}", flush=True)
    return max(shown, len(data.get("checks", [])))


def result_path(folder: Path, device_name: str) -> Path:
    """gpu_check-DEVICE-DATE.json, numbered where there is one already: no result replaces another."""
    stem = f"gpu_check-{re.sub(r'[^A-Za-z0-9.]+', '_', device_name).strip('_')}-{datetime.date.today().isoformat()}"
    numbers = ["", *(f"-{i}" for i in range(2, 1000))]
    return next(path for path in (folder / f"{stem}{number}.json" for number in numbers) if not path.exists())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
                        help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--dry-run", action="store_true", help="the same as --device cpu")
    parser.add_argument("--budget", type=float, default=1400,
                        help="seconds for everything (default: 1400); stages without time left are skipped")
    parser.add_argument("--out", type=Path, help="folder of the result (default: benchmarks/results, of a dry run benchmarks/out)")
    parser.add_argument("--write-table", action="store_true",
                        help="let `attention` use what was measured: merge it into attention_table.json")
    given = parser.parse_args(arguments)
    if given.dry_run:
        given.device = "cpu"
    given.out = given.out or (ROOT / "benchmarks" / "out" if given.device == "cpu" else RESULTS)
    if given.device == "cpu" and RESULTS in [given.out.resolve(), *given.out.resolve().parents]:
        parser.error("a dry run is no result: give --out another folder")
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)

    def interrupt(number, frame):
        raise Interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    facts = gpu_machine.gather()
    problems = gpu_machine.problems(facts, given.device)
    if problems:
        print("\n".join(["gpu-check cannot run on this machine:", *(f"  - {problem}" for problem in problems)]), file=sys.stderr)
        return 1
    run = Run(result_path(given.out, "dry-run" if given.device == "cpu" else facts["device"]), facts, given.device)
    mismatch = None if given.device == "cpu" else gpu_machine.mismatch(facts)
    found = {key: str(facts.get(key)) for key in ("torch", "torch_cuda", "nvcc", "capability")}
    run.record("machine", [entry("tools and device", PASS, figures=found), *([entry("versions", FAIL, mismatch)] if mismatch else [])])
    try:
        for stage in STAGES:
            skip = why_skip(run, given, stage)
            if skip:
                run.record(stage, [], status=SKIPPED, reason=skip)
                continue
            limit, check_limit = STAGES[stage]
            left = given.budget - (time.monotonic() - run.started)
            print(f"== {stage}", flush=True)
            run_stage(run, stage, stage_command(given, facts, stage), gpu_machine.environment(facts), min(limit, left), check_limit)
        run.result["finished"] = True
    except Interrupted:
        print("interrupted", flush=True)
    run.result["seconds"] = round(time.monotonic() - run.started, 1)
    write_json(run.path, run.result)
    print("\n" + summary(run.result) + f"\nwritten: {run.path}")
    return 130 if not run.result["finished"] else int(run.failed())


def why_skip(run: Run, given: argparse.Namespace, stage: str) -> str:
    if stage not in given.stages:
        return "not asked for"
    if given.budget - (time.monotonic() - run.started) < 5:
        return f"no time left of --budget {given.budget:.0f}"
    if run.result["stages"].get("build", {}).get("status") == FAIL and stage != "trainer":
        return "there is no extension: the build failed"
    return ""


def stage_command(given: argparse.Namespace, facts: dict, stage: str) -> list[str]:
    """Of a stage's process, up to the path of its report."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_stages.py"), "--device", given.device]
    if given.device == "cuda":
        command.append(f"--architecture={gpu_machine.architecture(facts['capability'])}")
    return command + (["--write-table"] if given.write_table else []) + [stage]


if __name__ == "__main__":
    sys.exit(main())
