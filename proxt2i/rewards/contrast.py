"""Does PickScore's CLIP prefer the prompt to prompts that say something else? The log-probability of the prompt among itself and its negatives.

With s(p) = exp(logit scale) * cosine of the picture and prompt p, PickScore's own score,

    reward = log( e^s(prompt) / (e^s(prompt) + sum over negatives e^s(negative)) )            at most 0

so what moves s of all of them alike (the picture's style, pose, shades) cancels, and a picture that is right beyond doubt has nothing left to
gain: what remains is what the words say. Ours; the softmax over texts is CLIP's.
Negatives: metadata {"negatives": [prompts]}; without them the prompt is read as a portrait's caption, and every stated attribute is changed
to each of its other values.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from ..data.portraits import ATTRIBUTES, WORDS
from .base import RewardSettings
from .clip import embed_images, embed_prompts
from .pickscore import PickScore
from .pickscore import load as load_pickscore
from .portraits import read_caption
from .preprocess import float_clip_pixels

SHARED = "pickscore"  # the reward whose weights these are
KEPT = 1_024  # prompts whose embeddings, and those of their negatives, are kept at most


class PickScoreContrast:
    """metadata: {"negatives": [prompts]} of each image, or None for captions of portraits."""

    def __init__(self, pickscore: PickScore):
        self.of = pickscore
        self.embedded: dict[tuple[str, ...], Tensor] = {}  # (prompt, the negatives it came with) -> prompt and negatives [1 + n, projection]

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(self.of.pixels(images), prompts, metadata).cpu()

    def differentiable(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(self.of.pixels(images, float_clip_pixels), prompts, metadata)

    def _score(self, pixels: Tensor, prompts: list[str], metadata: list[dict | None] | None) -> Tensor:
        asked = [(prompt, *((about or {}).get("negatives") or ())) for prompt, about in zip(prompts, metadata or [None] * len(prompts), strict=True)]
        scale = self.of.clip.logit_scale.float().exp()
        return torch.stack([(scale * (texts @ picture)).log_softmax(0)[0] for texts, picture in zip(self._texts(asked), embed_images(self.of.clip, pixels))])

    @torch.inference_mode(False)  # kept ones serve the gradient too
    def _texts(self, asked: list[tuple[str, ...]]) -> list[Tensor]:
        """Embeddings of each prompt and its negatives. Kept for the batches to come: a prompt has many pictures, and an update asks again."""
        if len(self.embedded) > KEPT:
            self.embedded.clear()
        new = {one: one if len(one) > 1 else (*one, *changed_captions(*one)) for one in dict.fromkeys(asked) if one not in self.embedded}
        if new:
            found = embed_prompts(self.of.clip, self.of.tokenizer, [text for texts in new.values() for text in texts])
            self.embedded |= zip(new, found.split([len(texts) for texts in new.values()]))
        return [self.embedded[one] for one in asked]


def load(settings: RewardSettings, device: torch.device) -> PickScoreContrast:
    return PickScoreContrast(load_pickscore(replace(settings, name=SHARED), device))


def changed_captions(caption: str) -> list[str]:
    """The caption of a portrait with one stated attribute changed, for every attribute that it states and each other value of it.
    ValueError if it states none."""
    stated = read_caption(caption)["attributes"]
    return [_changed(caption, name, value, other) for name, value in stated.items() for other in ATTRIBUTES[name] if other != value]


def _changed(caption: str, name: str, value: str, other: str) -> str:
    if name == "hair_style":
        plain = caption.replace(" in a bun", "") if value == "bun" else re.sub(rf"\b{value} ", "", caption, count=1)
        color = "|".join(word for words in WORDS["hair_color"].values() for word in words)
        hair = re.compile(rf"(?:(?:{color}) )?hair\b")
        return hair.sub(lambda m: f"{m[0]} in a bun" if other == "bun" else f"{other} {m[0]}", plain, count=1)
    said = "|".join(sorted(map(re.escape, WORDS[name][value]), key=len, reverse=True))
    text = re.sub(rf"\b(?:{said})\b", WORDS[name][other][0], caption, count=1)
    return re.sub(r"^((?:portrait of |photo of )?)an? (.)", _article, text)


def _article(match: re.Match) -> str:
    return f"{match[1]}a{'n' if match[2] in 'aeiou' else ''} {match[2]}"
