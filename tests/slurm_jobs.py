"""Jobs of the test cluster: queued with the launchers, as a user does, and then disturbed."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from runs import ROOT

import launchers.slurm
import launchers.status
import launchers.train

MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with cluster_up(tmp_path_factory.mktemp("slurm")) as folder:
        yield folder


@contextlib.contextmanager
def cluster_up(folder: Path, *options: str):
    """A cluster with the options of tests/slurm/cluster.sh, which the launchers and Slurm's commands talk to meanwhile."""
    script, before = ROOT / "tests" / "slurm" / "cluster.sh", os.environ.get("SLURM_CONF")
    up = subprocess.run([script, "up", folder, *options], text=True, capture_output=True, timeout=120)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield folder
    finally:
        subprocess.run([script, "down", folder], check=True, timeout=60)
        del os.environ["SLURM_CONF"]
        if before:
            os.environ["SLURM_CONF"] = before


def launched(front_end, *arguments) -> tuple[int, str, str]:
    """A front end's main(ARGUMENTS), in this process: exit status, what it printed, what it complained of."""
    said, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
        status = front_end.main(list(map(str, arguments)))
    return status, said.getvalue(), complaints.getvalue()


def slurm(*command) -> str:
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Job:
    """A training run, queued; `events`: what happens to it once its start number 0, 1, ... trains: functions of the job."""

    def __init__(self, run_dir: Path, launcher: list, arguments: list, events=(), front_end=launchers.train):
        self.run_dir, self.events, self.happened, self.script = run_dir, list(events), 0, f"{front_end.__name__.rpartition('.')[2]}.py"
        status, said, complaints = launched(front_end, "--no-check", *launcher, "--", *arguments)
        assert status == 0, complaints
        self.number = said.split("queued as job ")[1].split()[0]

    def poke(self) -> bool:
        """Let the next event happen if it is time; whether the job is over."""
        if self.happened < len(self.events) and self.trains(self.happened):
            self.happened += 1
            self.events[self.happened - 1](self)
        return bool(self.rows()) and self.rows()[-1]["event"] in ("end", "given up") and self.rows()[-1].get("outcome") not in ("failed", "stopped")

    def rows(self) -> list[dict]:
        path = self.run_dir / "launch" / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, start: int, rank=0) -> Path:
        return self.run_dir / "launch" / f"{self.number}-{start}" / f"rank-{rank}.log"

    def trains(self, start: int) -> bool:
        return self.log(start).exists() and "min left" in self.log(start).read_text()

    def wait_for(self, happened, timeout=60) -> None:
        end = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < end, self.everything()
            time.sleep(0.1)

    def pid(self, rank: int) -> int:
        """Of the rank's process, on this machine as all of them are."""
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                is_rank = environment.get("SLURM_JOB_ID") == self.number and environment.get("SLURM_PROCID") == str(rank) and "SLURM_STEP_ID" in environment
                if is_rank and any(part.endswith(self.script) for part in process.cmdline()):
                    return process.pid
            except psutil.Error:
                continue
        raise AssertionError(f"no rank {rank}: {self.everything()}")

    def status(self) -> str:
        return launchers.status.show(launchers.status.status(self.run_dir))

    def everything(self) -> str:
        logs = sorted((self.run_dir / "launch").glob(f"{self.number}-*/*.log")) + sorted((self.run_dir / "launch" / "submitit").glob("*.out"))
        return self.status() + slurm("scontrol", "show", "job", self.number) + "".join(f"\n== {path}\n{path.read_text()[-3000:]}" for path in logs)


def run_all(jobs: list[Job], timeout=240) -> None:
    """Until all are over. Each is watched by a thread of its own: while one job's event took its time, another's training would end."""
    end = time.monotonic() + timeout

    def watch(job: Job) -> None:
        while not job.poke():
            assert time.monotonic() < end, job.everything()
            time.sleep(0.1)

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(watch, jobs))


def signals(name: str):
    return lambda job: slurm("scancel", f"--signal={name}", job.number)


def requeue(job: Job) -> None:
    slurm("scontrol", "requeue", job.number)


def run_out_of_time(job: Job) -> None:
    """Its limit becomes so near that Slurm's warning is due. Rank 0 stands still until it has come: Slurm looks twice a minute."""
    rank = psutil.Process(job.pid(0))
    rank.suspend()
    ran, _ = launchers.slurm.seconds_run(launchers.slurm.job_facts(job.number))
    slurm("scontrol", "update", f"JobId={job.number}", f"TimeLimit={ran // 60 + 2}")
    threading.Thread(target=_wake, args=(job, rank), daemon=True).start()


def _wake(job: Job, rank: psutil.Process) -> None:
    end = time.monotonic() + 120
    with contextlib.suppress(psutil.Error, OSError):
        while rank.status() == psutil.STATUS_STOPPED and not _pending(rank.pid, signal.SIGUSR2) and time.monotonic() < end:
            time.sleep(0.1)  # Slurm may wake it itself
        rank.resume()
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")


def _pending(process: int, number: int) -> bool:
    waiting = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return bool(int(waiting[1], 16) >> (number - 1) & 1)
