"""What the entry points that run on several ranks have in common: how they end, and their process's signals."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from proxt2i.training import lifeline
from proxt2i.training.slurm import adopt_slurm_ranks

HERE = Path(__file__).resolve().parent
MALLOPT = {-3: 32 << 20, -1: 1 << 30, -2: 64 << 20}  # M_MMAP_THRESHOLD (glibc's largest), M_TRIM_THRESHOLD and M_TOP_PAD, in bytes


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The arguments that all of them take."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument("--deepspeed", metavar="JSON", default=str(HERE.parent / "configs" / "zero2.json"),
                        help="DeepSpeed settings: ZeRO stage 1, 2 or 3, offload to CPU (default: configs/zero2.json)")
    parser.add_argument("--config", metavar="YAML", action="append", default=[],
                        help="settings that differ from the defaults (the portraits run); may be given again, later files win")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="PATH",
                        help="continue from a checkpoint folder; without PATH from the newest intact one of the run")
    parser.add_argument("--dry-run", action="store_true",
                        help="train nothing: check config, data and components, print sizes, memory per rank and hours")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: number of ranks (default: as started)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    given = parser.parse_intermixed_args(arguments)
    if given.resume and "=" in given.resume and not Path(given.resume).exists():  # --resume section.key=value
        given.overrides.insert(0, given.resume)
        given.resume = "auto"
    return given


def rank() -> int:
    """This process's, as the launcher says it, or Slurm; call it before anything else asks the environment."""
    adopt_slurm_ranks(os.environ)
    return int(os.environ.get("RANK", "0"))


def ranks() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine) of the environment that torchrun, deepspeed and launchers leave. ValueError for nonsense."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank}, WORLD_SIZE={world}: out of range")
    return rank, world, local


def world_size(given: argparse.Namespace) -> int:
    """Number of ranks: as started, or as asked for a dry run."""
    if given.world_size is None:
        return int(os.environ.get("WORLD_SIZE", "1"))
    if not given.dry_run or given.world_size < 1:
        raise ValueError("--world-size: a number of ranks, at least 1, for --dry-run; otherwise the launcher says how many there are")
    return given.world_size


def prepare_process() -> None:
    """For a process that is the entry point's own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the training steps there is nothing to save
    faulthandler.enable()
    if hasattr(signal, "SIGQUIT"):
        faulthandler.register(signal.SIGQUIT)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB that a step frees for the next step. By default it hands activations back to the system at every step, and
    the next one pays a page fault for every 4 KiB. Changes nothing where the C library is another one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in MALLOPT.items():
        mallopt(parameter, value)


def fail(error: Exception, rank: int) -> int:
    """End all ranks; returns this one's exit status if it is alone, or the ranks have not met yet."""
    is_input = isinstance(error, ValueError) and _is_ours(error)
    status = 2 if is_input else lifeline.FAILED
    report = f"error: {error}"
    if not is_input:
        report = (f"{''.join(traceback.format_exception(error))}error: {lifeline.whoami(rank)} failed: "
                  f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    lifeline.leave(status, report)
    if is_input and rank != 0:
        time.sleep(20)  # rank 0 reports the same, and its launcher ends the other ranks meanwhile
    print(report, file=sys.stderr, flush=True)
    return status


def _is_ours(error: Exception) -> bool:
    """Whether the project raised it, about its input; any other is a bug and keeps its traceback."""
    return HERE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parents
