"""Data: shards of image-caption pairs, batches of them in a resumable order, and caches of their latents."""

from proxt2i.data.index import ShardIndex, index_shards, write_samples
from proxt2i.data.latents import LatentCache, encode_dataset
from proxt2i.data.shards import Bad, BatchLoader, ShardDataset, sample_order

__all__ = ["Bad", "BatchLoader", "LatentCache", "ShardDataset", "ShardIndex", "encode_dataset", "index_shards",
           "sample_order", "write_samples"]
