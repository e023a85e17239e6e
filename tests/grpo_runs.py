"""Tiny GRPO runs in this process; the fixtures `model` and `grpo` are in conftest.py."""

from runs import ROOT, overrides

from proxt2i.grpo_config import load_config
from proxt2i.training import engine as engines
from proxt2i.training.grpo import GrpoTrainer

__all__ = ["make", "overrides"]


def make(settings, ranks, resume=None, zero="zero2", **changes):
    return GrpoTrainer(load_config(None, overrides(settings, **changes)), engines.read_deepspeed_json(ROOT / "configs" / f"{zero}.json"), resume, ranks)
