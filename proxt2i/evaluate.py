"""Measure a portraits model: does each picture show what its prompt says, and do the pictures look like drawings?

    python -m proxt2i.evaluate --model runs/portraits/model --steps 4,8 --guidance 1,2

Prompts are held-out captions that state all eight attributes. For every (plan, steps, guidance) it prints
  accuracy    share of attributes that the judge, an independently trained classifier, finds as asked
  all right   share of pictures with every attribute as asked
  FD          Fréchet distance in the judge's features to held-out drawings (lower is better; `drawings` row: the floor)
  diversity   within-prompt variance of those features, relative to drawings of the same prompts (1 = as varied)
and writes results.json and a grid of pictures per row.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    def numbers(kind):
        def parse(text: str) -> list:
            try:
                return [kind(part) for part in text.split(",")]
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r}: give {kind.__name__} values separated by commas, like 4,8") from None

        return parse

    parser = argparse.ArgumentParser("python -m proxt2i.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder (default: the shipped portraits model)")
    parser.add_argument("--plan", default=None, help="plans, separated by commas (default: the model's)")
    parser.add_argument("--steps", type=numbers(int), default=[8], help="step counts, separated by commas (default: 8)")
    parser.add_argument("--guidance", type=numbers(float), help="guidance scales, separated by commas (default: the model's)")
    parser.add_argument("--guidance-below", type=float, metavar="T", help="guide only steps with the noise of a time up to T, 1 all, 0 the last (default: the model's)")
    parser.add_argument("--num-prompts", type=int, default=1024, help="pictures for accuracy and FD, one a prompt (default: 1024)")
    parser.add_argument("--diversity-prompts", type=int, default=32, help="prompts that are drawn 16 times each (default: 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR")
    return parser.parse_args(argv)


PER_GROUP = 16  # pictures of one prompt for the diversity figure


def references(num_prompts: int, groups: int):
    """Held-out drawings: images, captions, metadata of `num_prompts` prompts; PER_GROUP drawings for each of the first `groups`
    prompts; and `num_prompts` drawings of other people."""
    import numpy as np
    import torch

    from .data.portraits import draw_portrait, make_portrait
    from .embedded import HELD_OUT_SEED

    def tensor(pictures):
        return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)

    drawn = [make_portrait(HELD_OUT_SEED + 10_000 + i, complete=True) for i in range(num_prompts)]
    images, captions, metadata = zip(*drawn)
    varied = [
        draw_portrait(m["attributes"], random.Random(m["seed"] * PER_GROUP + j)) for m in metadata[:groups] for j in range(PER_GROUP)
    ]
    others = [make_portrait(HELD_OUT_SEED + 5_000_000 + i)[0] for i in range(num_prompts)]
    return tensor(images), list(captions), list(metadata), tensor(varied), tensor(others)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.num_prompts < 2 or not 1 <= args.diversity_prompts <= args.num_prompts:
            raise ValueError("--num-prompts must be at least 2 and --diversity-prompts between 1 and --num-prompts")
        run(args)
        return 0
    except (ValueError, OSError) as error:
        print(f"proxt2i.evaluate: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> list[dict]:
    import torch

    from .data.portraits import ATTRIBUTES
    from .embedded import SHIPPED_MODEL
    from .embedded.judge import Judge, diversity, frechet_distance, right_attributes
    from .images import grid, save_png
    from .models.bundle import load_bundle
    from .pipeline import check_guidance, check_guidance_below, generate, pick_device, plan_of

    device = pick_device(args.device)
    bundle = load_bundle(args.model or SHIPPED_MODEL, device=device)
    plans = args.plan.split(",") if args.plan else [bundle.settings.plan]
    for plan in plans:
        for steps in args.steps:
            plan_of(bundle.settings, steps, plan)  # an invalid pair is refused before anything is drawn
    scales = [check_guidance(scale) for scale in args.guidance or [bundle.settings.guidance_scale]]
    below = check_guidance_below(bundle.settings.guidance_below if args.guidance_below is None else args.guidance_below)
    judge = Judge(device=device)
    args.out.mkdir(parents=True, exist_ok=True)

    drawings, captions, metadata, varied, others = references(args.num_prompts, args.diversity_prompts)
    real_predicted, real_features = judge(drawings)
    varied_features = judge(varied)[1]
    real_diversity = diversity(varied_features, args.diversity_prompts)
    seeds = [args.seed + i for i in range(len(captions))]
    group_captions = [c for c in captions[: args.diversity_prompts] for _ in range(PER_GROUP)]
    group_seeds = [args.seed + 1_000_000 + i for i in range(len(group_captions))]

    def row(name: str, images, features, predicted, group_features, **more) -> dict:
        right, stated = right_attributes(predicted, metadata)
        return {
            "sampler": name, **more, "accuracy": right[stated].float().mean().item(), "all_right": (right | ~stated).all(1).float().mean().item(),
            "frechet_distance": frechet_distance(features, real_features), "diversity": None if group_features is None else diversity(group_features, args.diversity_prompts) / real_diversity,
            "by_attribute": {n: right[:, a].float().mean().item() for a, n in enumerate(ATTRIBUTES)},
        }  # fmt: skip

    # what the judge and the VAE leave of the drawings themselves: no sampler can be expected to do better
    with torch.no_grad():
        decoded = torch.cat([bundle.codec.decode(bundle.codec.encode(x.to(device).float() / 127.5 - 1)).cpu() for x in drawings.split(64)])
        decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    decoded_predicted, decoded_features = judge(decoded)
    rows = [row("drawings", drawings, real_features, real_predicted, varied_features), row("drawings through the VAE", decoded, decoded_features, decoded_predicted, None)]
    rows[0]["frechet_distance"] = frechet_distance(judge(others)[1], real_features)  # another draw of as many

    header = f"{'sampler':<26}{'steps':>6}{'guidance':>9}{'accuracy':>10}{'all right':>10}{'FD':>9}{'diversity':>10}{'images/s':>10}"
    print(header)
    for r in rows:
        print_row(r)
    for plan in plans:
        for steps in args.steps:
            for scale in scales:
                options = dict(num_steps=steps, guidance_scale=scale, guidance_below=below, plan=plan, batch_size=args.batch_size, progress=sys.stderr.isatty())
                start = time.perf_counter()
                images = generate(bundle, captions, seeds, **options)
                rate = len(images) / (time.perf_counter() - start)
                predicted, features = judge(images)
                group_features = judge(generate(bundle, group_captions, group_seeds, **options))[1]
                rows.append(row(plan, images, features, predicted, group_features, steps=steps, guidance=scale, guidance_below=below, images_per_s=rate))
                print_row(rows[-1])
                name = f"{plan}-steps{steps}-guidance{scale:g}.png"
                save_png(grid(images[:24], 6), args.out / name, {"plan": plan, "steps": steps, "guidance_scale": scale, "guidance_below": below})
    results = {"model": str(args.model or "shipped"), "num_prompts": args.num_prompts, "seed": args.seed, "device": str(device), "rows": rows}
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {args.out}/results.json and the grids beside it")
    return rows


def print_row(row: dict) -> None:
    def cell(key: str, form: str, width: int) -> str:
        return format(row[key], form).rjust(width) if row.get(key) is not None else "-".rjust(width)

    print(
        f"{row['sampler']:<26}" + cell("steps", "d", 6) + cell("guidance", "g", 9) + cell("accuracy", ".4f", 10) + cell("all_right", ".4f", 10)
        + cell("frechet_distance", ".3f", 9) + cell("diversity", ".3f", 10) + cell("images_per_s", ".1f", 10), flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
