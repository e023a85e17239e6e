"""What a run reports: a progress bar, stats.jsonl (always), TensorBoard (train.tensorboard), Weights & Biases (train.wandb),
sample grids as PNG."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import uuid
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from proxt2i.config import Config, TrainConfig

WANDB_ID = "wandb-id.txt"  # in the run folder: the run's identity at Weights & Biases, so that --resume goes on there


def check_trackers(train: TrainConfig) -> None:
    """ValueError, with the fix, when the config asks for a tracker that is not installed."""
    if train.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("train.wandb is set, but wandb is not installed: pip install wandb, or leave the setting out")


class Tracker:
    """Rank 0's reporter. Rows of stats.jsonl past `images_seen` (work lost in a crash) are dropped on resume."""

    def __init__(self, run_dir: Path, config: Config, images_seen: int = 0):
        self.run_dir = run_dir
        self._stats = run_dir / "stats.jsonl"
        _drop_rows_after(self._stats, images_seen)
        self._total = config.train.images
        self._bar = tqdm(total=self._total, initial=images_seen, unit="img", dynamic_ncols=True, mininterval=0.5,
                         disable=not sys.stderr.isatty())
        self._writer = self._wandb = None
        if config.train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=images_seen + 1)
        if config.train.wandb:
            self._wandb = _start_wandb(run_dir, config, images_seen)

    def advance(self, images: int) -> None:
        self._bar.update(images)

    def say(self, message: str) -> None:
        self._bar.clear()
        print(message, flush=True)

    def log(self, row: dict[str, float], brief: str | None = None) -> None:
        """Write one row; row["images"] is the x-axis everywhere. brief: what the console shows of it (default: loss, gradient, learning rate)."""
        with open(self._stats, "a") as file:
            file.write(json.dumps(row) + "\n")
        curves = {_curve(key): value for key, value in row.items() if key != "images"}
        if self._writer is not None:
            for name, value in curves.items():
                self._writer.add_scalar(name, value, row["images"])
        if self._wandb is not None:
            self._wandb.log({"images": row["images"], **curves})
        brief = brief or f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}"
        if self._bar.disable:
            remaining = max(0, self._total - row["images"]) / max(row["images_per_s"], 1e-9)
            mfu = f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
            wait = f"  data wait {row['data_wait']:.0%}" if "data_wait" in row else ""
            print(f"{row['images']:>10,}/{self._total:,} images  {brief}  {row['images_per_s']:.0f} img/s{mfu}{wait}  "
                  f"{remaining / 60:.1f} min left", flush=True)
        else:
            self._bar.set_postfix_str(brief)

    def grid(self, images_seen: int, samples: np.ndarray) -> Path:
        """Save samples, uint8 [rows, columns, H, W, 3], as samples/IMAGES.png and in the trackers."""
        rows, columns, height, width, _ = samples.shape
        grid = samples.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
        path = self.run_dir / "samples" / f"{images_seen:09d}.png"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        Image.fromarray(grid).save(temporary, format="PNG")
        os.replace(temporary, path)
        if self._writer is not None:
            self._writer.add_image("samples", grid, images_seen, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"images": images_seen, "samples": wandb.Image(grid)})
        return path

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_rows(stats: Path) -> list[dict[str, float]]:
    """The rows of a stats.jsonl, oldest first; lines cut short by a crash (or being written now) are left out."""
    rows = []
    for line in stats.read_text().splitlines() if stats.exists() else []:
        try:
            row = json.loads(line)
            row["images"]
        except (ValueError, KeyError, TypeError):
            continue
        rows.append(row)
    return rows


def _drop_rows_after(stats: Path, images_seen: int) -> None:
    if not stats.exists():
        return
    temporary = stats.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in read_rows(stats) if row["images"] <= images_seen))
    os.replace(temporary, stats)


def _curve(key: str) -> str:
    """A row's key as the name of a curve: trackers make one section of what stands before the first "/", and the many curves
    of single steps ("loss/N4/k3") get theirs."""
    if key.count("/") == 2:
        return key.replace("loss/", "loss_by_step/", 1)
    return key if "/" in key else f"train/{key}"


def _start_wandb(run_dir: Path, config: Config, images_seen: int):
    """The wandb run of this run folder: a new one at the start, the same again on resume."""
    import wandb

    id_file = run_dir / WANDB_ID
    if not images_seen or not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    try:
        run = wandb.init(project=config.train.wandb, name=run_dir.resolve().name, id=id_file.read_text().strip(), resume="allow",
                         dir=run_dir, config=asdict(config))
    except wandb.Error as error:
        raise ValueError(f"train.wandb={config.train.wandb}: {error} Or report later: WANDB_MODE=offline") from None
    run.define_metric("*", step_metric="images")
    return run
