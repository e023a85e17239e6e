"""Score picture files: what is each worth by which reward?

    python -m proxt2i.rewards samples/*.png --reward pickscore,portraits --set pickscore.path=portraits
    python -m proxt2i.rewards a.png b.png --prompt "a man with a beanie" --reward jpeg_compressibility
    python -m proxt2i.rewards --list

Pictures of proxt2i.sample carry their prompt; others need --prompt, one for all or one each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from .base import REWARDS, RewardError, add_arguments, load_reward, score, settings_of_arguments
from .weights import default_folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m proxt2i.rewards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="picture files")
    parser.add_argument("--prompt", action="append", default=[], help="what they were asked to show: once for all, or once for each in order")
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--list", action="store_true", help="what rewards there are, and whether their weights are found")
    args = parser.parse_args(argv)
    try:
        if args.list:
            list_rewards()
        else:
            run(args)
        return 0
    except (ValueError, OSError, RewardError) as error:
        print(f"proxt2i.rewards: error: {error}", file=sys.stderr)
        return 2


def list_rewards() -> None:
    for name, module in REWARDS.items():
        module = importlib.import_module(f".{module}", __package__)
        source = getattr(module, "SOURCE", None)
        if source is None:
            state = "needs a worker's URL" if name == "http" else "ready"
        else:
            folder = default_folder(getattr(module, "SHARED", name))
            missing = source.missing(folder, tokenizer=True)
            state = f"found in {folder}" if not missing else f"not found: {folder} lacks {', '.join(missing)}"
            state += "; with path=portraits: ready" if name.startswith("pickscore") else ""
        print(f"{name:<23}{state}\n{'':<23}{module.__doc__.splitlines()[0]}")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..pipeline import pick_device

    if not args.images:
        raise ValueError("no picture: name files, or --list to see what rewards there are")
    settings = settings_of_arguments(args)
    pictures, own_prompts = zip(*(read_picture(path) for path in args.images))
    prompts = prompts_of(args, own_prompts)
    device = pick_device(args.device)
    rewards = [load_reward(s, device) for s in settings]
    scores = {}
    for shape in dict.fromkeys(p.shape for p in pictures):  # pictures of one size are scored together
        rows = [i for i, p in enumerate(pictures) if p.shape == shape]
        for name, values in score(rewards, torch.stack([pictures[i] for i in rows]), [prompts[i] for i in rows]).items():
            scores.setdefault(name, {}).update(zip(rows, values.tolist()))
    names, width = list(scores), max(len(str(path)) for path in args.images)
    if not args.json:
        print(f"{'':<{width}}" + "".join(f"{name:>{max(12, len(name) + 2)}}" for name in names))
    for i, path in enumerate(args.images):
        if args.json:
            print(json.dumps({"image": str(path), "prompt": prompts[i], **{name: scores[name][i] for name in names}}))
        else:
            print(f"{str(path):<{width}}" + "".join(f"{scores[name][i]:>{max(12, len(name) + 2)}.4f}" for name in names))


def read_picture(path: Path):
    """float32 [3, H, W] in [0, 1], and the prompt that the file carries, or None. ValueError if it is no picture."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(path) as image:
            prompt = image.info.get("prompt")
            pixels = np.asarray(image.convert("RGB")).copy()
    except OSError as error:
        raise ValueError(f"{path} is not a readable picture: {error.strerror or error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, prompt if isinstance(prompt, str) else None


def prompts_of(args: argparse.Namespace, own: tuple) -> list[str]:
    if len(args.prompt) > 1 and len(args.prompt) != len(args.images):
        raise ValueError(f"{len(args.prompt)} --prompt for {len(args.images)} pictures: give one for all, or one each")
    prompts = list(args.prompt * len(args.images) if len(args.prompt) == 1 else args.prompt or own)
    for path, prompt in zip(args.images, prompts):
        if prompt is None:
            raise ValueError(f"{path} carries no prompt: give --prompt")
    return prompts


if __name__ == "__main__":
    sys.exit(main())
