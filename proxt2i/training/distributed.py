"""Starting the ranks, and the few collective operations the trainer needs.

Works under the `deepspeed` launcher, under `torchrun`, under Slurm's `srun`, in a plain `python` process (one rank), and in bare processes, one
a rank, that find RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from proxt2i.training import lifeline
from proxt2i.training.slurm import adopt_slurm_ranks


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(threads: int = 0) -> Ranks:
    """Join the other ranks and claim this rank's device. `threads`: CPU threads of this rank, 0 = cores / local ranks."""
    on_gpu = torch.cuda.is_available()
    adopt_slurm_ranks(os.environ)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "RANK" not in os.environ:  # plain python: one rank
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    _limit_threads(threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls, not ours
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    import deepspeed

    if not on_gpu:
        # Without this DeepSpeed compiles a shared-memory all-reduce at the first start (about a minute); gloo will do.
        deepspeed.ops.__compatible_ops__ = {}
    else:
        device_index = local_rank if torch.cuda.device_count() > 1 else 0  # Slurm may show a rank only its own GPU
        torch.cuda.set_device(device_index)
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        raise ValueError(f"cannot connect the ranks: {error}\nIf another run on this machine uses the port, choose one: "
                         "deepspeed --master_port 29501 proxt2i/train.py ...") from None
    lifeline.start(dist.get_rank(), dist.get_world_size(), _get_default_store())
    device = torch.device("cuda", device_index) if on_gpu else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def stop() -> None:
    """Returns when all ranks have called it."""
    lifeline.goodbye()
    if dist.is_initialized():
        dist.destroy_process_group()


def first_rank_does(ranks: Ranks, work):
    """Rank 0 calls `work()` while the others wait; every rank gets its (picklable) result, or its ValueError."""
    outcome = [None, None]
    if ranks.is_first:
        try:
            outcome[0] = work()
        except ValueError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def gather_objects(value) -> list:
    """Every rank's `value` (picklable), in rank order, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR2 in any rank, seen by all ranks at the same step. A context: signals are as before after it."""

    def __init__(self, ranks: Ranks):
        self._received = 0
        self._ranks = ranks

    def __enter__(self) -> StopFlag:
        self._previous = {number: signal.signal(number, self._on_signal) for number in lifeline.STOP_SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        self._received = number

    def reduced(self) -> int:
        """The signal that some rank received, or 0. Collective: every rank calls it at the same step."""
        if self._ranks.world_size == 1:
            return self._received  # a GPU need not be waited for
        flag = torch.tensor(self._received, device=self._ranks.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def _limit_threads(threads: int) -> None:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = threads or max(1, cores // local_ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for OpenMP libraries loaded after torch
    torch.set_num_threads(threads)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
