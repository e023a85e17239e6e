"""Trains the CLIP's vision tower further, on what `pickscore_contrast` asks of it: which of the captions that differ in one attribute is it?

The text tower stays as it is (it is the U-ViT's text encoder). Half of the pictures come through the VAE, with errors of every size in their
latents, and all are blurred and made noisy (the judge's augmentation): a reward has to read what a half-trained model draws, and to be sure of
what is drawn well, so that a right picture has nothing left to gain by looking like all others.
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

from proxt2i.data.portraits import ATTRIBUTES
from proxt2i.embedded import ASSETS, HELD_OUT_SEED, TRAIN_SEED
from proxt2i.embedded.train_clip import descent, draw_pairs, load_clip, pixels, retrieval
from proxt2i.embedded.train_judge import augment, split_logits, targets
from proxt2i.models.vae import LatentCodec
from proxt2i.rewards.clip import embed_images, embed_prompts, load_clip_tokenizer
from proxt2i.rewards.contrast import PickScoreContrast, changed_captions
from proxt2i.rewards.pickscore import HALF, PickScore


def embed_choices(clip, tokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each caption the embeddings of itself and of all with one attribute changed, float32 [B, most, projection], and which exist, bool [B, most]."""
    texts = [[caption, *changed_captions(caption)] for caption in captions]
    flat = [text for choices in texts for text in choices]
    rows = torch.cat([embed_prompts(clip, tokenizer, flat[i:i + 1024]) for i in range(0, len(flat), 1024)])
    counts = torch.tensor([len(choices) for choices in texts])
    exists = torch.arange(int(counts.max())) < counts[:, None]
    return torch.zeros(*exists.shape, rows.shape[1]).masked_scatter_(exists[..., None], rows), exists


def spoil(latents: torch.Tensor, most: float) -> torch.Tensor:
    """Latents [B, C, h, w] with errors of a standard deviation of 0 to `most`, half of them in the single elements, half smooth."""
    smooth = F.interpolate(torch.randn(*latents.shape[:2], 4, 4), size=latents.shape[2:], mode="bilinear")
    return latents + torch.rand(len(latents), 1, 1, 1) * most * (0.6 * torch.randn_like(latents) + 0.8 * smooth)


def contrast(scale: torch.Tensor, pictures: torch.Tensor, choices: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """log-probability of each picture's caption among its choices, [B]: `pickscore_contrast`."""
    logits = scale * torch.einsum("bnd,bd->bn", choices, pictures)
    return logits.masked_fill(~exists, -math.inf).log_softmax(1)[:, 0]


@torch.no_grad()
def held_out(clip, tokenizer, codec: LatentCodec, noise: float, count: int = 512) -> dict:
    """Mean contrast of held-out drawings, and of the same through the VAE with errors in the latents."""
    torch.manual_seed(0)
    images, captions, _ = draw_pairs(HELD_OUT_SEED + 1_000_000, count, complete=True)
    reward = PickScoreContrast(PickScore(clip, tokenizer, HALF, HALF))
    drawings = [pixels(part) for part in images.split(64)]
    spoiled = [codec.decode(spoil(codec.encode(part), noise)) for part in drawings]
    means = [reward.differentiable((torch.cat(parts) + 1) / 2, captions).mean().item() for parts in (drawings, spoiled)]
    return {"contrast_of_drawings": means[0], "contrast_of_spoiled": means[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "clip", help="folder that gets the model; the model trained further is the embedded one")
    parser.add_argument("--num-images", type=int, default=10_000, help="portraits; each is drawn twice, as in train_clip")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=64, help="portraits a step; twice as many pictures")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=0.5, help="largest standard deviation of errors in latents (whose own is 1)")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    start = time.time()
    clip, tokenizer, codec = load_clip(ASSETS / "clip"), load_clip_tokenizer(ASSETS / "tokenizer"), LatentCodec.from_pretrained(ASSETS)
    before = held_out(clip, tokenizer, codec, args.noise)
    images, captions, metadata = draw_pairs(TRAIN_SEED, args.num_images)
    drawn = targets(metadata)
    with torch.no_grad():
        latents = torch.cat([codec.encode(pixels(part)) for part in images.split(64)])
    choices, exists = embed_choices(clip, tokenizer, captions)
    head = torch.nn.Linear(clip.config.projection_dim, sum(len(values) for values in ATTRIBUTES.values()))  # thrown away afterwards
    clip.requires_grad_(False)
    parameters = [p.requires_grad_() for p in (*clip.vision_model.parameters(), *clip.visual_projection.parameters(), clip.logit_scale, *head.parameters())]
    descend = descent(clip, parameters, args.lr, args.steps)
    bar, mean = tqdm(range(args.steps), desc="CLIP, vision", mininterval=5), None
    for i in bar:
        rows = torch.randint(args.num_images, (args.batch_size,))
        rows = torch.cat([rows, rows + args.num_images])
        x, decoded = pixels(images[rows]), torch.randperm(len(rows))[:args.batch_size]
        with torch.no_grad():
            x[decoded] = codec.decode(spoil(latents[rows[decoded]], args.noise)).clamp(-1, 1)
        embedded, scale, truth = embed_images(clip, augment(x)), clip.logit_scale.exp(), torch.arange(len(rows))
        value = contrast(scale, embedded, choices[rows], exists[rows]).mean()
        similarity = scale * embedded @ choices[rows, 0].T
        loss = (F.cross_entropy(similarity, truth) + F.cross_entropy(similarity.T, truth)) / 2 - value
        attributes = split_logits(head(clip.config.projection_dim**0.5 * embedded))
        loss = loss + sum(F.cross_entropy(z, label) for z, label in zip(attributes, drawn[rows].unbind(1), strict=True)) / len(ATTRIBUTES)
        descend(loss)
        mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
        if i % 50 == 0:
            bar.set_postfix(contrast=f"{mean:.3f}")

    recipe = json.loads((ASSETS / "clip" / "recipe.json").read_text())
    clip.half().save_pretrained(args.out)
    clip = load_clip(args.out)
    figures = {"held_out": retrieval(clip, tokenizer),
               "vision": {k: v for k, v in vars(args).items() if k != "out"} | {"before": before, "after": held_out(clip, tokenizer, codec, args.noise)}}
    recipe |= json.loads(json.dumps(figures), parse_float=lambda s: round(float(s), 4))
    recipe["vision"]["seconds"] = round(time.time() - start)
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe))


if __name__ == "__main__":
    main()
