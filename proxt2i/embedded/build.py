"""Rebuilds everything in assets/ from nothing: VAE, CLIP and its vision tower once more, judge, then the portraits model. Takes hours on 2 cores.

    python -m proxt2i.embedded.build                 # all of them
    python -m proxt2i.embedded.build --only uvit     # the model alone: configs/portraits.yaml, then its figures

The U-ViT and its text embeddings belong together: a new VAE or CLIP needs a new U-ViT.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.embedded.demo import ROOT, call, ranks

PARTS = {"vae": "train_vae", "clip": "train_clip", "clip-vision": "train_clip_vision", "judge": "train_judge"}


def ship(run_dir: Path) -> None:
    """Copies RUN/model's U-ViT and settings into the package, in half precision, with recipe.json beside them."""
    from proxt2i.models.bundle import load_bundle, save_bundle

    bundle = load_bundle(run_dir / "model")
    bundle.uvit.half()
    save_bundle(SHIPPED_MODEL, bundle, with_components=False)
    evaluation = run_dir / "shipped_evaluation"
    call("figures", [sys.executable, "-m", "proxt2i.evaluate", "--steps", "4,6,8,10", "--out", str(evaluation)])
    rows = json.loads((evaluation / "results.json").read_text())["rows"]
    stats = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    version = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    recipe = {"command": "python -m proxt2i.embedded.build --only uvit", "config": (run_dir / "config.yaml").read_text(),
              "images": stats[-1]["images"], "code": version, "torch": torch.__version__, "evaluation": rows}
    (SHIPPED_MODEL / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser("python -m proxt2i.embedded.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "uvit"], default=[*PARTS, "uvit"])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/portraits"), help="training run of the U-ViT; continued if it exists")
    args = parser.parse_args()
    for part, module in PARTS.items():
        if part in args.only:
            call(part, [sys.executable, "-m", f"proxt2i.embedded.{module}"])
    if "uvit" in args.only:
        train = ["deepspeed", *ranks(), "proxt2i/train.py", "--deepspeed", "configs/zero2.json", "--config", "configs/portraits.yaml", "--resume"]
        call("U-ViT", [*train, f"train.run_dir={args.run_dir}"])
        ship(ROOT / args.run_dir)


if __name__ == "__main__":
    main()
