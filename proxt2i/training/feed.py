"""From the config to batches of clean latents and text embeddings."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from proxt2i.config import Config, DataConfig
from proxt2i.data.latents import encode_dataset
from proxt2i.data.shards import BatchLoader, ShardDataset, index_shards
from proxt2i.models.bundle import EMBEDDED, load_components
from proxt2i.training.distributed import Ranks, first_rank_does


@dataclass(frozen=True)
class Batch:
    """latents float32 [B, C, H, W]; text: one float32 [B, L_i, D_i] per encoder; positions int64 [B] (global, on the CPU)."""

    latents: Tensor
    text: list[Tensor]
    positions: Tensor

    def micro_batches(self, size: int):
        for start in range(0, len(self.positions), size):
            part = slice(start, start + size)
            yield Batch(self.latents[part], [embedding[part] for embedding in self.text], self.positions[part])


class Feed:
    """Endless batches of one rank from `images_seen` on, encoded by the frozen codec and text encoder."""

    def __init__(self, config: Config, ranks: Ranks, batch_size: int, dtype: torch.dtype = torch.float32):
        self.components = Path(config.model.components or EMBEDDED)
        self.text, self.codec = load_components(self.components, ranks.device, dtype)
        self.null_text = self.text([""])
        self._config, self._ranks, self._batch_size = config, ranks, batch_size

    def open(self, images_seen: int, say) -> None:
        """Find (or draw, or encode) the data; then iterate. `say(message)` reports what was found."""
        data, ranks = self._config.data, self._ranks
        folder = first_rank_does(ranks, lambda: prepare_shards(data))
        say(f"data: {folder}: {first_rank_does(ranks, lambda: index_shards(folder).summary())}")
        dataset = ShardDataset(index_shards(folder), data.image_size)  # the others read the index that rank 0 left
        place = dict(seed=self._config.train.seed, images_seen=images_seen, rank=ranks.rank, world=ranks.world_size,
                     device=ranks.device)
        if data.cache_latents:
            cache = encode_dataset(dataset, self.codec, data.cache_dir, text=self.text, device=ranks.device,
                                   rank=ranks.rank, world=ranks.world_size, max_bad=data.max_bad)
            self._loader = cache.batches(self._batch_size, **place)
        else:
            self._loader = BatchLoader(dataset, self._batch_size, num_workers=data.workers, flip=data.flip,
                                       max_bad=data.max_bad, **place)

    @torch.no_grad()
    def next(self) -> Batch:
        batch = next(self._loader)
        latents = batch["latents"] if "latents" in batch else self.codec.encode(batch["images"]).float()
        text = batch["text"] if "text" in batch else self.text(batch["captions"])
        return Batch(latents, text, batch["ids"])

    @property
    def bad_samples(self) -> int:
        return len(self._loader.bad.found)

    def close(self) -> None:
        self._loader.close()


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
