"""Trains the judge of the portraits evaluation: a transformers ResNet with one soft-max per attribute.

It never sees the VAE, the CLIP or a generated image; its seed and architecture are its own. Noise, blur and brightness
augmentation make it tolerant of small reconstruction errors without making it blind to left-over noise.
Its pooled features (96 values) define the Fréchet distance of `proxt2i.evaluate`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from proxt2i.data.portraits import ATTRIBUTES, make_arrays
from proxt2i.embedded import ASSETS, HELD_OUT_SEED

JUDGE_SEED = 50_000_000  # its own portraits, disjoint from those that the models are trained on


def label_names() -> list[str]:
    return [f"{name}={value}" for name, values in ATTRIBUTES.items() for value in values]


def targets(metadata: list[dict]) -> torch.Tensor:
    """int64 [M, number of attributes]: the index of each attribute's value."""
    return torch.tensor([[ATTRIBUTES[n].index(m["attributes"][n]) for n in ATTRIBUTES] for m in metadata])


def stated(metadata: list[dict]) -> torch.Tensor:
    """bool [M, number of attributes]: does the caption state the attribute?"""
    return torch.tensor([[n in m["stated"] for n in ATTRIBUTES] for m in metadata])


def split_logits(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, sum of value counts] -> one [B, values] per attribute, in the order of `ATTRIBUTES`."""
    return logits.split([len(v) for v in ATTRIBUTES.values()], 1)


def build_judge():
    from transformers import ResNetConfig, ResNetForImageClassification

    names = label_names()
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1], layer_type="basic",
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
    )  # fmt: skip
    return ResNetForImageClassification(config)


def augment(x: torch.Tensor) -> torch.Tensor:
    """Noise of std up to 0.08, blur, brightness, and a shift of up to two pixels; x float32 [B, 3, H, W] in [-1, 1]."""
    x = x + torch.rand(len(x), 1, 1, 1) * 0.08 * torch.randn_like(x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, torch.rand(len(x), 1, 1, 1) * 0.8)
    dx, dy = torch.randint(-2, 3, (2,)).tolist()
    return x.roll((dy, dx), (2, 3)) + (torch.rand(len(x), 3, 1, 1) - 0.5) * 0.06


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "judge")
    parser.add_argument("--num-images", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    start = time.time()
    images, _, metadata = make_arrays(JUDGE_SEED, args.num_images)
    images, labels = torch.from_numpy(images), targets(metadata)
    judge = build_judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * i / args.steps)))
    bar = tqdm(range(args.steps), desc="judge", mininterval=5)
    for i in bar:
        index = torch.randint(len(images), (args.batch_size,))
        logits = split_logits(judge(augment(images[index].float() / 127.5 - 1)).logits)
        loss = sum(F.cross_entropy(z, labels[index, a]) for a, z in enumerate(logits)) / len(logits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")

    judge.eval()
    images, _, metadata = make_arrays(HELD_OUT_SEED, 2048)
    with torch.no_grad():
        logits = torch.cat([judge(x.float() / 127.5 - 1).logits for x in torch.from_numpy(images).split(128)])
    right = torch.stack([z.argmax(1) for z in split_logits(logits)], 1) == targets(metadata)
    judge.half().save_pretrained(args.out)
    recipe = {k: v for k, v in vars(args).items() if k != "out"} | {
        "parameters": sum(p.numel() for p in judge.parameters()), "held_out_accuracy": round(right.float().mean().item(), 5),
        "held_out_all_right": round(right.all(1).float().mean().item(), 5),
        "held_out_by_attribute": {n: round(right[:, a].float().mean().item(), 5) for a, n in enumerate(ATTRIBUTES)}, "seconds": round(time.time() - start),
    }  # fmt: skip
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe))


if __name__ == "__main__":
    main()
