"""What a reward does to a model: one that never looks at the prompt against one that asks for it, and when the guard notices.

    python benchmarks/reward_sensitivity.py [--model runs/demo/model] [--images 2048] [section.key=value ...]

Two GRPO runs of configs/grpo_portraits.yaml from the same model, prompts and noise, which differ in the trained reward alone:
  collapsing   jpeg_compressibility: small files, whatever the prompt says; like an aesthetic score it cannot tell prompts apart
  alignment    pickscore_contrast: is the prompt preferred to prompts that say something else?
Each is watched by the same panel, which is never trained on (the judge of portraits, PickScore), and by the guard. The guard only
warns here, so that the curves show what it would have prevented. Interrupted, the benchmark goes on where it was.
Writes OUT/results.json (curves, settings, alarms) and OUT/reward_sensitivity.png, and keeps the runs in OUT.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from train import machine

ROOT = Path(__file__).resolve().parents[1]
RUNS = {"collapsing": {"name": "jpeg_compressibility"}, "alignment": {"name": "pickscore_contrast", "path": "portraits", "std_floor": 0.3}}
PANEL = [{"name": "portraits"}, {"name": "pickscore", "path": "portraits"}]


def grpo(kind: str, args) -> Path:
    """Run (or go on with, or find finished) the GRPO of one reward; returns its folder. SystemExit with its exit status when it fails."""
    folder = args.out / kind
    command = [*([sys.executable] if args.ranks == 1 else ["deepspeed", "--num_gpus", str(args.ranks)]), "proxt2i/grpo.py", "--deepspeed", "configs/zero2.json",
               "--config", "configs/grpo_portraits.yaml", "--resume", f"train.run_dir={folder}", f"train.images={args.images}",
               f"rewards.train={json.dumps([RUNS[kind]])}", f"rewards.panel={json.dumps(PANEL)}", "guard.alarm=warn", "policy.reward_gradient=0", "policy.variety=0", "rollout.guidance=1.5",
               f"guard.every={max(args.images // 8, 1)}", f"train.checkpoint_every={max(args.images // 4, 1)}", "sample.every=0",
               *([f"model.init_from={args.model.resolve()}"] if args.model else []), *args.overrides]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            log.write(line)
            if "images" in line or "ALARM" in line or "error" in line:
                print(f"{kind}: {line.rstrip()}", flush=True)
    if process.wait():
        raise SystemExit(process.returncode)
    return folder


def curve(folder: Path) -> list[dict]:
    """The guard's looks of a run: [{images, reward/NAME means, diversity/MEASURE, alarm}], the start first."""
    rows = {row["images"]: row for row in map(json.loads, (folder / "stats.jsonl").read_text().splitlines())}
    looks, before = [], None
    for images, row in sorted(rows.items()):
        seen = {key: value for key, value in row.items() if key.startswith(("eval/", "diversity/"))}
        if seen and seen != before:  # a row repeats the latest look until the next one; the first after an interruption has none
            looks.append({"images": images if looks else 0, **seen, "kl": row["kl"], "alarms": row["alarms"]})
            before = seen
    if not looks:
        raise SystemExit(f"{folder}/stats.jsonl has no looks of the guard; remove the folder and run again")
    return looks


def alarms(folder: Path) -> dict[int, str]:
    """{images: what the guard said}, from the run's own output."""
    found = re.findall(r"ALARM at ([\d,]+) images: (.*); guard\.alarm", (folder / "log.txt").read_text())
    return {int(images.replace(",", "")): message for images, message in found}


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for kind, color in (("collapsing", "tab:red"), ("alignment", "tab:blue")):
        run, name = results["runs"][kind], RUNS[kind]["name"]
        looks, images = run["looks"], [look["images"] for look in run["looks"]]
        trained = [look[f"eval/{name}"] for look in looks]
        span = max(abs(value - trained[0]) for value in trained) or 1.0
        lines = ([(value - trained[0]) / span for value in trained], [look["eval/portraits"] for look in looks], [look["eval/pickscore"] for look in looks],
                 [look["diversity/pictures"] / looks[0]["diversity/pictures"] for look in looks])
        for ax, line in zip(axes, lines):
            ax.plot(images, line, "-o", color=color, markersize=3, label=f"{name}: {trained[0]:.2f} to {trained[-1]:.2f}" if ax is axes[0] else f"trained on {name}")
            if run["alarms"]:
                ax.axvline(min(map(int, run["alarms"])), color=color, linestyle=":", linewidth=1.2, label="the guard's first alarm")
    axes[3].axhline(results["min_diversity"], color="gray", linewidth=0.8, label="guard.min_diversity")
    for ax, title in zip(axes, ("trained reward (share of its largest change)", "panel: attributes right, by the judge", "panel: PickScore", "variance within prompts (1: the start)")):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("images")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder to start from (default: the shipped portraits model)")
    parser.add_argument("--images", type=int, default=2048, help="length of each run (default: 2048)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/reward_sensitivity"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of both runs")
    args = parser.parse_args()
    if args.model and not (args.model / "uvit").is_dir():
        parser.error(f"--model {args.model}: no model folder (one with uvit/ in it, like RUN/model)")
    args.out = args.out.resolve()
    settings = yaml.safe_load((ROOT / "configs" / "grpo_portraits.yaml").read_text())
    results = {"command": f"python benchmarks/reward_sensitivity.py {' '.join(sys.argv[1:])}".strip(), "machine": machine(), "model": str(args.model or "shipped"),
               "min_diversity": 0.7, "settings": settings, "runs": {}}
    for kind in RUNS:
        folder = grpo(kind, args)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        results["min_diversity"] = config["guard"]["min_diversity"]
        results["runs"][kind] = {"reward": RUNS[kind], "looks": curve(folder), "alarms": alarms(folder)}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, args.out / "reward_sensitivity.png")
    for kind, run in results["runs"].items():
        first, last = run["looks"][0], run["looks"][-1]
        name = RUNS[kind]["name"]
        print(f"{kind:<11} {name} {first['eval/' + name]:.3f} -> {last['eval/' + name]:.3f}   attributes right {first['eval/portraits']:.3f} -> {last['eval/portraits']:.3f}   "
              f"variance within prompts x {last['diversity/pictures'] / first['diversity/pictures']:.2f}   first alarm: {min(run['alarms'], default='none')}")
    print(f"-> {args.out}/results.json, reward_sensitivity.png")


if __name__ == "__main__":
    main()
