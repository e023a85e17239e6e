"""How float pictures become a model's input, exactly as each original does it, without torchvision.

Every reward first rounds to uint8, so that a picture in memory gets the score that its PNG would get. Then most resize the shorter side with
Pillow and cut out the middle (OpenAI's CLIP, transformers' CLIPProcessor of PickScore's time, ImageReward, Aesthetic). HPSv2 makes a float
tensor first, and shrinks it into a square with black borders.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..images import to_pil

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def quantise(images: Tensor) -> Tensor:
    """float [B, 3, H, W] in [0, 1] -> uint8 on the CPU, rounded: the bytes of a saved PNG."""
    return (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def pillow_resize(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> uint8 with the shorter side `size`: Pillow's bicubic, as transforms.Resize does it with PIL images."""
    short = min(images.shape[2:])
    height, width = (int(size * n / short) for n in images.shape[2:])
    if (height, width) == images.shape[2:]:
        return images
    resized = [np.asarray(to_pil(x).resize((width, height), Image.Resampling.BICUBIC)) for x in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def fit_square(images: Tensor, size: int) -> Tensor:
    """float [B, 3, H, W] -> float [B, 3, size, size]: the longer side resized to `size` (bicubic, antialiased, as transforms.Resize does it
    with tensors), the shorter one padded with black on both sides; what HPSv2 does."""
    height, width = images.shape[2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = round(height * scale), round(width * scale)
        images = F.interpolate(images, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def center_crop(images: Tensor, size: int, floor: bool = False) -> Tensor:
    """The middle `size` x `size` of [B, 3, H, W]. An odd rest: half to even as torchvision rounds, or down as transformers does (`floor`)."""
    top, left = ((n - size) // 2 if floor else round((n - size) / 2) for n in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def normalise(images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """uint8, or float in [0, 1] -> float32 (x - mean) / std."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


def float_clip_pixels(images: Tensor, size: int, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD, floor: bool = False) -> Tensor:
    """`clip_pixels` with gradients: nothing is rounded, and torch's antialiased bicubic stands for Pillow's. On the device of the images."""
    return normalise(center_crop(float_resize(images, size), size, floor), mean, std)


def float_resize(images: Tensor, size: int) -> Tensor:
    """`pillow_resize` with gradients: float [B, 3, H, W] in [0, 1] -> the same with the shorter side `size`."""
    short = min(images.shape[2:])
    height, width = (int(size * n / short) for n in images.shape[2:])
    if (height, width) == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, size=(height, width), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def clip_pixels(images: Tensor, size: int, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD, floor: bool = False) -> Tensor:
    """float [B, 3, H, W] in [0, 1] -> float32 [B, 3, size, size]: what OpenAI's CLIP is fed (with `floor`: transformers' CLIP)."""
    return normalise(center_crop(pillow_resize(quantise(images), size), size, floor), mean, std)
