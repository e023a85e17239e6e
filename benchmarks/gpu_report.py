"""Results of `make gpu-check`: a stage's own file, which loses nothing when its process dies, and the summary."""

import json
import os
import sys
import time
import traceback
from pathlib import Path

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"
RUN_AGAIN = 75  # exit status of a stage whose device is lost to this process: a new one goes on with the next check


class Skip(Exception):
    """Raised by a check that cannot be made here; the message says why."""


def write_json(path: Path, data: dict) -> None:
    """All of it or nothing: a kill at any moment leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    with open(staged, "w") as file:
        file.write(json.dumps(data, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def entry(name: str, status: str, reason: str = "", seconds: float = 0.0, figures: dict | None = None) -> dict:
    return {"name": name, "status": status, "reason": reason, "seconds": round(seconds, 2), "figures": figures or {}}


def status_of(checks: list[dict]) -> str:
    """Of a stage: FAIL if any of its checks failed, SKIPPED if none was made."""
    found = {check["status"] for check in checks}
    return FAIL if FAIL in found else PASS if PASS in found else SKIPPED


class Report:
    """A stage's side: `run` makes one check and writes its result at once. Checks that an earlier process has made are not repeated."""

    def __init__(self, path: Path):
        self.path = path
        self.data = {"checks": [], "current": None, **read_json(path)}

    def run(self, name: str, function, *arguments) -> dict | None:
        """function(*arguments) -> its figures, or raises Skip or anything else. Returns the figures of a check that passed, else None."""
        for check in self.data["checks"]:
            if check["name"] == name:
                return check["figures"] if check["status"] == PASS else None
        self.data["current"] = {"name": name, "since": time.time()}
        write_json(self.path, self.data)
        start, figures = time.perf_counter(), None
        try:
            figures = function(*arguments) or {}
            status, reason = PASS, ""
            if "failure" in figures:  # a check that has figures to show although it failed
                status, reason = FAIL, figures.pop("failure")
        except Skip as why:
            status, reason = SKIPPED, str(why)
        except Exception as error:
            traceback.print_exc()
            status, reason = FAIL, f"{type(error).__name__}: {str(error).strip()[:600]}"
        self.data["checks"].append(entry(name, status, reason, time.perf_counter() - start, figures))
        self.data["current"] = None
        write_json(self.path, self.data)
        if status == FAIL and device_is_lost():
            raise SystemExit(RUN_AGAIN)
        return figures if status == PASS else None


def device_is_lost() -> bool:
    """Whether an error (an access outside memory, say) has ended this process's CUDA context, in which nothing would work any more."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
        return False
    except RuntimeError as error:
        print(f"the CUDA context is lost: {error}", flush=True)
        return True


def summary(result: dict) -> str:
    """One line a check, with what it found."""
    dry = ": DRY RUN on the CPU, no figure means anything" if result["dry_run"] else ""
    lines = [f"gpu-check on {result['device']}, {result['date']}{dry}"]
    for stage, record in result["stages"].items():
        if not record["checks"]:
            lines.append(f"{record['status']:8s} {stage}" + (f": {record['reason']}" if record["reason"] else ""))
        for check in record["checks"]:
            said = [check["reason"].split("\n")[0]] if check["reason"] else []
            said += [f"{key} {_short(value)}" for key, value in check["figures"].items() if not isinstance(value, (dict, list))]
            lines.append(f"{check['status']:8s} {stage} / {check['name']}" + (": " + ", ".join(said) if said else ""))
    counts = [sum(check["status"] == status for record in result["stages"].values() for check in record["checks"] or [record])
              for status in (PASS, FAIL, SKIPPED)]
    lines.append(f"{counts[0]} passed, {counts[1]} failed, {counts[2]} skipped" + ("" if result["finished"] else "; NOT FINISHED"))
    return "\n".join(lines)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
