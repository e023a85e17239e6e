"""Ranks that Slurm's srun has started, one a process. Imports no torch, so that wrong input is refused before that is loaded."""

from __future__ import annotations

import re
from collections.abc import MutableMapping


def adopt_slurm_ranks(environment: MutableMapping[str, str]) -> None:
    """Name the ranks as torch does, in a process that `srun` has started, one a rank; anywhere else this changes nothing.

    A launcher within a Slurm job (RANK is set) has the last word, and so has a MASTER_ADDR or MASTER_PORT that is set. A batch script
    is no step: plain `python` there is one rank, however many tasks the job has.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return
    environment.update(RANK=environment["SLURM_PROCID"], LOCAL_RANK=environment["SLURM_LOCALID"], WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
                       LOCAL_WORLD_SIZE=str(_tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"]))))
    environment.setdefault("MASTER_ADDR", _first_node(environment["SLURM_STEP_NODELIST"]))
    # Below the ports that systems hand out by themselves, and another one for every job and step.
    environment.setdefault("MASTER_PORT", str(15_000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])) % 15_000))


def _tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Slurm's "8(x3),4": nodes 0, 1 and 2 have 8 tasks, node 3 has 4."""
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        node -= int(repeated or 1)
        if node < 0:
            return int(count)
    raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={tasks_per_node} names fewer nodes than SLURM_NODEID needs")


def _first_node(nodes: str) -> str:
    """Of Slurm's "gpu[003-007,012]-ib,login1": gpu003-ib."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0])
