"""The latents of a whole data set, encoded once: for data that fit in memory.

The cache is a folder of chunks, `CACHE_DIR/latents-<fingerprint>/00000.safetensors` and so on, each holding the latents
of `chunk_size` consecutive samples with their captions. A chunk is written atomically and carries its own digest, so
that a killed run loses one chunk, a damaged chunk is encoded again, and any number of ranks can share the work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from proxt2i.data.index import write_atomically
from proxt2i.data.shards import Bad, BadSamples, EpochOrder, ShardDataset, _collate, positions

log = logging.getLogger(__name__)

CACHE_VERSION = 1
DTYPES = (torch.float16, torch.float32)


@dataclass
class LatentCache:
    """Latents and captions of samples 0 ... N-1, in memory. Rows of bad samples are zero and never drawn."""
    latents: torch.Tensor                  # float16 or float32 [N, C, h, w]
    text: list[torch.Tensor]               # [N, L_i, D_i] per text encoder, same dtype; [] if not cached
    captions: list[str]
    keys: list[str]
    usable: np.ndarray                     # bool [N]
    bad: BadSamples

    def __len__(self) -> int:
        return len(self.latents)

    def batches(self, batch_size: int, *, seed: int = 0, images_seen: int = 0, rank: int = 0, world: int = 1,
                device: str | torch.device = "cpu") -> LatentLoader:
        """Endless batches from `images_seen` on: the same samples in the same order as BatchLoader's."""
        return LatentLoader(self, batch_size, seed, images_seen, rank, world, torch.device(device))


class LatentLoader:
    """BatchLoader's interface over a LatentCache; no worker processes. A batch is {"latents": float32 [B, C, h, w],
    "captions", "ids", "keys"}, with "text": list of float32 [B, L_i, D_i] where the cache holds text."""

    def __init__(self, cache: LatentCache, batch_size: int, seed: int, images_seen: int, rank: int, world: int,
                 device: torch.device):
        positions(images_seen, batch_size, rank, world)
        self.cache, self.batch_size, self.images_seen = cache, batch_size, images_seen
        self.rank, self.world = rank, world
        self.device, self.bad, self.order = device, cache.bad, EpochOrder(len(cache), seed)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        cache, where = self.cache, positions(self.images_seen, self.batch_size, self.rank, self.world)
        indices = self.order(where)
        for slot in np.flatnonzero(~cache.usable[indices]):
            indices[slot] = self.order.replace(int(where[slot]), lambda index: not cache.usable[index])
        rows = torch.from_numpy(indices)
        batch = {"latents": cache.latents[rows].to(self.device).float(), "ids": torch.from_numpy(where),
                 "captions": [cache.captions[i] for i in indices], "keys": [cache.keys[i] for i in indices]}
        if cache.text:
            batch["text"] = [text[rows].to(self.device).float() for text in cache.text]
        self.images_seen += self.batch_size * self.world
        return batch

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass


def encode_dataset(dataset: ShardDataset, codec, cache_dir: str | os.PathLike, *, text=None,
                   device: str | torch.device = "cpu", batch_size: int = 64, rank: int = 0, world: int = 1,
                   dtype: torch.dtype = torch.float16, num_workers: int = 0, chunk_size: int = 1024,
                   max_bad: int | None = None, timeout_s: float = 3600.0) -> LatentCache:
    """Encode every image of `dataset` once with `codec.encode`, or load what an earlier call left in `cache_dir`.

    `text`, a TextEncoder, has the captions' embeddings cached as well. Chunk c is encoded by rank c % world; each rank
    then loads all chunks, waiting up to `timeout_s` for the others', so ranks must see one folder. The fingerprint
    covers the shards, the weights, the image size and the dtype: change one and the data is encoded anew.
    Bad samples are left out, counted and named, RuntimeError beyond `max_bad` (see BadSamples). ValueError for another
    dtype, a folder that cannot be written, and latents that are not finite.
    """
    if dtype not in DTYPES:
        raise ValueError(f"latents are cached as float16 or float32, not {dtype}")
    fingerprint = _fingerprint(dataset, codec, text, dtype, chunk_size)
    folder = Path(cache_dir) / f"latents-{fingerprint[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the latents' cache folder {folder} ({error}): choose another") from error
    starts = range(0, len(dataset), chunk_size)
    chunks = [_Chunk(folder / f"{c:05d}.safetensors", start, min(start + chunk_size, len(dataset)), fingerprint)
              for c, start in enumerate(starts)]
    missing = [chunk for chunk in chunks[rank::world] if chunk.load(warn=True) is None]
    with tqdm(total=sum(c.stop - c.start for c in missing), desc="encoding images", unit="image",
              disable=None if rank == 0 and missing else True) as bar:
        for chunk in missing:
            chunk.encode(dataset, codec, text, device, batch_size, dtype, num_workers, bar)
    return _gather(chunks, dataset, world, max_bad, timeout_s)


# ------------------------------------------------------------------------------------------------------------
# Chunks.

