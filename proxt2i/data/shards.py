"""Training batches from WebDataset tar shards, in an order that is a pure function of (seed, images seen).

Every drawing of a sample has a global position p = 0, 1, 2, ...: position p belongs to epoch p // N and there to entry
p % N of the epoch's permutation. A step that starts at `images_seen` covers positions images_seen ... + world * batch,
rank r taking the r-th contiguous part. Resuming, also on another number of ranks, therefore needs `images_seen` alone.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from proxt2i.data.index import IMAGE, JSON, TEXT, ShardIndex, index_shards, write_samples
from proxt2i.signals import outlive_signals

__all__ = ["BadSamples", "BatchLoader", "Bad", "EpochOrder", "ShardDataset", "ShardIndex", "decode_image", "flips",
           "index_shards", "positions", "sample_order", "write_samples"]

log = logging.getLogger(__name__)

_MAX_TEXT_BYTES = 1 << 20
_MAX_OPEN_SHARDS = 128


# ------------------------------------------------------------------------------------------------------------
# Samples.

@dataclass(frozen=True)
class Bad:
    """Stands in for a sample that cannot be used."""
    reason: str
    shard: str
    key: str

    def __str__(self) -> str:
        return f"{self.shard}/{self.key}: {self.reason}"


class ShardDataset(Dataset):
    """Samples of a ShardIndex: [i] is Bad, or {"image": uint8 [3, S, S], "caption", "attributes": the JSON, "key"}.

    Only PNG, JPEG and WebP are decoded; `max_bytes` and `max_pixels` are checked before anything is decompressed.
    RuntimeError if a shard has changed since it was indexed. Safe in forked and spawned workers.
    """

    def __init__(self, index: ShardIndex, image_size: int, *, max_bytes: int = 50_000_000,
                 max_pixels: int = 40_000_000):
        self.index, self.image_size, self.max_bytes, self.max_pixels = index, image_size, max_bytes, max_pixels
        self._open_shards: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict | Bad:
        try:
            return self._read(i)
        except _Unusable as error:
            reason = str(error)
        except OSError as error:
            reason = f"cannot be read ({error})"
        return Bad(reason, self.index.shards[self.index.shard[i]].name, self.index.key(i))

    def _read(self, i: int) -> dict:
        shard, spans = self._shard(int(self.index.shard[i])), self.index.spans[i]
        attributes, caption = None, None
        if spans[JSON, 0] >= 0:
            attributes = _parse_json(shard.read(*spans[JSON], limit=_MAX_TEXT_BYTES))
            caption = attributes.get("caption")
        if spans[TEXT, 0] >= 0:
            try:
                caption = shard.read(*spans[TEXT], limit=_MAX_TEXT_BYTES).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise _Unusable("caption is not UTF-8") from error
        if not isinstance(caption, str) or not caption.strip():
            raise _Unusable("empty caption")
        image = decode_image(shard.read(*spans[IMAGE], limit=self.max_bytes), self.image_size, self.max_pixels)
        return {"image": image, "caption": caption.strip(), "attributes": attributes, "key": self.index.key(i)}

    def _shard(self, number: int) -> _Shard:
        shard = self._open_shards.pop(number, None) or _Shard(self.index.shards[number], self.index.stamps[number])
        self._open_shards[number] = shard
        if len(self._open_shards) > _MAX_OPEN_SHARDS:
            self._open_shards.popitem(last=False)
        return shard

    def __getstate__(self):                                   # file handles stay in their process
        return {**self.__dict__, "_open_shards": OrderedDict()}


class _Unusable(Exception):
    pass


class _Shard:
    """An open shard. Reads are positional, so a handle may be shared by forked processes."""

    def __init__(self, path, stamp: tuple[int, int]):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        if (stat.st_size, stat.st_mtime_ns) != tuple(stamp):
            raise RuntimeError(f"shard {path} has changed since it was indexed: start again, and it is indexed anew")

    def read(self, offset: int, size: int, limit: int) -> bytes:
        if size > limit:
            raise _Unusable(f"{size:,} bytes, more than the limit of {limit:,}")
        data = os.pread(self.fd, int(size), int(offset))
        if len(data) < size:
            raise _Unusable("cut short")
        return data

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)


def _parse_json(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Unusable("JSON cannot be parsed") from error
    if not isinstance(value, dict):
        raise _Unusable("JSON is not an object")
    return value


def decode_image(data: bytes, image_size: int, max_pixels: int = 40_000_000) -> torch.Tensor:
    """PNG, JPEG or WebP bytes -> uint8 [3, S, S]: upright (EXIF), on white where transparent, shortest side scaled to
    S = image_size (Lanczos), centre-cropped."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > max_pixels:
                raise _Unusable(f"{image.width} x {image.height} pixels, more than the limit of {max_pixels:,}")
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            if rgb.size != (image_size, image_size):
                rgb = ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()
    except _Unusable:
        raise
    except Exception as error:                                # Pillow's decoders raise nearly every type there is
        raise _Unusable(f"image cannot be decoded ({type(error).__name__}: {str(error)[:80]})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):                            # 16-bit grey, which convert() would clip
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class BadSamples:
    """Counts bad samples, each once, and names the first few. RuntimeError beyond `budget` (default: 1 %, at least 10)."""

    def __init__(self, num_samples: int, budget: int | None = None, num_named: int = 5):
        budget = max(10, num_samples // 100) if budget is None else budget
        self.budget, self.num_named = min(budget, num_samples - 1), num_named
        self.found: dict[tuple[str, str], Bad] = {}

    def add(self, bad: Bad) -> None:
        if (bad.shard, bad.key) in self.found:
            return
        self.found[bad.shard, bad.key] = bad
        if len(self.found) <= self.num_named:
            log.warning("bad sample %s; skipped%s", bad, ", further ones are only counted"
                        if len(self.found) == self.num_named else "")
        if len(self.found) > self.budget:
            raise RuntimeError(f"{self.summary()}: more than the budget of {self.budget}. "
                               f"Mend the shards, or allow more bad samples")

    def summary(self) -> str:
        if not self.found:
            return "no bad samples"
        return f"{len(self.found)} bad samples skipped, the last: {list(self.found.values())[-1]}"


# ------------------------------------------------------------------------------------------------------------
# Order.

@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # Sort raw Philox words that carry their index in the low bits: unlike Generator.permutation's, numpy promises
    # never to change that stream; and there are no ties.
    bits = np.uint64(num_samples.bit_length())
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(num_samples)
    words = (words << bits) | np.arange(num_samples, dtype=np.uint64)
    words.sort()
    return (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


class EpochOrder:
    """order(positions int64 [B]) -> sample indices int64 [B]; every sample once an epoch."""

    def __init__(self, num_samples: int, seed: int):
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples, self.seed = num_samples, seed

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        epochs, entries = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        indices = np.empty_like(entries)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.num_samples, self.seed, int(epoch))[entries[here]]
        return indices

    def replace(self, position: int, is_bad) -> int:
        """The first index from `position` on, within its epoch and round to its start, for which not is_bad(index)."""
        start = position - position % self.num_samples
        for step in range(self.num_samples):
            index = int(self(np.array([start + (position - start + step) % self.num_samples]))[0])
            if not is_bad(index):
                return index
        raise RuntimeError("every sample is bad")


def positions(images_seen: int, batch_size: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Global positions int64 [batch_size] of rank `rank`'s part of the step that starts at `images_seen`."""
    if batch_size < 1 or images_seen < 0 or not 0 <= rank < world:
        raise ValueError(f"batch_size={batch_size}, images_seen={images_seen}, rank={rank}, world={world}: "
                         f"needs batch_size >= 1, images_seen >= 0 and 0 <= rank < world")
    return images_seen + rank * batch_size + np.arange(batch_size, dtype=np.int64)


def sample_order(num_samples: int, seed: int, images_seen: int, batch_size: int, rank: int = 0,
                 world: int = 1) -> np.ndarray:
    """Sample indices int64 [batch_size] of that part: a pure function of its arguments."""
    return EpochOrder(num_samples, seed)(positions(images_seen, batch_size, rank, world))


def flips(seed: int, positions: np.ndarray) -> np.ndarray:
    """bool [B]: a fair coin for each (seed, position), by the splitmix64 hash."""
    x = np.asarray(positions).astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x5851F42D4C957F2D) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x & np.uint64(1)).astype(bool)


# ------------------------------------------------------------------------------------------------------------
# Batches.

class BatchLoader:
    """Endless batches of one rank, from `images_seen` on. Use as an iterator, and close() it (or use `with`).

    A batch is {"images": float32 [B, 3, S, S] in [-1, 1] on `device`, "captions": list[str], "ids": int64 [B], the
    global positions, "keys": list[str]}. `num_workers` processes decode ahead (0: none). A bad sample gives its place
    to the next good one in the epoch's order, the same on any number of ranks, and is counted in `bad`; RuntimeError
    when there are more than `max_bad`. `flip` mirrors every image with probability 1/2, keyed by (seed, position).
    """

    def __init__(self, dataset: ShardDataset, batch_size: int, *, seed: int = 0, images_seen: int = 0, rank: int = 0,
                 world: int = 1, num_workers: int = 2, device: str | torch.device = "cpu", flip: bool = False,
                 max_bad: int | None = None):
        positions(images_seen, batch_size, rank, world)       # refuses bad arguments here, not at the first batch
        self.dataset, self.batch_size, self.seed, self.images_seen = dataset, batch_size, seed, images_seen
        self.rank, self.world, self.num_workers = rank, world, num_workers
        self.device, self.flip = torch.device(device), flip
        self.order = EpochOrder(len(dataset), seed)
        self.bad = BadSamples(len(dataset), max_bad)
        self._batches = None

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        where = positions(self.images_seen, self.batch_size, self.rank, self.world)
        for slot, bad in batch.pop("bad").items():
            self._replace(batch, slot, int(where[slot]), bad)
        images = batch["images"].to(self.device, non_blocking=True).float().div_(127.5).sub_(1)
        if self.flip:
            mirrored = torch.from_numpy(flips(self.seed, where)).to(self.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        self.images_seen += self.batch_size * self.world
        return {**batch, "images": images, "ids": torch.from_numpy(where)}

    def _start(self):
        stride = self.batch_size * self.world
        steps = (self.order(positions(start, self.batch_size, self.rank, self.world)).tolist()
                 for start in itertools.count(self.images_seen, stride))
        return iter(DataLoader(
            self.dataset, batch_sampler=steps, num_workers=self.num_workers,
            collate_fn=partial(_collate, image_size=self.dataset.image_size), pin_memory=self.device.type == "cuda",
            generator=torch.Generator(), prefetch_factor=4 if self.num_workers else None, worker_init_fn=outlive_signals))

    def _replace(self, batch: dict, slot: int, position: int, bad: Bad) -> None:
        self.bad.add(bad)
        sample: dict = {}

        def is_bad(index: int) -> bool:
            nonlocal sample
            sample = self.dataset[index]
            if isinstance(sample, Bad):
                self.bad.add(sample)
            return isinstance(sample, Bad)

        self.order.replace(position, is_bad)
        batch["images"][slot] = sample["image"]
        batch["captions"][slot], batch["keys"][slot] = sample["caption"], sample["key"]

    def close(self) -> None:
        """Stop the workers and log the number of bad samples. Iterating again continues where it stopped."""
        self._batches = None                                  # the last reference: torch joins the workers
        if self.bad.found:
            log.warning("%s", self.bad.summary())

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _collate(samples: list[dict | Bad], image_size: int) -> dict:
    bad = {slot: sample for slot, sample in enumerate(samples) if isinstance(sample, Bad)}
    empty = {"image": torch.zeros(3, image_size, image_size, dtype=torch.uint8), "caption": "", "key": ""}
    samples = [empty if isinstance(sample, Bad) else sample for sample in samples]
    return {"images": torch.stack([s["image"] for s in samples]), "captions": [s["caption"] for s in samples],
            "keys": [s["key"] for s in samples], "bad": bad}
