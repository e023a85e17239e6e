"""PickScore (arXiv 2305.01569): exp(logit_scale) times the cosine of picture and prompt, by a CLIPModel trained on human choices.

PickScore_v1 is a CLIP-H/14; `path: portraits` is the tiny CLIPModel that ships with the package, trained on portraits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..embedded import ASSETS
from .base import DTYPES, RewardSettings
from .clip import embed_images, embed_prompts, load_clip, load_clip_tokenizer
from .preprocess import CLIP_MEAN, CLIP_STD, clip_pixels, float_clip_pixels
from .weights import Source, find_tokenizer, find_weights

SOURCE = Source(
    needed=(("config.json",), ("model.safetensors",)),
    downloads=(("yuvalkirstain/PickScore_v1", "config.json model.safetensors"),
               ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "vocab.json merges.txt tokenizer.json tokenizer_config.json")),
)
HALF = (0.5, 0.5, 0.5)  # mean and std that the tiny CLIP was trained with


class PickScore:
    def __init__(self, clip, tokenizer, mean=CLIP_MEAN, std=CLIP_STD):
        self.clip, self.tokenizer, self.mean, self.std = clip, tokenizer, mean, std

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(self.pixels(images), prompts).cpu()

    def differentiable(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(self.pixels(images, float_clip_pixels), prompts)

    def pixels(self, images: Tensor, preprocess=clip_pixels) -> Tensor:
        """What the CLIP sees of images; preprocess: clip_pixels, or float_clip_pixels for gradients."""
        return preprocess(images, self.clip.config.vision_config.image_size, self.mean, self.std, floor=True)

    def _score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        cosine = (embed_images(self.clip, pixels) * embed_prompts(self.clip, self.tokenizer, prompts)).sum(1)
        return self.clip.logit_scale.float().exp() * cosine


def load(settings: RewardSettings, device: torch.device) -> PickScore:
    if settings.path == "portraits":
        return PickScore(load_clip(ASSETS / "clip", device, DTYPES[settings.dtype]), load_clip_tokenizer(ASSETS / "tokenizer"), HALF, HALF)
    folder = find_weights(settings, SOURCE)
    tokenizer = load_clip_tokenizer(find_tokenizer(settings, folder, SOURCE))
    return PickScore(load_clip(folder, device, DTYPES[settings.dtype]), tokenizer)
