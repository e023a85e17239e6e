"""What runs in a job's batch step: it starts the ranks with srun, watches them, and decides what their end means.

submitit starts `supervise` in the batch step, so it is no rank: it outlives each of them, whichever dies and how, and it alone requeues.
Whatever comes to a rank (USR2 before the time limit or at preemption, a plain TERM) is the rank's to handle: the trainer saves and ends
with 128 + signal. What comes to the batch step is only noted. A job that Slurm itself requeues or that lost its node simply starts again
here, and finds in the history how far it had come.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launchers import slurm
from launchers.record import ROOT, History, checkpoints, code_version, images_reached, in_container, read_job
from launchers.reward_workers import RewardWorkers

STOPPED = {128 + signal.SIGUSR2, 128 + signal.SIGTERM}  # by Slurm: go on later
BY_HAND = 128 + signal.SIGINT  # scancel --signal=INT: save and stay away
WRONG_INPUT = 2
WORDS = {"Killed": 128 + signal.SIGKILL, "Terminated": 128 + signal.SIGTERM, "User defined signal 2": 128 + signal.SIGUSR2,
         "Segmentation fault": 128 + signal.SIGSEGV, "Aborted": 128 + signal.SIGABRT, "Out Of Memory": 128 + signal.SIGKILL,
         "Interrupt": BY_HAND, "Bus error": 128 + signal.SIGBUS}  # fmt: skip
OTHERS_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # of the shell that queued the job, if it was a rank of something
CANCELLED = "the job was cancelled"
LOST_NODE = "srun: error: Node failure on "
STACKS_S = 15.0  # for stacks to be written


@dataclass(frozen=True)
class End:
    outcome: str  # finished, stopped, failed, input or by hand
    reason: str


def supervise(launch_dir: str, worker: int | None = None) -> None:
    """One start of a job. Returns when the work is finished; SystemExit otherwise, unless the job goes back into the queue."""
    launch, job_id = Path(launch_dir), os.environ["SLURM_JOB_ID"]
    job, history = read_job(launch), History(launch, worker)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda number, frame: history.add("signal", signal=signal.Signals(number).name) if number != signal.SIGCONT else None)
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    run_dir = Path(job["run_dir"])
    _finish_the_last(history, run_dir)
    if refused := refuses_another(history.attempts(job_id), job["max_failures"], job["resumes"]):
        _give_up(history, refused)
    _note_changed_code(job, history)
    logs = launch / f"{job_id}-{restart}"  # of an array's job too: Slurm gives each a number of its own
    logs.mkdir(exist_ok=True)
    history.add("start", job=job_id, restart=restart, nodes=os.environ["SLURM_JOB_NODELIST"], logs=logs.name, images=images_reached(run_dir))
    end = _run_ranks(job, worker, logs, job_id)
    reason, lost = end.reason, lost_nodes(logs)
    if end.outcome == "failed":
        parts = [f"{', '.join(lost)} was lost (Slurm: node failure)" if lost else "", reason, what_ranks_said(logs)]
        reason = "; ".join(filter(None, parts))
    history.add("end", outcome=end.outcome, reason=reason, images=images_reached(run_dir))
    print(f"{end.outcome}: {reason}", flush=True)
    if end.outcome == "finished":
        return
    if end.outcome in ("input", "by hand"):
        sys.exit(1 if end.outcome == "input" else 0)
    if refused := refuses_another(history.attempts(job_id), job["max_failures"], job["resumes"]):
        _give_up(history, refused)
    _requeue(history, job_id, restart, lost_a_node=bool(lost))


def lost_nodes(logs: Path) -> list[str]:
    """Those of which Slurm has told srun that they are gone."""
    return re.findall(rf"{LOST_NODE}(\S+)", (logs / "srun.log").read_text()) if (logs / "srun.log").exists() else []


def refuses_another(attempts: list[dict], max_failures: int, counts_images: bool) -> str | None:
    """Why a job must not be started again; None if it may. Preemptions and time limits do not count.

    A step that always fails would come back for ever, so a run that counts images has to get further: the third failure that did
    not is the last. (One alone may be the bad luck of a start from an old checkpoint.)
    """
    failures = [attempt for attempt in attempts if attempt.get("outcome") == "failed"]
    if not failures or attempts[-1].get("outcome") != "failed":
        return None
    last = failures[-1]
    if len(failures) > max_failures:
        return f"failed {len(failures)} times (--max-failures {max_failures}): {last['reason']}"
    furthest = max(failure["images"] for failure in failures)
    since = len(failures) - [failure["images"] for failure in failures].index(furthest)
    if counts_images and since >= 3:
        return f"failed {since} times without getting further than {furthest:,} images: {last['reason']}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The ranks.


def rank_command(job: dict, worker: int | None = None) -> list[str]:
    """What every rank runs. A run that has a checkpoint of its own goes on from there, whatever it was first told."""
    command = list(job["command"])
    if job["resumes"]:
        if checkpoints(Path(job["run_dir"])) and "--resume" in command:
            at = command.index("--resume")
            has_value = len(command) > at + 1 and not command[at + 1].startswith("-") and "=" not in command[at + 1]
            del command[at:at + 2 if has_value else at + 1]
        if "--resume" not in command:
            command.append("--resume")
    if worker is not None:
        command += [part.replace("{worker}", str(worker)) for part in job.get("worker_arguments", ["--worker", "{worker}"])]
    return [*in_container(job), "-m", "launchers.rank", *command[1:]]


def usable_nodes(job: dict, have: list[str]) -> list[str]:
    """The nodes that ranks run on: all, or the most that the batch divides among (`--nodes MIN-MAX` may give any number between)."""
    return have[:max((count for count in job.get("node_counts", [len(have)]) if count <= len(have)), default=len(have))]


def rank_environment(job: dict) -> dict[str, str]:
    """Of every rank. The site's own settings come last, and win."""
    site, environment = job["site"], {}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment["PYTHONUNBUFFERED"] = "1"
    if job["together"]:
        first = slurm.node_names(os.environ["SLURM_JOB_NODELIST"])[0]
        environment["MASTER_ADDR"] = slurm.node_address(first)
        with socket.socket() as server:  # rank 0 runs on this machine, the first of the job
            server.bind(("", 0))
            environment["MASTER_PORT"] = str(server.getsockname()[1])
    if site.get("network_interface"):
        environment |= {"NCCL_SOCKET_IFNAME": site["network_interface"], "GLOO_SOCKET_IFNAME": site["network_interface"]}
    environment |= {"NCCL_DEBUG": "WARN", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    if site.get("scratch"):  # caches that every node writes: never on the shared disk
        caches = Path(os.path.expandvars(site["scratch"])) / f"proxt2i-{os.getuid()}"
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton"),
                        "TORCH_EXTENSIONS_DIR": str(caches / "extensions"), "CUDA_CACHE_PATH": str(caches / "cuda")}
    return environment | {key: str(value) for key, value in site.get("environment", {}).items()}


