"""Size as a JPEG, as in DDPO (arXiv 2305.13301): kilobytes (1,000 bytes) at quality 95, written by Pillow. No weights."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from ..images import to_pil
from .base import RewardSettings
from .preprocess import quantise


class JpegSize:
    """sign +1: incompressibility, -1: compressibility."""

    def __init__(self, sign: int):
        self.sign = sign

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self.sign * torch.tensor([_bytes(image) / 1000 for image in quantise(images)])


def _bytes(image: Tensor) -> int:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


def load(settings: RewardSettings, device: torch.device) -> JpegSize:
    return JpegSize(-1 if settings.name == "jpeg_compressibility" else 1)
