"""Reward workers beside a training job: each a component of its own of one heterogeneous Slurm job, and one srun step in it.

Component 0 has the ranks. Component k runs `python -m proxt2i.rewards.serve`, and its address is $REWARD_WORKER_k in every rank, the file with
its token $REWARD_TOKEN; the reward's url is "http://$REWARD_WORKER_k/NAME". The workers outlive the signals that tell the ranks to save.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from launchers import slurm
from launchers.record import in_container

TOKEN = "reward-token"  # in RUN/launch


def sbatch_lines(job: dict, sbatch: dict) -> list[str]:
    """For the script of a job whose other options are `sbatch` (submitit's): what its further components ask for."""
    workers = job["reward_workers"]
    same = {key: sbatch.get(key) for key in ("account", "qos", "time")}
    options = {"partition": workers["partition"], "constraint": workers["constraint"], **same, "nodes": 1, "ntasks-per-node": 1,
               "gpus-per-node": workers["gpus"] or None, "cpus-per-task": workers["cpus"]}
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    return ["#SBATCH hetjob", *lines] * len(workers["arguments"])


class RewardWorkers:
    """The steps of one start of a job."""

    def __init__(self, job: dict, logs: Path, environment: dict[str, str]):
        self.logs, self.steps, self.environment = logs, [], {"REWARD_TOKEN": str(logs.parent / TOKEN)}
        for number, arguments in enumerate(job["reward_workers"]["arguments"], 1):
            node = slurm.node_names(os.environ[f"SLURM_JOB_NODELIST_HET_GROUP_{number}"])[0]
            serve = ["-m", "proxt2i.rewards.serve", *shlex.split(arguments), "--host", slurm.node_address(node), "--port", "0",
                     "--token-file", self.environment["REWARD_TOKEN"]]
            command = ["srun", f"--het-group={number}", "--nodes=1", "--ntasks=1", "--unbuffered", f"--output={self._log(number)}",
                       *job["site"].get("srun", []), *in_container(job), "-m", "launchers.reward_workers", *serve]
            print("+", shlex.join(command), flush=True)
            with open(logs / f"reward-worker-{number}-srun.log", "a") as errors:
                self.steps.append(subprocess.Popen(command, cwd=job["cwd"], env=environment, stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True))

    def _log(self, number: int) -> Path:
        return self.logs / f"reward-worker-{number}.log"

    def wait_until_they_serve(self) -> str | None:
        """None, with their addresses in `environment`; or why one of them does not serve."""
        for number, step in enumerate(self.steps, 1):
            while not (found := re.search(r"^serving http://([^/]+)/", self._read(number), re.MULTILINE)):
                if step.poll() is not None:
                    return self.ended()
                time.sleep(0.2)
            self.environment[f"REWARD_WORKER_{number}"] = found[1]
        return None

    def ended(self) -> str | None:
        """Which one has ended, and its last words; None while all live."""
        for number, step in enumerate(self.steps, 1):
            if step.poll() is not None:
                said = [line for line in self._read(number).splitlines() if "rror" in line]
                return f"reward worker {number} ended, exit status {step.returncode}" + (f": {said[-1]}" if said else "") + f" ({self._log(number)})"
        return None

    def statuses(self) -> list[int | None]:
        return [step.returncode for step in self.steps]

    def _read(self, number: int) -> str:
        return self._log(number).read_text() if self._log(number).exists() else ""

    def end(self) -> None:
        """Of srun. Slurm ends the workers themselves with the job's batch step, which is about to end; they have nothing to save."""
        for step in self.steps:
            step.kill()
            step.wait()


def main() -> None:
    """Become the worker. It ignores what tells the ranks to save: they may still wait for its scores. Ignored signals stay so through exec."""
    for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.execv(sys.executable, [sys.executable, "-u", *sys.argv[1:]])


if __name__ == "__main__":
    main()
