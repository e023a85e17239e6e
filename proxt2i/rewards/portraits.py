"""The judge of portraits as a reward: the share of stated attributes that the picture shows. Its weights ship with the package."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..data.portraits import ATTRIBUTES, WORDS
from ..embedded.judge import Judge, right_attributes
from ..embedded.train_judge import split_logits, stated, targets
from .base import RewardSettings
from .preprocess import float_resize, pillow_resize, quantise
from .weights import quiet_loading

SIZE = 64  # pixels that the judge was trained at


class PortraitAttributes:
    """metadata: {"attributes": {name: value}, "stated": [names]} as portraits carry it; where it is missing, the caption is read."""

    def __init__(self, device: torch.device):
        with quiet_loading():
            self.judge = Judge(device=device)
        self.judge.model.requires_grad_(False)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        right, said = right_attributes(self.judge(pillow_resize(quantise(images), SIZE))[0], _truth(prompts, metadata))
        return (right & said).sum(1) / said.sum(1)

    def differentiable(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        """The share that the judge expects to be right: the mean of its probabilities of what is stated."""
        truth = _truth(prompts, metadata)
        logits = self.judge.model(float_resize(images, SIZE).to(self.judge.device) * 2 - 1).logits
        wanted, said = targets(truth).to(logits.device), stated(truth).to(logits.device)
        right = torch.stack([z.softmax(1).gather(1, wanted[:, [a]]).squeeze(1) for a, z in enumerate(split_logits(logits))], 1)
        return (right * said).sum(1) / said.sum(1)


def load(settings: RewardSettings, device: torch.device) -> PortraitAttributes:
    return PortraitAttributes(device)


def _truth(prompts: list[str], metadata: list[dict | None] | None) -> list[dict]:
    return [_complete(m if m and "attributes" in m else read_caption(p)) for p, m in zip(prompts, metadata or [None] * len(prompts), strict=True)]


def read_caption(caption: str) -> dict:
    """{"attributes", "stated"} of what a caption in the words of data/portraits.py says. ValueError if it states nothing.

    Longer phrases are read first and taken out ("no glasses" before "glasses"). The colour before "hair", or before its style, is the
    hair's; that before "background", or after "against", is the background's.
    """
    text, found = " " + " ".join(re.sub(r"[^a-z ]+", " ", caption.lower()).split()) + " ", {}
    colors = {word: value for value, words in WORDS["background"].items() for word in words}
    hair = {word: value for value, words in WORDS["hair_color"].items() for word in words}

    def take(pattern: str) -> str | None:
        nonlocal text
        match = re.search(rf" {pattern}(?= )", text)
        if not match:
            return None
        text = text[: match.start()] + text[match.end() :]
        return match[1]

    background = take(rf"(?:on (?:an? )?)?({'|'.join(colors)}) background") or take(rf"against (?:an? )?({'|'.join(colors)})")
    if background:
        found["background"] = colors[background]
    color = take(rf"({'|'.join(hair)})(?= (?:(?:short|long|curly) )*hair)")
    if color:
        found["hair_color"] = hair[color]
    style = take(r"(short|long|curly)(?= hair)") or take(r"hair in a (bun)")
    if style:
        found["hair_style"] = style
    phrases = sorted(((word, name, value) for name in ("person", "skin", "expression", "eyewear", "hat") for value, words in WORDS[name].items() for word in words),
                     key=lambda entry: -len(entry[0]))
    for phrase, name, value in phrases:
        if name not in found and take(f"({phrase})"):
            found[name] = value
    if not found:
        raise ValueError(f"the caption {caption!r} states no attribute of portraits ({', '.join(ATTRIBUTES)}); give metadata, or words that they are captioned with")
    return {"attributes": found, "stated": [name for name in ATTRIBUTES if name in found]}


def _complete(truth: dict) -> dict:
    """Attributes that nobody stated get any value: they are not compared."""
    unknown = [f"{n}={v}" for n, v in truth["attributes"].items() if v not in ATTRIBUTES.get(n, ())]
    if unknown:
        raise ValueError(f"metadata has attributes that portraits do not have: {', '.join(unknown)}")
    attributes = {name: truth["attributes"].get(name, values[0]) for name, values in ATTRIBUTES.items()}
    stated = [name for name in truth.get("stated", truth["attributes"]) if name in truth["attributes"]]
    if not stated:
        raise ValueError("metadata states no attribute, so there is nothing to be right about")
    return {"attributes": attributes, "stated": stated}