def _run_ranks(job: dict, worker: int | None, logs: Path, job_id: str) -> End:
    nodes = usable_nodes(job, slurm.node_names(os.environ["SLURM_JOB_NODELIST"]))
    tasks, cpus = job["tasks_per_node"], job["site"].get("cpus_per_task")
    command = ["srun", "--unbuffered", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", f"--ntasks={len(nodes) * tasks}", f"--ntasks-per-node={tasks}",
               f"--output={logs}/rank-%t.log", "--kill-on-bad-exit=0", *job["site"].get("srun", [])]
    if cpus or len(job.get("node_counts", [])) > 1:
        command.append(f"--cpus-per-task={cpus or 1}")  # srun does not take it over from sbatch; with MIN-MAX nodes sbatch's is a node's
    if job["together"]:
        command.append("--wait=120")  # a rank that ended before the ranks had met; later on their lifeline is faster
    command += rank_command(job, worker)
    environment = {key: value for key, value in os.environ.items() if key not in OTHERS_RANKS} | rank_environment(job)
    workers = None
    if job.get("reward_workers"):
        workers = RewardWorkers(job, logs, environment)
        if refused := workers.wait_until_they_serve():
            workers.end()
            stopped = History(logs.parent).attempts()[-1]["signals"]
            return End("stopped" if stopped else "input" if WRONG_INPUT in workers.statuses() else "failed", refused)
        command.insert(1, "--het-group=0")
        environment |= workers.environment
    end = _watch(job, worker, logs, job_id, command, environment)
    if workers:
        gone = workers.ended()
        workers.end()
        return End("failed", f"{gone}; {end.reason}") if gone and end.outcome == "failed" else end
    return end


