"""`make demo`: pretrain a proximal text-to-image model on portraits in front of your eyes, then sample and measure it.

    python -m proxt2i.embedded.demo [--run-dir runs/demo] [--grpo] [overrides of configs/demo.yaml, e.g. train.images=100000]

Runs four commands that you could type yourself and prints each: training under the deepspeed launcher (one rank per
GPU, or per core on a CPU), samples of a few prompts, the evaluation, and a page about it all. Interrupted, it goes on where it stopped;
finished, it only samples and evaluates again; delete the run folder to start afresh. --grpo tunes the model on its reward besides
(minutes more), and evaluates it before and after at 4 steps.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "a smiling woman with long red hair and glasses on a blue background",
    "a serious man with short black hair and sunglasses on a yellow background",
    "a surprised lady with blond hair in a bun on a green background",
    "a happy dark skinned gentleman with curly gray hair and a beanie on a pink background",
    "a fair woman with long brown hair and a brimmed hat on a white background",
]


def ranks() -> list[str]:
    """Launcher flags: all GPUs (the launcher's default), else one rank per core, two at the most."""
    import torch

    return [] if torch.cuda.is_available() else ["--num_gpus", str(min(2, os.cpu_count() or 1))]


def call(title: str, command: list[str]) -> None:
    print(f"\n=== {title}\n$ {shlex.join(command)}", flush=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(code)


def tune(run_dir: Path) -> None:
    """GRPO on the model of `run_dir`, and both models measured as the tuned one is sampled."""
    tuned = run_dir.with_name(f"{run_dir.name}-grpo")
    call("GRPO on its PickScore", ["deepspeed", *ranks(), "proxt2i/grpo.py", "--deepspeed", "configs/zero2.json", "--config", "configs/grpo_portraits.yaml",
                                   "--resume", f"model.init_from={run_dir / 'model'}", f"train.run_dir={tuned}"])
    for title, folder in (("before", run_dir), ("after", tuned)):
        call(f"evaluation by the judge, {title} GRPO", [sys.executable, "-m", "proxt2i.evaluate", "--model", str(folder / "model"), "--steps", "4", "--guidance", "1.5",
             "--guidance-below", "0.35", "--num-prompts", "512", "--out", str(folder / "evaluation-grpo")])


def main() -> None:
    parser = argparse.ArgumentParser("python -m proxt2i.embedded.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--grpo", action="store_true", help="tune the model on the PickScore of portraits after pretraining, into RUN_DIR-grpo")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()

    start = time.time()
    run_dir = args.run_dir
    train = ["deepspeed", *ranks(), "proxt2i/train.py", "--deepspeed", "configs/zero2.json", "--config", "configs/demo.yaml", "--resume"]
    call("pretraining on portraits", [*train, f"train.run_dir={run_dir}", *args.overrides])
    model = str(run_dir / "model")
    call("samples", [sys.executable, "-m", "proxt2i.sample", *PROMPTS, "--model", model, "--num-images", "6", "--out", str(run_dir / "pictures")])
    call("evaluation by the judge", [sys.executable, "-m", "proxt2i.evaluate", "--model", model, "--steps", "4,8", "--num-prompts", "512", "--out", str(run_dir / "evaluation")])
    if args.grpo:
        tune(run_dir)
    call("report", [sys.executable, "-m", "proxt2i.report", str(run_dir)])
    print(
        f"\nDone in {(time.time() - start) / 60:.1f} min. Look at\n  {ROOT / run_dir / 'pictures' / 'grid.png'}   what the prompts above became\n"
        f"  {ROOT / run_dir / 'report.html'}   settings, curves, pictures during training, evaluation: one page for the browser\n"
        f'and try: {Path(sys.executable).parent / "python"} -m proxt2i.sample "a surprised man with curly red hair" --model {model}'
    )  # fmt: skip


if __name__ == "__main__":
    main()
