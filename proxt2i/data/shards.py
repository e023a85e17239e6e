"""Samples of WebDataset tar shards: read by byte range, checked against the index, decoded to one of a few sizes."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from proxt2i.data.buckets import assign
from proxt2i.data.index import IMAGE, IMAGE_FORMATS, ShardIndex, checksum, index_shards, may_be_turned
from proxt2i.data.writing import write_samples

__all__ = ["Bad", "ShardDataset", "ShardIndex", "Unusable", "decode_image", "index_shards", "write_samples"]

_MAX_TEXT_BYTES = 1 << 20
_MAX_OPEN_SHARDS = 128


@dataclass(frozen=True)
class Bad:
    """Stands in for a sample that cannot be used."""
    reason: str
    shard: str
    key: str

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"


class Unusable(Exception):
    """Why one sample cannot be used."""


class ShardDataset(Dataset):
    """Samples of a ShardIndex: [i] is Bad, or {"image": uint8 [3, H, W], "caption", "attributes": the JSON, "key"}.

    Every picture is cut to the bucket that is nearest to its shape (`buckets`: see buckets.make_buckets; default: the square
    of `image_size`). Only PNG, JPEG and WebP are decoded; `max_bytes` and `max_pixels` are checked before anything is
    decompressed. A sample whose bytes have changed since they were indexed is Bad; RuntimeError if a whole shard has
    (its size or time). Safe in forked and spawned workers.
    """

    in_memory = False

    def __init__(self, index: ShardIndex, image_size: int, *, buckets: Sequence[tuple[int, int]] | None = None,
                 max_bytes: int = 50_000_000, max_pixels: int = 40_000_000):
        self.index, self.max_bytes, self.max_pixels = index, max_bytes, max_pixels
        self.buckets = list(buckets or [(image_size, image_size)])
        self.bucket = assign(index.sizes, self.buckets)
        self._open_shards: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict | Bad:
        sample = self._read(i)
        return sample if isinstance(sample, Bad) else {**sample, "image": torch.from_numpy(sample["image"].copy()).permute(2, 0, 1).contiguous()}

    def name(self, i: int) -> str:
        """For messages: the shard's path and the sample's key."""
        return f"{self.index.shards[self.index.shard[i]]}, sample {self.index.key(i)}"

    def read_batch(self, indices: np.ndarray, mirrored: np.ndarray, reading: Callable[[int], None] = lambda i: None) -> dict:
        """Samples of one bucket: {"images": uint8 [B, H, W, 3], "captions", "keys", "bad": {row: Bad}}, rows of bad ones empty.

        mirrored: bool [B], pictures to flip left to right. reading(i) is called before sample i is read.
        """
        batch = {"images": torch.zeros(len(indices), *self.buckets[self.bucket[indices[0]]], 3, dtype=torch.uint8),
                 "captions": [""] * len(indices), "keys": [""] * len(indices), "bad": {}}
        images = batch["images"].numpy()
        for row, i in enumerate(indices.tolist()):
            reading(i)
            sample = self._read(i)
            if isinstance(sample, Bad):
                batch["bad"][row] = sample
            else:
                images[row] = sample["image"][:, ::-1] if mirrored[row] else sample["image"]
                batch["captions"][row], batch["keys"][row] = sample["caption"], sample["key"]
        return batch

    def _read(self, i: int) -> dict | Bad:
        """{"image": uint8 array [H, W, 3], ...}, or why not."""
        try:
            return self._decode(i)
        except Unusable as error:
            reason = str(error)
        except OSError as error:
            reason = f"cannot be read ({error})"
        return Bad(reason, self.index.shards[self.index.shard[i]].name, self.index.key(i))

    def _decode(self, i: int) -> dict:
        image, text, about = self._fields(i)
        attributes, caption = None, None
        if about is not None:
            attributes = _parse_json(about)
            caption = attributes.get("caption")
        if text is not None:
            try:
                caption = text.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise Unusable("caption is not UTF-8") from error
        if not isinstance(caption, str) or not caption.strip():
            raise Unusable("empty caption")
        image = decode_image(image, self.buckets[self.bucket[i]], self.max_pixels)
        return {"image": image, "caption": caption.strip(), "attributes": attributes, "key": self.index.key(i)}

    def _fields(self, i: int) -> list[bytes | None]:
        """Image, text and JSON of a sample, compared with their checksum."""
        spans, shard = self.index.spans[i].tolist(), self._shard(int(self.index.shard[i]))
        for row, (_, size) in enumerate(spans):
            limit = self.max_bytes if row == IMAGE else _MAX_TEXT_BYTES
            if size > limit:
                raise Unusable(f"{size:,} bytes, more than the limit of {limit:,}")
        present = [span for span in spans if span[0] >= 0]
        start, stop = min(span[0] for span in present), max(sum(span) for span in present)
        if stop - start <= sum(size for _, size in present) + (1 << 16):   # as a rule the fields lie together: one read
            block = shard.read(start, stop - start)
            fields = [None if at < 0 else block[at - start:at - start + size] for at, size in spans]
        else:
            fields = [None if at < 0 else shard.read(at, size) for at, size in spans]
        if checksum(field or b"" for field in fields) != self.index.checksums[i]:
            raise Unusable("damaged since it was indexed (CRC-32 differs)")
        return fields

    def _shard(self, number: int) -> _Shard:
        shard = self._open_shards.pop(number, None) or _Shard(self.index.shards[number], self.index.stamps[number])
        self._open_shards[number] = shard
        if len(self._open_shards) > _MAX_OPEN_SHARDS:
            self._open_shards.popitem(last=False)
        return shard

    def __getstate__(self):                                   # file handles stay in their process
        return {**self.__dict__, "_open_shards": OrderedDict()}


class _Shard:
    """An open shard. Reads are positional, so a handle may be shared by forked processes."""

    def __init__(self, path, stamp: tuple[int, int]):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        if (stat.st_size, stat.st_mtime_ns) != tuple(stamp):
            raise RuntimeError(f"shard {path} has changed since it was indexed: start again, and it is indexed anew")

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        if len(data) < size:
            raise Unusable("cut short")
        return data

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)


def _parse_json(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unusable("JSON cannot be parsed") from error
    if not isinstance(value, dict):
        raise Unusable("JSON is not an object")
    return value


def decode_image(data: bytes, size: tuple[int, int], max_pixels: int = 40_000_000) -> np.ndarray:
    """PNG, JPEG or WebP bytes -> uint8 [H, W, 3] of `size` (H, W): upright (EXIF), on white where transparent, scaled (Lanczos)
    until it just covers the size, centre-cropped. A JPEG of more than four times the size is halved in its decoder as often
    as that leaves twice the size."""
    size = size[::-1]
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Unusable(f"{image.width} x {image.height} pixels, more than the limit of {max_pixels:,}")
            image.draft(None, (2 * max(size), 2 * max(size)))
            if may_be_turned(image, data):
                ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            if rgb.size != size:
                rgb = ImageOps.fit(rgb, size, Image.Resampling.LANCZOS)
            return np.asarray(rgb)
    except Unusable:
        raise
    except Exception as error:                                # Pillow's decoders raise nearly every type there is
        raise Unusable(f"image cannot be decoded ({type(error).__name__}: {str(error)[:80]})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):                            # 16-bit grey, which convert() would clip
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
