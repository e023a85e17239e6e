"""The evaluation of a portraits model: does each picture show what its prompt says, and do the pictures look like drawings?

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

PER_GROUP = 16  # pictures of one prompt for the diversity figure


def held_out(num_prompts: int):
    """Held-out drawings of prompts that state everything: images uint8 [num_prompts, 3, 64, 64], captions, metadata."""
    from ..data.portraits import make_portrait
    from ..embedded import HELD_OUT_SEED

    images, captions, metadata = zip(*(make_portrait(HELD_OUT_SEED + 10_000 + i, complete=True) for i in range(num_prompts)))
    return _stack(images), list(captions), list(metadata)


def drawings_of(metadata: list[dict], copies: int):
    """`copies` other drawings of each prompt, one prompt's together: uint8 [len(metadata) * copies, 3, 64, 64]."""
    from ..data.portraits import draw_portrait

    return _stack([draw_portrait(m["attributes"], random.Random(m["seed"] * copies + j)) for m in metadata for j in range(copies)])


def drawings_of_others(num_images: int):
    """Held-out drawings of other people: uint8 [num_images, 3, 64, 64]."""
    from ..data.portraits import make_portrait
    from ..embedded import HELD_OUT_SEED

    return _stack([make_portrait(HELD_OUT_SEED + 5_000_000 + i)[0] for i in range(num_images)])


def through_codec(images, codec, device="cpu"):
    """What the VAE leaves of pictures, uint8 [M, 3, H, W] -> uint8 on the CPU."""
    import torch

    from ..images import to_uint8

    with torch.no_grad():
        return torch.cat([to_uint8(codec.decode(codec.encode(x.to(device).float() / 127.5 - 1))).cpu() for x in images.split(64)])


def _stack(pictures):
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)


def run(args: argparse.Namespace) -> list[dict]:
    """The rows of results.json. ValueError for wrong input, before anything is drawn."""
    from ..data.portraits import ATTRIBUTES
    from ..embedded import SHIPPED_MODEL
    from ..embedded.judge import Judge, diversity, frechet_distance, right_attributes
    from ..images import grid, save_png
    from ..models.bundle import load_bundle
    from ..pipeline import generate, guidance_of, pick_device, plan_of

    device = pick_device(args.device)
    bundle = load_bundle(args.model or SHIPPED_MODEL, device=device)
    plans = args.plan.split(",") if args.plan else [bundle.settings.plan]
    for plan in plans:
        for steps in args.steps:
            plan_of(bundle.settings, steps, plan)  # an invalid pair is refused before anything is drawn
    guidances = [guidance_of(bundle.settings, scale, args.guidance_below) for scale in args.guidance or [None]]
    judge = Judge(device=device)
    args.out.mkdir(parents=True, exist_ok=True)

    drawings, captions, metadata = held_out(args.num_prompts)
    real_predicted, real_features = judge(drawings)
    varied_features = judge(drawings_of(metadata[: args.diversity_prompts], PER_GROUP))[1]
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
    decoded = through_codec(drawings, bundle.codec, device)
    decoded_predicted, decoded_features = judge(decoded)
    rows = [row("drawings", drawings, real_features, real_predicted, varied_features), row("drawings through the VAE", decoded, decoded_features, decoded_predicted, None)]
    rows[0]["frechet_distance"] = frechet_distance(judge(drawings_of_others(args.num_prompts))[1], real_features)  # another draw of as many

    header = f"{'sampler':<26}{'steps':>6}{'guidance':>9}{'accuracy':>10}{'all right':>10}{'FD':>9}{'diversity':>10}{'images/s':>10}"
    print(header)
    for r in rows:
        print_row(r)
    for plan in plans:
        for steps in args.steps:
            for scale, below in guidances:
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
