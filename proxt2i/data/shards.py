"""Training batches from WebDataset tar shards."""

from proxt2i.data.index import ShardIndex, index_shards, write_samples

__all__ = ["ShardIndex", "index_shards", "write_samples"]
