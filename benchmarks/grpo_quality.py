"""What GRPO makes of a proximal network and of its score twin: the same images, rewards and judge, before and after, in few steps.

    python benchmarks/grpo_quality.py [--pretrain 40000] [--images 6144] [--ranks 2] [--steps 4 6 10] [section.key=value of GRPO ...]

1. Trains both networks on `--pretrain` images: configs/demo.yaml, and the same with objective=score (--prox, --score: folders instead).
2. Tunes both with configs/grpo_portraits.yaml for `--images` images in 4 steps: the proximal one by the plan `relaxed` without memory, the
   score network by `ddpm`, the ancestral sampler, whose transitions have densities too.
3. Draws `--prompts` held-out prompts, which no run and no choice of ours has seen, with all four models, as rollouts are drawn but with
   `--steps` steps, and asks the judge, which takes no part in training.

Columns: share of pictures with all eight attributes right, with its standard error; its change by GRPO, paired picture by picture;
attributes right; Frechet distance to other drawings; variance within a prompt relative to drawings, of all pictures and of the
pictures that are right (so that losing wrong pictures does not count as losing variety). "By choice": the variance that the pictures
before GRPO have when right ones are taken more often, until as many more are right; no tuning of any kind is in it. All is kept in OUT; interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from train import machine

from proxt2i.data.writing import write_atomically
from proxt2i.data.portraits import make_portrait
from proxt2i.diffusion import VPSchedule, guidance_scales, guided, make_plan, make_policy, score_plan
from proxt2i.embedded import HELD_OUT_SEED
from proxt2i.embedded.judge import Judge, diversity, frechet_distance, right_attributes
from proxt2i.evaluation.portraits import drawings_of, drawings_of_others
from proxt2i.grpo_config import load_config
from proxt2i.images import to_uint8
from proxt2i.models.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[1]
FIRST = HELD_OUT_SEED + 30_000  # portraits whose captions are the prompts: proxt2i.evaluate's begin 20,000 earlier
PER_GROUP = 16
ODDS = (1, 1.25, 1.5, 2, 3, 4, 6, 10, 20, 1e3)  # of a right picture, in `by_choice`
KINDS = {"prox": [], "score": ["diffusion.objective=score", "diffusion.weight_power=0.75"]}
PLANS = {"prox": [], "score": ["rollout.plan=ddpm"]}


def launch(args, script: str, config: str, run_dir: Path, overrides: list[str]) -> Path:
    """The model folder of a run that is started, continued, or found finished. SystemExit with its status when it fails."""
    start = [sys.executable] if args.ranks == 1 else ["deepspeed", "--num_gpus", str(args.ranks), "--master_port", str(args.port)]
    if not (run_dir / "model").exists():
        code = subprocess.run([*start, f"proxt2i/{script}.py", "--deepspeed", "configs/zero2.json", "--config", f"configs/{config}.yaml", "--resume",
                               f"train.run_dir={run_dir}", *overrides], cwd=ROOT).returncode
        if code or not (run_dir / "model").exists():
            raise SystemExit(code or f"{run_dir} has no model: interrupted? the same command goes on")
    return run_dir / "model"


@torch.no_grad()
def draw(bundle, how, steps: int, captions: list[str], seeds: torch.Tensor) -> torch.Tensor:
    """Pictures, uint8 [B, 3, H, W], drawn as GRPO's rollouts are (how: its rollout section), but in `steps` steps."""
    settings = bundle.settings
    schedule = VPSchedule(settings.beta_min, settings.beta_max)
    if settings.objective == "score":
        plan = score_plan(how.plan, steps, schedule, settings.grid)
        times = plan.t
    else:
        plan = make_plan(how.plan, steps, schedule, settings.grid, extrapolation=0.0)
        times = plan.tau
    policy = make_policy(plan, guidance_scales(times, how.guidance, how.guidance_below))
    shape = (bundle.uvit.config.in_channels, *[bundle.uvit.config.sample_size] * 2)
    pictures, null_text = [], bundle.text([""])
    for rows in torch.arange(len(captions)).split(64):
        *_, (*_, x0) = policy.states(guided(bundle.uvit, bundle.text([captions[i] for i in rows.tolist()]), null_text), shape, seeds[rows])
        pictures.append(to_uint8(bundle.codec.decode(x0)).cpu())
    return torch.cat(pictures)


def by_choice(features: torch.Tensor, right: torch.Tensor, odds: float) -> tuple[float, float]:
    """(share right, variance within a prompt) of pictures taken with probability in proportion to `odds` where right, else 1: means over prompts.

    features: [prompts, n, F].  right: bool [prompts, n].  Weights w that sum to 1 give sum(w |x - mean|^2) / (1 - sum(w^2)), which has no bias.
    """
    w = torch.where(right, odds, 1.0).double()
    w /= w.sum(1, keepdim=True)
    squares = (features.double() - torch.einsum("pn,pnf->pf", w, features.double())[:, None]).square().sum(2)
    return (w * right).sum(1).mean().item(), ((w * squares).sum(1) / (1 - w.square().sum(1))).mean().item()


