"""Runs of a second for the tests of training, on the fixture `settings`."""

import multiprocessing
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from proxt2i.config import load_config
from proxt2i.training import distributed, engine as engines
from proxt2i.training.loop import Trainer
from proxt2i.training.state import SavedState

ROOT = Path(__file__).parent.parent
ZERO2 = ROOT / "configs" / "zero2.json"
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def overrides(settings, **changes):
    merged = settings | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in merged.items()]


def make_trainer(settings, ranks, resume=None, **changes):
    return Trainer(load_config(None, overrides(settings, **changes)), engines.read_deepspeed_json(ZERO2), resume, ranks)


def weights(run_dir, images, kind="weight"):
    saved = SavedState(run_dir / "checkpoints" / f"step-{images:09d}")
    return {name: saved.read(kind, name, 0, size) for name, size in saved.sizes().items()}


def assert_same_checkpoint(one: Path, other: Path):
    """Bit for bit: weights, averaged weights, optimizer state."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files and files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for file in files:
        left, right = load_file(one / file), load_file(other / file)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{file}: {key}"


def run_on_two_ranks(target, *arguments) -> list[int]:
    """Call target(*arguments) on two ranks, from a process that has the imports behind it. Returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["proxt2i.training.loop", "deepspeed"])
    port = distributed._free_port()
    processes = [context.Process(target=_rank, args=(rank, port, target, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def _rank(rank, port, target, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    target(*arguments)
