"""Data: shards of image-caption pairs or of their latents, and batches of them in a resumable order."""

from proxt2i.data.index import ShardIndex, index_shards
from proxt2i.data.loader import BatchLoader
from proxt2i.data.shards import Bad, ShardDataset
from proxt2i.data.writing import write_samples

__all__ = ["Bad", "BatchLoader", "ShardDataset", "ShardIndex", "index_shards", "write_samples"]
