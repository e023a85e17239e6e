"""What a run reports: a progress bar, stats.jsonl (always), TensorBoard (train.tensorboard), sample grids as PNG."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm


class Tracker:
    """Rank 0's reporter. Rows of stats.jsonl past `images_seen` (work lost in a crash) are dropped on resume."""

    def __init__(self, run_dir: Path, total_images: int, images_seen: int = 0, tensorboard: bool = True):
        self.run_dir = run_dir
        self._stats = run_dir / "stats.jsonl"
        _drop_rows_after(self._stats, images_seen)
        self._bar = tqdm(total=total_images, initial=images_seen, unit="img", dynamic_ncols=True, mininterval=0.5,
                         disable=not sys.stderr.isatty())
        self._total = total_images
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(run_dir / "tensorboard", purge_step=images_seen + 1)

    def advance(self, images: int) -> None:
        self._bar.update(images)

    def say(self, message: str) -> None:
        self._bar.clear()
        print(message, flush=True)

    def log(self, row: dict[str, float]) -> None:
        """Write one row; row["images"] is the x-axis everywhere."""
        with open(self._stats, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for key, value in row.items():
                self._writer.add_scalar(key if "/" in key else f"train/{key}", value, row["images"])
        brief = f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}"
        if self._bar.disable:
            remaining = (self._total - row["images"]) / max(row["images_per_s"], 1e-9)
            print(f"{row['images']:>10,}/{self._total:,} images  {brief}  {row['images_per_s']:.0f} img/s  "
                  f"data wait {row['data_wait']:.0%}  {remaining / 60:.1f} min left", flush=True)
        else:
            self._bar.set_postfix_str(brief)

    def grid(self, images_seen: int, samples: np.ndarray) -> Path:
        """Save samples, uint8 [rows, columns, H, W, 3], as samples/IMAGES.png and in TensorBoard."""
        rows, columns, height, width, _ = samples.shape
        grid = samples.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
        path = self.run_dir / "samples" / f"{images_seen:09d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(grid).save(path)
        if self._writer is not None:
            self._writer.add_image("samples", grid, images_seen, dataformats="HWC")
        return path

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


def _drop_rows_after(path: Path, images_seen: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["images"] <= images_seen:
                kept.append(line + "\n")
        except ValueError:  # a line cut short by a crash
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
