"""HPSv2.1 (arXiv 2306.09341): the cosine of picture and prompt by a CLIP-H/14 trained on human preferences, read from its own open_clip checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .base import DTYPES, RewardSettings
from .clip import clean, clip_of_open_clip, embed_images, embed_prompts, load_clip_tokenizer
from .preprocess import fit_square, normalise, quantise
from .weights import Source, find_tokenizer, find_weights, first_of, read_tensors

FILES = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt")
SOURCE = Source(
    needed=(FILES,),
    downloads=(("xswu/HPSv2", "HPS_v2.1_compressed.pt"), ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "vocab.json merges.txt tokenizer.json tokenizer_config.json")),
)


class HPSv2:
    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer = clip, tokenizer

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self.differentiable(quantise(images).float() / 255, prompts).cpu()

    def differentiable(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        pixels = normalise(fit_square(images, self.clip.config.vision_config.image_size))
        return (embed_images(self.clip, pixels) * embed_prompts(self.clip, self.tokenizer, [clean(p) for p in prompts])).sum(1)


def read_clip(path: Path, device: torch.device, dtype: torch.dtype, text_heads: int = 16, vision_heads: int = 16):
    """The CLIPModel of an HPSv2 checkpoint (open_clip's names, safetensors or torch); the heads are those of ViT-H-14."""
    return clip_of_open_clip(read_tensors(path), path, device, dtype, text_heads, vision_heads)


def load(settings: RewardSettings, device: torch.device) -> HPSv2:
    folder = find_weights(settings, SOURCE)
    tokenizer = load_clip_tokenizer(find_tokenizer(settings, folder, SOURCE))
    return HPSv2(read_clip(first_of(folder, FILES), device, DTYPES[settings.dtype]), tokenizer)
