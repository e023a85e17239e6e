"""Trains the tiny CLIP of the embedded default: the text encoder of the portraits model, and its image-text scorer.

A transformers CLIPModel (64 px, patch 8) and a CLIPTokenizer whose BPE is learned from the captions. Each batch holds
every portrait twice, the second time with one attribute changed, so that the contrastive loss has to hear every word.
The contrastive loss alone learns the rarer words last (after 1,200 steps it still did not hear "glasses"), so both
towers also learn to name the attributes through two linear heads, which are thrown away afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from proxt2i.data.portraits import ATTRIBUTES, draw_attributes, draw_portrait, write_caption
from proxt2i.embedded import ASSETS, HELD_OUT_SEED, TRAIN_SEED
from proxt2i.embedded.train_judge import split_logits, stated, targets

LENGTH = 24  # text positions, start and end tokens included


def train_tokenizer(captions: list[str], vocab_size: int = 512):
    """A CLIPTokenizer: byte-level BPE with `</w>`, exactly CLIP's normaliser and pre-tokeniser, merges from `captions`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    template = CLIPTokenizer()._tokenizer  # for its normaliser and pre-tokeniser
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = template.normalizer, template.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    tokens = letters + [c + "</w>" for c in letters]
    tokens += [t for t in model["vocab"] if t not in set(tokens)] + ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges, model_max_length=LENGTH)


def build_clip(tokenizer):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    shared = dict(num_hidden_layers=3, num_attention_heads=4, hidden_act="gelu")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, max_position_embeddings=LENGTH, projection_dim=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shared,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=96, intermediate_size=384, image_size=64, patch_size=8, projection_dim=64, **shared)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def draw_pairs(first_seed: int, count: int, complete: bool = False):
    """`count` portraits, then the same people with one attribute changed: images uint8 [2·count, 3, 64, 64], captions,
    metadata {"attributes", "stated"}."""
    import numpy as np

    images, captions, metadata = np.empty((2, count, 3, 64, 64), np.uint8), [[], []], [[], []]
    for i in range(count):
        rng = random.Random(first_seed + i)
        attributes = draw_attributes(rng)
        name = rng.choice(list(ATTRIBUTES))
        changed = attributes | {name: rng.choice([v for v in ATTRIBUTES[name] if v != attributes[name]])}
        for j, a in enumerate((attributes, changed)):
            images[j, i] = np.asarray(draw_portrait(a, rng)).transpose(2, 0, 1)
            caption, told = write_caption(a, rng, complete)
            captions[j].append(caption)
            metadata[j].append({"attributes": a, "stated": told})
    return torch.from_numpy(images.reshape(2 * count, 3, 64, 64)), captions[0] + captions[1], metadata[0] + metadata[1]


class Heads(torch.nn.Module):
    """Linear classifiers of every attribute on the towers' embeddings [B, 64]; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        sizes = [len(values) for values in ATTRIBUTES.values()]
        self.text_sizes = [1 + n for n in sizes]  # the first: not stated
        self.vision = torch.nn.Linear(width, sum(sizes))
        self.text = torch.nn.Linear(width, sum(self.text_sizes))

    def loss(self, vision: torch.Tensor, text: torch.Tensor, drawn: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """drawn: int64 [B, attributes], the index of each value. told: 0 where the caption is silent, else 1 + index."""
        logits = [*split_logits(self.vision(vision)), *self.text(text).split(self.text_sizes, 1)]
        losses = [F.cross_entropy(z, label) for z, label in zip(logits, torch.cat([drawn, told], 1).unbind(1), strict=True)]
        return sum(losses) / len(losses)


def tokenize(tokenizer, captions: list[str]) -> dict[str, torch.Tensor]:
    return dict(tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"))


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


@torch.no_grad()
def retrieval(clip, tokenizer, count: int = 2048) -> dict:
    """Held-out figures: recall at 1 among 512, and how often the right caption beats the one with one attribute changed."""
    images, captions, metadata = draw_pairs(HELD_OUT_SEED, count, complete=True)
    out = [clip(pixel_values=pixels(images[i]), **{k: v[i] for k, v in tokenize(tokenizer, captions).items()}) for i in torch.arange(2 * count).split(128)]
    image = torch.cat([o.image_embeds for o in out])
    text = torch.cat([o.text_embeds for o in out])
    similarity = image[:512] @ text[:512].T
    truth = torch.arange(512)
    right = ((image * text).sum(1) > (image * text.roll(count, 0)).sum(1)).float()
    drawn = targets(metadata)
    which = (drawn != drawn.roll(count, 0)).float()  # one 1 in each row
    return {
        "image_to_text_recall_at_1": (similarity.argmax(1) == truth).float().mean().item(),
        "text_to_image_recall_at_1": (similarity.argmax(0) == truth).float().mean().item(),
        "one_attribute_changed_accuracy": right.mean().item(),
        "by_attribute": dict(zip(ATTRIBUTES, ((which * right[:, None]).sum(0) / which.sum(0)).tolist())),
    }


def descent(clip, parameters: list[torch.nn.Parameter], lr: float, steps: int):
    """A function that takes a step of AdamW down the loss it is given: 100 steps of warm-up, then a cosine to 0; the logit scale stays below 100."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * i / steps)))

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(0, math.log(100))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets clip/, text_encoder/ and tokenizer/")
    parser.add_argument("--num-images", type=int, default=10_000, help="portraits; each is drawn twice")
    parser.add_argument("--steps", type=int, default=1_200)
    parser.add_argument("--batch-size", type=int, default=64, help="portraits a step; twice as many pictures")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    from transformers import CLIPTextModel

    torch.manual_seed(args.seed)
    start = time.time()
    images, captions, metadata = draw_pairs(TRAIN_SEED, args.num_images)
    drawn = targets(metadata)
    told = (1 + drawn) * stated(metadata)
    tokenizer = train_tokenizer(captions)
    tokens = tokenize(tokenizer, captions)
    clip = build_clip(tokenizer)
    heads = Heads(clip.config.projection_dim)
    parameters = [*clip.parameters(), *heads.parameters()]
    descend = descent(clip, parameters, args.lr, args.steps)
    bar = tqdm(range(args.steps), desc="CLIP", mininterval=5)
    for i in bar:
        index = torch.randint(args.num_images, (args.batch_size,))
        index = torch.cat([index, index + args.num_images])
        out = clip(pixel_values=pixels(images[index]), **{k: v[index] for k, v in tokens.items()})
        truth = torch.arange(len(index))
        loss = (F.cross_entropy(out.logits_per_image, truth) + F.cross_entropy(out.logits_per_text, truth)) / 2
        scale = clip.config.projection_dim**0.5  # the embeddings have length 1
        loss = loss + heads.loss(scale * out.image_embeds, scale * out.text_embeds, drawn[index], told[index])
        descend(loss)
        if i % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if i % 400 == 399:
            tqdm.write(f"step {i + 1}: {retrieval(clip, tokenizer)}")

    clip.half().save_pretrained(args.out / "clip")
    tokenizer.save_pretrained(args.out / "tokenizer")
    CLIPTextModel.from_pretrained(args.out / "clip").half().save_pretrained(args.out / "text_encoder")
    figures = json.loads(json.dumps(retrieval(load_clip(args.out / "clip"), tokenizer)), parse_float=lambda s: round(float(s), 4))
    recipe = {k: v for k, v in vars(args).items() if k != "out"}
    recipe |= {"parameters": sum(p.numel() for p in clip.parameters()), "held_out": figures, "seconds": round(time.time() - start)}
    (args.out / "clip" / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe))


def load_clip(folder: Path):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
