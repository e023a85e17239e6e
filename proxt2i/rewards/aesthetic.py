"""LAION's aesthetic predictor (sac+logos+ava1-l14-linearMSE): an MLP on the unit embedding of a picture by OpenAI's CLIP ViT-L/14.

It does not look at the prompt. Trained alone it makes all pictures alike; use it beside others, or to measure.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .base import DTYPES, RewardSettings
from .clip import embed_images, load_clip
from .preprocess import clip_pixels, float_clip_pixels
from .weights import Source, find_weights, first_of, is_hub_id, load_strictly, read_tensors

HEADS = ("sac+logos+ava1-l14-linearMSE.safetensors", "sac+logos+ava1-l14-linearMSE.pth")
SOURCE = Source(
    needed=(("config.json",), ("model.safetensors",), HEADS),
    downloads=(("openai/clip-vit-large-patch14", "config.json model.safetensors"),),
    tokenizer=(),
    notes="and sac+logos+ava1-l14-linearMSE.pth from https://github.com/christophschuhmann/improved-aesthetic-predictor into the same folder",
)


class Aesthetic:
    def __init__(self, clip, head: nn.Module):
        self.clip, self.head = clip, head

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(clip_pixels(images, self.clip.config.vision_config.image_size)).cpu()

    def differentiable(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(float_clip_pixels(images, self.clip.config.vision_config.image_size))

    def _score(self, pixels: Tensor) -> Tensor:
        return self.head(embed_images(self.clip, pixels)).squeeze(1)


def linear_head(width: int) -> nn.Sequential:
    """The five linear layers (no nonlinearity between them) that the aesthetic predictor and ImageReward end with; the dropout is part of the numbering."""
    return nn.Sequential(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
                         nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)).requires_grad_(False).eval()


def read_head(path: Path, width: int) -> nn.Sequential:
    head = linear_head(width)
    load_strictly(head, {name.removeprefix("layers."): tensor for name, tensor in read_tensors(path).items()}, path)
    return head.float()


def load(settings: RewardSettings, device: torch.device) -> Aesthetic:
    if settings.path and is_hub_id(settings.path) and not Path(settings.path).exists():
        raise ValueError("aesthetic: its files come from two places, so `path` must be a folder that holds both, not a hub id (docs/rewards.md)")
    folder = find_weights(settings, SOURCE)
    clip = load_clip(folder, device, DTYPES[settings.dtype])
    return Aesthetic(clip, read_head(first_of(folder, HEADS), clip.config.projection_dim).to(device))
