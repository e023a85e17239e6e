"""CLIP score: the cosine of picture and prompt by OpenAI's CLIP ViT-L/14 (arXiv 2103.00020), as ImageReward's package computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import DTYPES, RewardSettings
from .clip import clean, embed_images, embed_prompts, load_clip, load_clip_tokenizer
from .preprocess import clip_pixels, float_clip_pixels
from .weights import Source, find_tokenizer, find_weights

SOURCE = Source(
    needed=(("config.json",), ("model.safetensors",)),
    downloads=(("openai/clip-vit-large-patch14", "config.json model.safetensors vocab.json merges.txt tokenizer.json tokenizer_config.json"),),
)


class ClipScore:
    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer = clip, tokenizer

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        pixels = clip_pixels(images, self.clip.config.vision_config.image_size)
        return self._score(pixels, prompts).cpu()

    def differentiable(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(float_clip_pixels(images, self.clip.config.vision_config.image_size), prompts)

    def _score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return (embed_images(self.clip, pixels) * embed_prompts(self.clip, self.tokenizer, [clean(p) for p in prompts])).sum(1)


def load(settings: RewardSettings, device: torch.device) -> ClipScore:
    folder = find_weights(settings, SOURCE)
    tokenizer = load_clip_tokenizer(find_tokenizer(settings, folder, SOURCE))
    return ClipScore(load_clip(folder, device, DTYPES[settings.dtype]), tokenizer)