@dataclass
class _Chunk:
    path: Path
    start: int
    stop: int
    fingerprint: str

    @torch.no_grad()
    def encode(self, dataset, codec, text, device, batch_size, dtype, num_workers, bar) -> None:
        loader = DataLoader(dataset, batch_size, sampler=range(self.start, self.stop), num_workers=num_workers,
                            collate_fn=partial(_collate, image_size=dataset.image_size), generator=torch.Generator())
        parts: dict[str, list] = {}
        captions, keys, usable, bad = [], [], [], []
        for batch in loader:
            images = batch["images"].to(device).float().div_(127.5).sub_(1)
            tensors = {"latents": codec.encode(images)}
            if text is not None:
                tensors |= {f"text_{i}": t for i, t in enumerate(text(batch["captions"]))}
            for name, tensor in tensors.items():
                tensor = tensor.to("cpu", dtype)
                tensor[list(batch["bad"])] = 0
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} of samples {self.start + len(keys)}... are not finite in {dtype}")
                parts.setdefault(name, []).append(tensor)
            usable += [slot not in batch["bad"] for slot in range(len(batch["keys"]))]
            captions, keys = captions + batch["captions"], keys + batch["keys"]
            bad += [[b.reason, b.shard, b.key] for b in batch["bad"].values()]
            bar.update(len(images))
        tensors = {name: torch.cat(part).contiguous() for name, part in parts.items()}
        tensors["usable"] = torch.tensor(usable)
        about = json.dumps({"fingerprint": self.fingerprint, "captions": captions, "keys": keys, "bad": bad})
        write_atomically(self.path, save(tensors, metadata={"about": about, "digest": _digest(tensors, about)}))

    def load(self, warn: bool = False) -> tuple[dict[str, torch.Tensor], dict] | None:
        """(tensors, about), or None if the file is absent or damaged."""
        try:
            with safe_open(self.path, "pt") as f:
                metadata = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}
            about = json.loads(metadata["about"])
            sizes = {len(tensors["usable"]), len(tensors["latents"]), len(about["captions"]), len(about["keys"])}
            if about["fingerprint"] != self.fingerprint or sizes != {self.stop - self.start}:
                raise ValueError("it belongs to other data")
            if metadata["digest"] != _digest(tensors, metadata["about"]):
                raise ValueError("its digest is wrong")
            return tensors, about
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            if warn:
                log.warning("%s is damaged (%s): encoding its images again", self.path, error)
            return None


def _gather(chunks: list[_Chunk], dataset, world: int, max_bad: int | None, timeout_s: float) -> LatentCache:
    bad_samples = BadSamples(len(dataset), max_bad)
    cache = LatentCache(torch.empty(0), [], [], [], np.zeros(len(dataset), dtype=bool), bad_samples)
    whole: dict[str, torch.Tensor] = {}
    deadline = time.monotonic() + timeout_s
    for number, chunk in enumerate(chunks):
        while (loaded := chunk.load()) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {timeout_s:.0f} s for {chunk.path}, which rank {number % world} encodes: "
                                   f"did it fail, or is the folder not shared between the machines?")
            time.sleep(0.1)
        tensors, about = loaded
        here = slice(chunk.start, chunk.stop)
        cache.usable[here] = tensors.pop("usable").numpy()
        cache.captions += about["captions"]
        cache.keys += about["keys"]
        for name, tensor in tensors.items():
            if name not in whole:
                whole[name] = torch.empty(len(dataset), *tensor.shape[1:], dtype=tensor.dtype)
            whole[name][here] = tensor
        for bad in about["bad"]:
            cache.bad.add(Bad(*bad))
    cache.latents = whole.pop("latents")
    cache.text = [whole[name] for name in sorted(whole)]
    if cache.bad.found:
        log.warning("%s", cache.bad.summary())
    return cache


# ------------------------------------------------------------------------------------------------------------
# Fingerprints.

def _fingerprint(dataset: ShardDataset, codec, text, dtype: torch.dtype, chunk_size: int) -> str:
    index = dataset.index
    parts = [CACHE_VERSION, index.digest, [mtime for _, mtime in index.stamps], dataset.image_size, dataset.max_bytes,
             dataset.max_pixels, str(dtype), chunk_size, weights_digest(codec), text and weights_digest(text)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def weights_digest(component) -> str:
    """SHA-256 of a component: its type, its modules' weights, and the plain values among its attributes and config."""
    h = hashlib.sha256(type(component).__name__.encode())
    if isinstance(component, nn.Module):
        for name, tensor in sorted(component.state_dict().items()):
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    _update(h, vars(component) if hasattr(component, "__dict__") else {})
    config = getattr(component, "config", None)
    if isinstance(config, Mapping):
        _update(h, config)
    return h.hexdigest()


def _update(h, values: Mapping) -> None:
    for name, value in sorted(values.items()):
        if name.startswith("_") or name in ("training", "device"):
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, nn.Module):
                h.update(f"{name} {weights_digest(item)}".encode())
            elif isinstance(item, (bool, int, float, str)):
                h.update(f"{name} {item!r}".encode())


def _digest(tensors: dict[str, torch.Tensor], about: str) -> str:
    h = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return h.hexdigest()
