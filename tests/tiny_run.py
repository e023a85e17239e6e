"""A tiny run in this process, for the tests of training."""

from runs import ROOT, overrides

from proxt2i.config import load_config
from proxt2i.training import engine as engines
from proxt2i.training.loop import Trainer
from proxt2i.training.state import SavedState

ZERO2 = ROOT / "configs" / "zero2.json"


def make_trainer(settings, ranks, resume=None, **changes):
    return Trainer(load_config(None, overrides(settings, **changes)), engines.read_deepspeed_json(ZERO2), resume, ranks)


def weights(run_dir, images, kind="weight"):
    saved = SavedState(run_dir / "checkpoints" / f"step-{images:09d}")
    return {name: saved.read(kind, name, 0, size) for name, size in saved.sizes().items()}
