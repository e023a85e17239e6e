"""`make demo`: pretrain a proximal text-to-image model on portraits in front of your eyes, tune it with GRPO, sample and measure it.

    python -m proxt2i.embedded.demo [--run-dir runs/demo] [--no-grpo] [overrides of configs/demo.yaml, e.g. train.images=100000]

Runs commands that you could type yourself and prints each: training under the deepspeed launcher (one rank per GPU, or per core on a
CPU), GRPO into RUN_DIR-grpo, samples of a few prompts, the evaluation with the judge's figures before and after, and a page about it all.
--no-grpo leaves the second stage out (about four minutes less). Interrupted, it goes on where it stopped; finished, it only samples and
evaluates again; delete the run folders to start afresh.
"""

from __future__ import annotations

import argparse
import json
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
# How the two models are compared: in as many steps as configs/grpo_portraits.yaml trains, the tuned one as it was trained, without guidance (its
# model's default), the other at a guidance that suits it.
FOUR_STEPS, GUIDED = ["--steps", "4"], ["--guidance", "1.5", "--guidance-below", "0.35"]


def ranks() -> list[str]:
    """Launcher flags: all GPUs (the launcher's default), else one rank per core, two at the most."""
    import torch

    return [] if torch.cuda.is_available() else ["--num_gpus", str(min(2, os.cpu_count() or 1))]


def call(title: str, command: list[str]) -> None:
    """Run a command to its end; SystemExit with its status where that is not 0. Ctrl-C reaches the command too, which saves: it is waited for."""
    print(f"\n=== {title}\n$ {shlex.join(command)}", flush=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    process, interrupted = subprocess.Popen(command, cwd=ROOT, env=environment), False
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        print("interrupted: the same command again goes on from here", file=sys.stderr)
        sys.exit(process.returncode or 130)
    if process.returncode:
        sys.exit(process.returncode)


def sample(model: Path, how: list[str], out: Path, title: str) -> None:
    call(title, [sys.executable, "-m", "proxt2i.sample", *PROMPTS, "--model", str(model), *FOUR_STEPS, *how, "--num-images", "6", "--out", str(out)])


def evaluate(model: Path, how: list[str], out: Path, title: str) -> None:
    call(title, [sys.executable, "-m", "proxt2i.evaluate", "--model", str(model), *FOUR_STEPS, *how, "--num-prompts", "512", "--out", str(out)])


def tune(run_dir: Path, tuned: Path) -> None:
    call("GRPO: rewarded for what the prompt says", ["deepspeed", *ranks(), "proxt2i/grpo.py", "--deepspeed", "configs/zero2.json", "--config", "configs/grpo_portraits.yaml",
                                                     "--resume", f"model.init_from={run_dir / 'model'}", f"train.run_dir={tuned}"])


def comparison(folders: dict[str, Path]) -> str:
    """The judge's figures of the folders' evaluations, {title: run folder}, as a table."""
    lines = [f"{'':<14}{'attributes right':>17}{'all eight right':>17}{'FD':>8}{'diversity':>11}"]
    for title, folder in folders.items():
        results = json.loads((ROOT / folder / "evaluation-grpo" / "results.json").read_text())
        row, n = results["rows"][-1], results["num_prompts"]
        error = (row["all_right"] * (1 - row["all_right"]) / n) ** 0.5
        lines.append(f"{title:<14}{row['accuracy']:>17.3f}{row['all_right']:>9.3f} +- {error:.3f}{row['frechet_distance']:>8.2f}{row['diversity']:>11.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m proxt2i.embedded.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--grpo", action=argparse.BooleanOptionalAction, default=True, help="tune the model with GRPO after pretraining, into RUN_DIR-grpo")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()

    start = time.time()
    run_dir, tuned = args.run_dir, args.run_dir.with_name(f"{args.run_dir.name}-grpo")
    train = ["deepspeed", *ranks(), "proxt2i/train.py", "--deepspeed", "configs/zero2.json", "--config", "configs/demo.yaml", "--resume"]
    call("pretraining on portraits", [*train, f"train.run_dir={run_dir}", *args.overrides])
    if args.grpo:
        tune(run_dir, tuned)
    model = run_dir / "model"
    call("samples", [sys.executable, "-m", "proxt2i.sample", *PROMPTS, "--model", str(model), "--num-images", "6", "--out", str(run_dir / "pictures")])
    call("evaluation by the judge", [sys.executable, "-m", "proxt2i.evaluate", "--model", str(model), "--steps", "4,8", "--num-prompts", "512",
                                    "--out", str(run_dir / "evaluation")])
    if args.grpo:
        for title, folder, how in (("before", run_dir, GUIDED), ("after", tuned, [])):
            sample(folder / "model", how, folder / "pictures-grpo", f"samples {title} GRPO")
            evaluate(folder / "model", how, folder / "evaluation-grpo", f"evaluation by the judge, {title} GRPO")
        call("report on GRPO", [sys.executable, "-m", "proxt2i.report", str(tuned)])
    call("report", [sys.executable, "-m", "proxt2i.report", str(run_dir)])
    print(f"\nDone in {(time.time() - start) / 60:.1f} min. Look at\n  {ROOT / run_dir / 'pictures' / 'grid.png'}   what the prompts above became\n"
          f"  {ROOT / run_dir / 'report.html'}   settings, curves, pictures during training, evaluation: one page for the browser")
    if args.grpo:
        print(f"\nGRPO, by the judge (which took no part in it), 4 steps:\n{comparison({'before GRPO': run_dir, 'after GRPO': tuned})}\n"
              f"  {ROOT / run_dir / 'pictures-grpo' / 'grid.png'}   before\n  {ROOT / tuned / 'pictures-grpo' / 'grid.png'}   after, the same prompts and noise\n"
              f"  {ROOT / tuned / 'report.html'}   rewards, panel and diversity during GRPO")
    print(f'\nand try: {Path(sys.executable).parent / "python"} -m proxt2i.sample "a surprised man with curly red hair" --model {tuned / "model" if args.grpo else model}')


if __name__ == "__main__":
    main()