def measure(model: Path, how, steps: int, args, judge: Judge, drawings: dict) -> dict:
    """One line of the table, without its change; right: of every picture, whether all attributes are."""
    bundle = load_bundle(model)
    captions, metadata = drawings["captions"], drawings["metadata"]
    predicted, features = judge(draw(bundle, how, steps, captions, torch.arange(len(captions)) + 5_000_000))
    right, _ = right_attributes(predicted, metadata)
    groups = [i for i in range(args.diversity_prompts) for _ in range(PER_GROUP)]
    of_groups, varied = judge(draw(bundle, how, steps, [captions[i] for i in groups], torch.arange(len(groups)) + 6_000_000))
    good = right_attributes(of_groups, [metadata[i] for i in groups])[0].all(1)
    kept = [varied[rows][good[rows]] for rows in torch.arange(len(groups)).split(PER_GROUP)]
    shape = args.diversity_prompts, PER_GROUP
    choices = [by_choice(varied.reshape(*shape, -1), good.reshape(shape), odds) for odds in ODDS]
    of_right = [x.double().var(0).sum().item() for x in kept if len(x) > 1]
    return {"all_right": right.all(1).float().mean().item(), "accuracy": right.float().mean().item(), "right": right.all(1).int().tolist(),
            "fd": frechet_distance(features, drawings["features"]), "diversity": diversity(varied, args.diversity_prompts) / drawings["diversity"],
            "diversity_of_right": sum(of_right) / max(len(of_right), 1) / drawings["diversity"], "groups_with_right": len(of_right),
            "by_choice": [(share, variance / drawings["diversity"]) for share, variance in choices]}


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return (torch.tensor(values, dtype=torch.float64).std() / len(values) ** 0.5).item()


def table(rows: list[dict]) -> str:
    lines = ["| network, sampler | steps | | all eight right | change | attributes right | FD | diversity | by choice | of right pictures |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        change = f"{row['change']:+.3f} ± {row['change_error']:.3f}" if "change" in row else "–"
        chosen = f"{row['chosen']:.2f}" if "chosen" in row else "–"
        lines.append(f"| {row['kind']}, {row['plan']} | {row['steps']} | {row['when']} | {row['all_right']:.3f} ± {row['error']:.3f} | {change} "
                     f"| {row['accuracy']:.3f} | {row['fd']:.1f} | {row['diversity']:.2f} | {chosen} | {row['diversity_of_right']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=40_000, help="images of the pretraining of both (default: 40000)")
    parser.add_argument("--images", type=int, default=6_144, help="images of GRPO (default: 6144)")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 10])
    parser.add_argument("--prompts", type=int, default=1024, help="held-out prompts, one picture each (default: 1024)")
    parser.add_argument("--diversity-prompts", type=int, default=32, help=f"of them drawn {PER_GROUP} times (default: 32)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--guidance-before", type=float, metavar="SCALE", help="guidance of the models before GRPO (default: that of the rollouts)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--port", type=int, default=29533, help="of the launcher")
    parser.add_argument("--prox", type=Path, metavar="DIR", help="model folder of the proximal network; default: train it")
    parser.add_argument("--score", type=Path, metavar="DIR", help="model folder of the score network; default: train it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/grpo_quality"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of GRPO, for both networks")
    args = parser.parse_args()
    if args.diversity_prompts > args.prompts:
        parser.error("--diversity-prompts cannot exceed --prompts")
    for kind in KINDS:
        if getattr(args, kind) and not (getattr(args, kind) / "uvit").is_dir():
            parser.error(f"--{kind} {getattr(args, kind)}: no model folder (one with uvit/ in it, like RUN/model)")
    out = args.out.resolve()

    models = {}
    for kind in args.kinds:
        given = getattr(args, kind)
        before = given.resolve() if given else launch(args, "train", "demo", out / kind, [f"train.images={args.pretrain}", *KINDS[kind]])
        tuning = [f"model.init_from={before}", f"train.images={args.images}", *PLANS[kind], *args.overrides]
        models[kind] = {"before": before, "after": launch(args, "grpo", "grpo_portraits", out / f"{kind}-grpo", tuning)}

    _, captions, metadata = zip(*(make_portrait(FIRST + i, complete=True) for i in range(args.prompts)))
    judge, rows = Judge(), []
    varied = drawings_of(list(metadata[: args.diversity_prompts]), PER_GROUP)
    drawings = {"captions": list(captions), "metadata": list(metadata), "features": judge(drawings_of_others(args.prompts))[1],
                "diversity": diversity(judge(varied)[1], args.diversity_prompts)}
    for kind in args.kinds:
        how = load_config(out / f"{kind}-grpo" / "config.yaml").rollout
        hows = {"before": replace(how, guidance=how.guidance if args.guidance_before is None else args.guidance_before), "after": how}
        for steps in args.steps:
            pair = {}
            for when, model in models[kind].items():
                cell = out / "cells" / f"{kind}-{when}-{steps}-{hows[when].guidance:g}-{args.prompts}-{args.diversity_prompts}.json"
                if not cell.exists():
                    cell.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(cell, json.dumps(measure(model, hows[when], steps, args, judge, drawings)))
                pair[when] = json.loads(cell.read_text())
                rows.append({"kind": kind, "plan": how.plan, "guidance": hows[when].guidance, "steps": steps, "when": when, **pair[when], "error": error(pair[when]["right"])})
                print(table(rows[-1:]).splitlines()[-1], flush=True)
            changes = [after - before for before, after in zip(pair["before"]["right"], pair["after"]["right"])]
            rows[-1] |= {"change": sum(changes) / len(changes), "change_error": error(changes)}
            shares, variances = zip(*pair["before"]["by_choice"])
            rows[-1]["chosen"] = float(np.interp(shares[0] + rows[-1]["change"], shares, variances))
    for row in rows:
        del row["right"], row["by_choice"]
    results = {"command": f"python benchmarks/grpo_quality.py {' '.join(sys.argv[1:])}".strip(), "machine": machine(), "prompts": args.prompts, "rows": rows}
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    print(f"\n{table(rows)}-> {out}/results.json")


if __name__ == "__main__":
    main()
