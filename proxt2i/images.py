"""Picture files: PNGs that carry their settings, and labelled grids."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Decoded pictures, [-1, 1], any float dtype and shape -> uint8, clipped and rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> RGB."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def save_png(image: Image.Image, path: Path, settings: dict | None = None) -> Path:
    """Writes `path` whole or not at all (temporary name, then rename). `settings` travel in the PNG's text chunks."""
    info = PngInfo()
    for key, value in (settings or {}).items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def grid(images: Tensor, columns: int, labels: Sequence[str] = (), scale: int | None = None) -> Image.Image:
    """Rows of `columns` pictures, uint8 [M, 3, H, W]; `labels`: one line of text above each row.

    scale: whole-number enlargement (pixels stay square); default: about 128 pixels a picture.
    """
    count, _, height, width = images.shape
    scale = scale or max(1, 128 // max(height, width))
    height, width, gap = height * scale, width * scale, 4
    rows = -(-count // columns)
    font = ImageFont.load_default(13)
    band = 22 if labels else 0
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap + band) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r in range(rows):
        top = gap + r * (height + gap + band)
        if r < len(labels):
            longest = max(8, (sheet.width - 2 * gap) * 10 // 65)
            draw.text((gap, top + 3), textwrap.shorten(labels[r], longest, placeholder=" …"), fill="black", font=font)
        for c in range(min(columns, count - r * columns)):
            picture = to_pil(images[r * columns + c]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + c * (width + gap), top + band))
    return sheet