def _watch(job: dict, worker: int | None, logs: Path, job_id: str, command: list[str], environment: dict[str, str]) -> End:
    print("+", shlex.join(command), flush=True)
    hung = None
    with open(logs / "srun.log", "a") as errors:
        srun = subprocess.Popen(command, cwd=job["cwd"], env=environment, stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        while srun.poll() is None:
            try:
                srun.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                hung = hung or _find_hung(job, logs, srun, job_id)
    if hung:
        return End("failed", hung)
    signals = History(logs.parent, worker).attempts()[-1]["signals"]
    return judge(srun.returncode, (logs / "srun.log").read_text(), signals)


def judge(status: int, srun_said: str, signals: list[str]) -> End:
    """What the ranks' end means, from srun's exit status, its messages, and the signals to the batch step."""
    ends = task_ends(srun_said)
    statuses = {status for _, status in ends} or {status}
    first = f"rank {ends[0][0]} ended first, {_status_words(ends[0][1])}" if ends else f"srun ended, {_status_words(status)}"
    if not ends and status == 0:
        return End("finished", "the command has ended with status 0")
    if statuses <= STOPPED | {0} or (signals and statuses <= STOPPED | {0, 128 + signal.SIGKILL}):
        names = sorted({signal.Signals(status - 128).name for status in statuses if status > 128} | set(signals))
        return End("stopped", f"by {' and '.join(names)}")
    if statuses <= STOPPED | {0, BY_HAND}:
        return End("by hand", "by SIGINT: saved, and not requeued; submit it again to go on")
    if WRONG_INPUT in statuses and statuses <= {WRONG_INPUT, 1, 128 + signal.SIGTERM}:
        return End("input", f"the command refused its input: {first}")
    return End("failed", first)


def task_ends(srun_said: str) -> list[tuple[str, int]]:
    """(ranks, exit status) for every line that srun wrote about ranks that ended otherwise than well, in its order."""
    found = []
    for ranks, words in re.findall(r"srun: error: \S+: tasks? ([\d,-]+): (.+)", srun_said):
        code = re.match(r"Exited with exit code (\d+)", words)
        status = int(code[1]) if code else next((value for word, value in WORDS.items() if words.startswith(word)), 1)
        found.append((ranks, status))
    return found


def _status_words(status: int) -> str:
    try:
        return f"by {signal.Signals(status - 128).name}" if status > 128 else f"with exit status {status}"
    except ValueError:
        return f"with exit status {status}"


def what_ranks_said(logs: Path) -> str:
    """The line "error: ..." that the ranks' lifeline, or a failed rank, wrote last; "" if none did."""
    paths = sorted(logs.glob("rank-*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    paths.sort(key=lambda path: path.name != "rank-0.log")  # rank 0 hears of all others
    for path in paths:
        lines = [line for line in tail(path).splitlines() if re.match(r"(error: |srun: error|\w*(Error|Exception)\b.*: )", line)]
        if lines:
            return lines[-1].removeprefix("error: ")
    return ""


def tail(path: Path, size: int = 1 << 15) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read().decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# A run that stands still.


def _find_hung(job: dict, logs: Path, srun: subprocess.Popen, job_id: str) -> str | None:
    """End the ranks and say why, when nothing has been written for too long. Each prints its stack before, if it still can."""
    limit = job["hang_minutes"] * 60
    if not limit or time.time() - _last_sign(job, logs) < limit:
        return None
    sizes = {path: path.stat().st_size for path in logs.glob("rank-*.log")}
    _signal_ranks(job_id, "QUIT")
    time.sleep(min(STACKS_S, max(2.0, limit / 4)))
    silent = [path.stem[5:] for path, size in sorted(sizes.items()) if path.stat().st_size == size]
    _signal_ranks(job_id, "KILL")  # Slurm sends CONT and TERM first: what can still save does
    try:
        srun.wait(60)
    except subprocess.TimeoutExpired:
        srun.kill()
    who = f"rank {', '.join(silent)} does not answer" if silent and len(silent) < len(sizes) else "their stacks end the ranks' logs"
    return f"hung: nothing was written for {job['hang_minutes']:g} min; {who}"


def _last_sign(job: dict, logs: Path) -> float:
    """When the run last wrote something: a line of a log, a row of statistics, a part of a checkpoint."""
    run_dir = Path(job["run_dir"])
    paths = [logs, *logs.iterdir(), run_dir / "stats.jsonl", run_dir / "checkpoints", *(run_dir / "checkpoints").glob("*"),
             *(run_dir / "checkpoints").glob("*.tmp/*")]
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # not there, or gone meanwhile
            continue
    return max(times)


def _signal_ranks(job_id: str, name: str) -> None:
    try:
        slurm.run("scancel", f"--signal={name}", job_id)  # to the steps, not to the batch step
    except RuntimeError as error:
        print(error, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after.


def _finish_the_last(history: History, run_dir: Path) -> None:
    """Write the end of a start that could not: Slurm took the job away, or a node died."""
    attempts = history.attempts()
    if not attempts or "outcome" in attempts[-1]:
        return
    signals = attempts[-1]["signals"]
    if signals:
        history.add("end", outcome="stopped", reason=f"Slurm took the job away ({' and '.join(signals)} first)", images=images_reached(run_dir))
    else:
        down = slurm.why_down(attempts[-1]["nodes"]) or f"a node failed ({attempts[-1]['nodes']}), or the batch step was killed"
        history.add("end", outcome="failed", reason=f"ended without a word: {down}", images=images_reached(run_dir))


def _note_changed_code(job: dict, history: History) -> None:
    version, _ = code_version()
    if version != job["code"]:
        history.add("note", text=f"the code has changed since the submission: {job['code']} -> {version}")


def _give_up(history: History, reason: str) -> None:
    history.add("given up", reason=reason)
    print(f"not requeued: {reason}", flush=True)
    sys.exit(1)


def _requeue(history: History, job_id: str, restart: int, lost_a_node: bool = False) -> None:
    """Back into the queue, unless Slurm has put it there already (as it does when a node is lost) or somebody has cancelled it."""
    facts = slurm.job_facts(job_id)
    ran, limit = slurm.seconds_run(facts) if facts else (0, None)
    print(f"Slurm says: JobState={facts.get('JobState')}, Restarts={facts.get('Restarts')}", flush=True)
    if lost_a_node or int(facts.get("Restarts", restart)) > restart or facts.get("JobState") == "PENDING":
        history.add("requeued", by="Slurm")
    elif facts.get("JobState") == "RUNNING" or (limit and ran >= limit - 1) or facts.get("PreemptTime", "None") != "None":
        history.add("requeued", by="launchers")
        try:
            slurm.requeue(job_id)
        except RuntimeError as error:
            _give_up(history, f"it could not be requeued: {error}")
    else:
        _give_up(history, CANCELLED)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Slurm ends this process now
    time.sleep(120)
    sys.exit(1)
