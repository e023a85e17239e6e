"""Slurm's commands, and what they say: partitions, the state of a job, requeueing it. Needs no accounting database."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "PREEMPTED", "REVOKED")


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    nodes: int
    gpus_per_node: int  # of its best nodes
    max_minutes: int | None


def run(*command: str, timeout: float = 60) -> str:
    """Standard output. RuntimeError with what the command said when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"`{' '.join(command)}` gave no answer in {timeout:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}`: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def partitions() -> dict[str, Partition]:
    found: dict[str, Partition] = {}
    for line in run("sinfo", "-h", "-o", "%P|%D|%G|%l").splitlines():  # one line for each kind of node in it
        starred, nodes, gres, limit = line.split("|")
        name = starred.rstrip("*")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[\w.-]+)?:(\d+)", gres))
        other = found.get(name, Partition(name, starred.endswith("*"), 0, 0, minutes(limit)))
        found[name] = Partition(name, other.is_default, other.nodes + int(nodes), max(other.gpus_per_node, gpus), other.max_minutes)
    return found


def minutes(text: str) -> int | None:
    """Slurm's times: "30" minutes, "1:30:00", "2-12" days-hours, "2-12:00:00"; "infinite" is None. Seconds are rounded up. ValueError."""
    if text.lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise ValueError(f"--time {text}: give hours:minutes:seconds like 24:00:00, or days-hours:minutes:seconds")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        total = days * 86_400 + first * 3600 + (second or 0) * 60 + (third or 0)
    elif third is not None:
        total = first * 3600 + second * 60 + third
    else:
        total = first * 60 + (second or 0)
    if not total:
        raise ValueError(f"--time {text}: must be more than nothing")
    return -(-total // 60)


def job_facts(job: str) -> dict[str, str]:
    """Of `scontrol show job`: JobState, Reason, Restarts, RunTime, NodeList, ... {} where the controller knows it no more."""
    try:
        line = run("scontrol", "show", "job", "-o", job).split("\n")[0]
    except RuntimeError:
        return {}
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def job_state(job: str) -> str:
    """RUNNING, PENDING, ...; from the controller, or else from the accounting database; UNKNOWN where neither knows it."""
    state = job_facts(job).get("JobState")
    if state is None and shutil.which("sacct"):
        try:
            lines = run("sacct", "-X", "-n", "-P", "-o", "State", "-j", job).split("\n")
            state = lines[0].split(" ")[0]
        except RuntimeError:  # no accounting here
            pass
    return state or "UNKNOWN"


def is_over(state: str) -> bool:
    return state in OVER


def seconds_run(facts: dict[str, str]) -> tuple[int, int | None]:
    """(how long the job has run, its time limit), in seconds."""
    def seconds(text):
        days, _, clock = text.rpartition("-")
        hours, minute, second = map(int, clock.split(":"))
        return int(days or 0) * 86_400 + hours * 3600 + minute * 60 + second

    limit = facts.get("TimeLimit", "UNLIMITED")
    return seconds(facts.get("RunTime", "00:00:00")), seconds(limit) if limit[0].isdigit() else None


def requeue(job: str) -> None:
    """Put a running job, or one that Slurm has just ended, back into the queue. RuntimeError when Slurm will not, after five tries."""
    for attempt in range(5):
        try:
            run("scontrol", "requeue", job)
            return
        except RuntimeError as error:
            last = error
            time.sleep(2 * attempt + 1)
    raise last


def other_machines(partition: str) -> list[str]:
    """Nodes of a partition that are not this machine."""
    nodes = ",".join(run("sinfo", "-h", "-p", partition, "-o", "%N").split())
    found = re.findall(r"^NodeName=(\S+) .*\bNodeHostName=(\S+)", run("scontrol", "show", "node", "-o", nodes), re.MULTILINE)
    here = socket.gethostname().split(".")[0]
    return [node for node, host in found if host.split(".")[0] != here]


def why_down(nodes: str) -> str:
    """Those of `nodes` that Slurm has lost, with its reasons; "" if it has none, or cannot be asked."""
    try:
        lines = run("sinfo", "-h", "-N", "-n", nodes, "-o", "%N|%T|%E").splitlines()
    except RuntimeError:
        return ""
    down = {}
    for line in lines:  # one for each partition that the node is in
        node, state, reason = line.split("|", 2)
        if state.startswith(("down", "fail", "reboot")) or state.endswith("*"):
            down[node] = f"{node} is {state.rstrip('*')}" + (f" ({reason})" if reason != "none" else " (Not responding)" if state.endswith("*") else "")
    return ", ".join(down.values())


def node_address(node: str) -> str:
    """Where a node's Slurm daemon is reached, and therefore its ranks are."""
    facts = run("scontrol", "show", "node", "-o", node)
    found = re.search(r"\bNodeAddr=(\S+)", facts)
    return found[1] if found else node


def node_names(nodes: str) -> list[str]:
    return run("scontrol", "show", "hostnames", nodes).split()
