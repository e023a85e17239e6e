"""From the config to batches of clean latents and text embeddings."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from proxt2i.config import Config, DataConfig
from proxt2i.data.buckets import describe, make_buckets
from proxt2i.data.latent_shards import LatentDataset, fingerprint, is_latent_folder
from proxt2i.data.latents import check_latents, describe_latents, encode_shards
from proxt2i.data.loader import BatchLoader
from proxt2i.data.shards import ShardDataset, index_shards
from proxt2i.models.bundle import EMBEDDED, load_components
from proxt2i.models.files import component_digests
from proxt2i.models.text import encoder_names
from proxt2i.models.uvit import PRESETS
from proxt2i.training.distributed import Ranks, first_rank_does, gather_objects


@dataclass(frozen=True)
class Batch:
    """latents float32 [B, C, H, W], one shape on all ranks; text: one float32 [B, L_i, D_i] per encoder; positions int64 [B] (global, on the CPU)."""

    latents: Tensor
    text: list[Tensor]
    positions: Tensor

    def micro_batches(self, size: int):
        for start in range(0, len(self.positions), size):
            part = slice(start, start + size)
            yield Batch(self.latents[part], [embedding[part] for embedding in self.text], self.positions[part])


class Feed:
    """Endless batches of one rank from `images_seen` on, encoded by the frozen codec and text encoder or read from latents."""

    def __init__(self, config: Config, ranks: Ranks, batch_size: int, dtype: torch.dtype = torch.float32):
        self.components = Path(config.model.components or EMBEDDED)
        self.text, self.codec = load_components(self.components, ranks.device, dtype)
        self.null_text = self.text([""])
        self._names = encoder_names(self.components)
        self._config, self._ranks, self._batch_size = config, ranks, batch_size
        self._compute = "bf16" if dtype == torch.bfloat16 else "fp32"

    def open(self, images_seen: int, say) -> None:
        """Find (or draw, or encode) the data; then iterate. `say(message)` reports what was found."""
        config, data, ranks = self._config, self._config.data, self._ranks
        folder = first_rank_does(ranks, lambda: prepare_shards(data))
        if is_latent_folder(folder):
            dataset = LatentDataset(folder)
            digests = first_rank_does(ranks, lambda: component_digests(self.components, [encoder["name"] for encoder in dataset.about["text"]]))
            check_latents(dataset, data.image_size, wanted_buckets(config, self.codec.factor), data.flip, digests)
            say(f"data: {folder}: {dataset.summary()}")
        else:
            say(f"data: {folder}: {first_rank_does(ranks, lambda: index_shards(folder).summary())}")
            index = index_shards(folder)  # the others read the index that rank 0 left
            dataset = ShardDataset(index, data.image_size, buckets=wanted_buckets(config, self.codec.factor))
            if data.cache_latents:
                dataset = self._encode(dataset)
        check_buckets(config, self.codec.factor, dataset.buckets)
        if len(dataset.buckets) > 1:
            say(f"      {describe(dataset.buckets, dataset.bucket)}")
        self._stored = [encoder["name"] for encoder in dataset.about["text"]] if isinstance(dataset, LatentDataset) else []
        self._loader = BatchLoader(
            dataset, self._batch_size, seed=config.train.seed, images_seen=images_seen, rank=ranks.rank, world=ranks.world_size,
            device=ranks.device, num_workers=data.workers, flip=data.flip, max_bad=data.max_bad, timeout_s=data.timeout_s,
            bad_list=Path(config.train.run_dir) / "bad_samples.jsonl")
        self._shared: set = set()

    def _encode(self, dataset: ShardDataset) -> LatentDataset:
        """The latents of a small data set, in memory; encoded once and kept in data.cache_dir."""
        data, ranks = self._config.data, self._ranks
        about = describe_latents(dataset, data.image_size, self.codec, component_digests(self.components, self._names), text=self.text,
                                 names=self._names, mirrored=data.flip, compute=self._compute)
        folder = Path(data.cache_dir) / f"latents-{fingerprint(about)[:16]}"
        encode_shards(dataset, folder, about, self.codec, self.text, device=ranks.device, rank=ranks.rank, world=ranks.world_size,
                      verify=True, max_bad=data.max_bad)
        return LatentDataset(folder, in_memory=True)

    @torch.no_grad()
    def next(self) -> Batch:
        batch = next(self._loader)
        latents = batch["latents"] if "latents" in batch else self.codec.encode(batch["images"]).float()
        return Batch(latents, self._embed(batch), batch["ids"])

    def _embed(self, batch: dict) -> list[Tensor]:
        """Embeddings of all text encoders: those that are stored, and the others' of the captions."""
        stored = dict(zip(self._stored, batch.get("text", [])))
        asked = [i for i, name in enumerate(self._names) if name not in stored]
        fresh = dict(zip(asked, self.text(batch["captions"], asked) if asked else []))
        return [fresh[i] if i in fresh else F.pad(stored[name], (0, 0, 0, self.text.lengths[i] - stored[name].shape[1]))
                for i, name in enumerate(self._names)]

    def count_bad_samples(self) -> int:
        """Bad samples that any rank has met since the start. Collective; RuntimeError on all ranks when they are too many."""
        bad = self._loader.bad
        news = gather_objects([sample for place, sample in bad.found.items() if place not in self._shared])
        for sample in (sample for part in news for sample in part):
            self._shared.add((sample.shard, sample.key))
            bad.add(sample, here=False)
        return len(bad.found)

    def close(self) -> None:
        self._loader.close()


def pixels_per_token(config: Config, factor: int) -> int:
    """Pixels that every image side is a multiple of: pixels per latent times model.patch_size."""
    return factor * (config.model.patch_size or PRESETS.get(config.model.preset, {}).get("patch_size", 1))


def wanted_buckets(config: Config, factor: int) -> list[tuple[int, int]] | None:
    """(height, width) of the buckets that the config asks for; None: it asks for none, and the images are squares or the latents' own."""
    data = config.data
    if not data.buckets and data.max_aspect == 1:
        return None
    return make_buckets(data.image_size, pixels_per_token(config, factor), data.buckets, data.max_aspect)


def check_buckets(config: Config, factor: int, buckets: list[tuple[int, int]]) -> None:
    """ValueError unless the U-ViT can be trained on every size, and the sample grid drawn."""
    for sizes in ([f"{height}x{width}" for height, width in buckets], [config.sample.size] if config.sample.size else []):
        make_buckets(config.data.image_size, pixels_per_token(config, factor), sizes)


def prepare_shards(data: DataConfig) -> str:
    """The folder of shards; draws the portraits if they are not there yet."""
    if data.shards != "portraits":
        return data.shards
    from proxt2i.data.portraits import write_portraits

    name = f"{data.num_images}x{data.image_size}px-seed{data.portraits_seed}"
    folder = Path(data.portraits_dir) / name
    if not folder.is_dir():
        partial = folder.with_name(name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        write_portraits(partial, data.num_images, data.image_size, data.portraits_seed, data.shard_size)
        os.rename(partial, folder)
    return str(folder)
