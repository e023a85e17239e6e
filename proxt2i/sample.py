"""Draw pictures from prompts: python -m proxt2i.sample "a smiling woman with long red hair and glasses" """

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

EXAMPLES = """\
examples:
  python -m proxt2i.sample "a smiling woman with long red hair and glasses"
  python -m proxt2i.sample "a man with a beanie" "a lady with a brimmed hat" --num-images 6 --steps 6 --guidance 2
  python -m proxt2i.sample --prompts prompts.txt --out pictures --seed 100
  python -m proxt2i.sample "a man with sunglasses" --model runs/portraits/model --plan hybrid
  python -m proxt2i.sample "a woman with a beanie" --model runs/faces/model --size 320x192 --dtype bf16

Without --model the small portraits model that ships with the package is used: 64x64 drawn people, described by person
(woman, man), skin (fair, tan, dark skinned), hair (black, brown, blond, red, gray; short, long, curly, in a bun),
expression (smiling, serious, surprised), glasses or sunglasses, hat (beanie, brimmed hat) and background (blue, green,
yellow, pink, white). Image i of every prompt uses seed SEED + i; the same seed and settings give the same picture.
"""

SHIPPED_NAME = "portraits (shipped)"  # what PNGs call the shipped model


def size(text: str) -> tuple[int, int]:
    """"320x192" -> (320, 192)."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: give HEIGHTxWIDTH in pixels, like 320x192")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m proxt2i.sample", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help="one or several prompts, each in quotes")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder, e.g. RUN/model of a training run (default: the shipped portraits model)")
    parser.add_argument("--steps", type=int, help="sampling steps = network calls per picture (default: the model's, 8); a network "
                        "is good at the numbers it was trained for, the shipped one at 4 to 10")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 switches guidance off (default: the model's)")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from, for every prompt (default: the empty caption)")
    parser.add_argument("--guidance-below", type=float, metavar="T", help="guide only steps with the noise of a time up to T: 1 all, 0 the last one; "
                        "fewer guided steps are faster and keep more variety (default: the model's)")
    parser.add_argument("--plan", help="relaxed, hybrid (as published), backward, variance_preserving or ode (default: the model's)")
    parser.add_argument("--size", type=size, metavar="HEIGHTxWIDTH", help="size of the pictures in pixels, e.g. 320x192; a network is good at the "
                        "shapes it was trained on (default: the model's own square)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture of every prompt (default: 0)")
    parser.add_argument("--num-images", type=int, default=4, metavar="M", help="pictures per prompt (default: 4)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures sampled together (default: 64)")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="folder for the PNGs and grid.png (default: samples)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the U-ViT and text encoders; bf16 is faster on GPUs and on CPUs "
                        "that multiply it (AVX512-BF16, AMX), fp16 on GPUs; pictures differ in small details (default: fp32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    return parser.parse_args(argv)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file. ValueError names what is empty or missing."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise ValueError(f"--prompts {args.prompts}: no such file; give a text file with one prompt a line")
        try:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {args.prompts}: not UTF-8 text ({error})") from None
        prompts += [line for line in lines if line.strip()]
        if not any(line.strip() for line in lines):
            raise ValueError(f"--prompts {args.prompts}: the file holds no prompt")
    if not prompts:
        raise ValueError('no prompt: type one in quotes, or give --prompts FILE; for example python -m proxt2i.sample "a smiling woman"')
    if not all(p.strip() for p in prompts):
        raise ValueError("a prompt is empty: describe a picture, or leave that prompt out")
    return [p.strip() for p in prompts]


def check(args: argparse.Namespace) -> None:
    for flag, value in (("--num-images", args.num_images), ("--batch-size", args.batch_size), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if not -(2**63) <= args.seed < 2**63 - args.num_images:
        raise ValueError(f"--seed {args.seed}: must fit in 64 bits")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file; name a folder")


def slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"


def png_settings(plan, guidance: float, below: float, model: str, negative: str = "") -> dict:
    """What a picture's PNG says of the sampling, beside its prompt and seed."""
    settings = {"steps": plan.num_steps, "guidance_scale": guidance, "guidance_below": below, "plan": plan.name, "model": model}
    return {**settings, "negative_prompt": negative} if negative else settings


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        prompts = read_prompts(args)
        check(args)
        return run(args, prompts)
    except (ValueError, OSError) as error:
        print(f"proxt2i.sample: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, prompts: list[str]) -> int:
    from .embedded import SHIPPED_MODEL
    from .images import grid, save_png, to_pil
    from .models.bundle import load_bundle
    from .pipeline import generate, guidance_of, latent_size, pick_device, plan_of
    from .rewards.base import DTYPES

    device = pick_device(args.device)
    bundle = load_bundle(args.model or SHIPPED_MODEL, device=device, dtype=DTYPES[args.dtype])
    plan = plan_of(bundle.settings, args.steps, args.plan)
    guidance, below = guidance_of(bundle.settings, args.guidance, args.guidance_below)
    latent_size(bundle, args.size)  # refused before the folder is made
    negative = (args.negative_prompt or "").strip()
    bundle.text.warn_unheard([*prompts, negative])
    args.out.mkdir(parents=True, exist_ok=True)

    seeds = [args.seed + i for i in range(args.num_images)]
    start = time.perf_counter()
    images = generate(
        bundle, [p for p in prompts for _ in seeds], seeds * len(prompts), negative_prompts=[negative] * len(prompts) * len(seeds) if negative else None,
        num_steps=plan.num_steps, guidance_scale=guidance, guidance_below=below, plan=plan.name, size=args.size, batch_size=args.batch_size, progress=sys.stderr.isatty(),
    )  # fmt: skip
    seconds = time.perf_counter() - start

    common = png_settings(plan, guidance, below, str(args.model or SHIPPED_NAME), negative) | ({"dtype": args.dtype} if args.dtype != "fp32" else {})
    for j, prompt in enumerate(prompts):
        for i, seed in enumerate(seeds):
            path = args.out / f"{j:03d}-{slug(prompt)}-seed{seed}.png"
            save_png(to_pil(images[j * len(seeds) + i]), path, {"prompt": prompt, "seed": seed, **common})
    sheet = save_png(grid(images, args.num_images, prompts), args.out / "grid.png", common)
    print(f"{len(images)} images in {seconds:.2f} s ({plan.name} plan, {plan.num_steps} steps, guidance {guidance:g}) -> {args.out}/, grid: {sheet}")
    return 0


if __name__ == "__main__":
    from proxt2i.entry import keep_freed_memory

    keep_freed_memory()
    sys.exit(main())
