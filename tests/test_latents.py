"""The latents' cache equals direct encoding, survives damage, and draws the same samples as the image loader."""

import io
import logging
import os
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from proxt2i.data.index import index_shards, write_samples
from proxt2i.data.latents import encode_dataset, weights_digest
from proxt2i.data.shards import BatchLoader, ShardDataset

SIZE = 16


class Codec(nn.Module):
    """Stands in for a LatentCodec: four latent channels at a quarter of the size; counts the images it encodes."""

    def __init__(self, seed: int = 0, scale: float = 0.5):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.scale, self._encoded = nn.Conv2d(3, 4, 4, stride=4), scale, 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
        self._encoded += len(images)
        return self.conv(images) * self.scale


class Text:
    """Stands in for a TextEncoder with two towers."""

    def __call__(self, captions: list[str]) -> list[torch.Tensor]:
        numbers = torch.tensor([float(len(c)) for c in captions])
        return [numbers[:, None, None].expand(-1, 3, 2), torch.tensor([hash_of(c) for c in captions])[:, None, None]]


def hash_of(caption: str) -> float:
    return sum(caption.encode()) / 8


@pytest.fixture
def dataset(tmp_path) -> ShardDataset:
    rng = np.random.default_rng(0)
    write_samples(tmp_path / "shards", [
        {"key": f"{i:03d}", "image": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), "caption": f"picture {i}"}
        for i in range(50)], shard_size=20)
    return ShardDataset(index_shards(tmp_path / "shards"), SIZE)


def direct(dataset: ShardDataset, codec: Codec) -> torch.Tensor:
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    with torch.no_grad():
        return codec.encode(images.float() / 127.5 - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cache_equals_direct_encoding(dataset, tmp_path, dtype):
    codec = Codec()
    cache = encode_dataset(dataset, codec, tmp_path, batch_size=7, chunk_size=16, dtype=dtype)
    assert cache.latents.dtype == dtype and codec._encoded == 50
    torch.testing.assert_close(cache.latents.float(), direct(dataset, codec), rtol=0, atol=1e-3 if dtype.itemsize == 2 else 1e-6)
    assert cache.captions == [f"picture {i}" for i in range(50)] and cache.keys[49] == "049"
    again = encode_dataset(dataset, codec, tmp_path, batch_size=7, chunk_size=16, dtype=dtype)
    assert codec._encoded == 100 and torch.equal(again.latents, cache.latents)      # 50 of them by direct()


def test_batches_are_those_of_the_image_loader(dataset, tmp_path):
    codec = Codec()
    cache = encode_dataset(dataset, codec, tmp_path, dtype=torch.float32)
    images = BatchLoader(dataset, 8, seed=2, images_seen=24, rank=1, world=2, num_workers=0)
    latents = cache.batches(8, seed=2, images_seen=24, rank=1, world=2)
    for _ in range(8):
        expected, got = next(images), next(latents)
        with torch.no_grad():
            torch.testing.assert_close(got["latents"], codec.encode(expected["images"]), rtol=0, atol=1e-6)
        assert got["captions"] == expected["captions"] and got["keys"] == expected["keys"]
        assert torch.equal(got["ids"], expected["ids"]) and got["ids"].dtype == torch.int64
        assert latents.images_seen == images.images_seen and "text" not in got


def test_text_is_cached_on_request(dataset, tmp_path):
    cache = encode_dataset(dataset, Codec(), tmp_path, text=Text(), chunk_size=16)
    batch = next(cache.batches(5))
    for got, expected in zip(batch["text"], Text()(batch["captions"]), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_bad_samples_are_left_out_as_by_the_image_loader(dataset, tmp_path, caplog):
    shard = dataset.index.shards[0]
    with tarfile.open(shard, "a") as tar:
        for name, data in [("bad.png", b"\x89PNG\r\n\x1a\n but no more"), ("bad.txt", b"no picture")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    dataset = ShardDataset(index_shards(shard.parent), SIZE)
    with caplog.at_level(logging.WARNING):
        cache = encode_dataset(dataset, Codec(), tmp_path, chunk_size=16)
    assert len(dataset) == 51 and cache.usable.sum() == 50 and "00000.tar/bad: image cannot be decoded" in caplog.text
    images, latents = BatchLoader(dataset, 17, num_workers=0), cache.batches(17)
    keys = [key for _ in range(3) for key in next(latents)["keys"]]
    assert keys == [key for _ in range(3) for key in next(images)["keys"]] and "bad" not in keys
    with pytest.raises(RuntimeError, match="budget of 0"):
        encode_dataset(dataset, Codec(), tmp_path, chunk_size=16, max_bad=0)


@pytest.mark.parametrize("damage", ["cut", "flipped byte", "empty", "garbage", "other chunk", "lost"])
def test_damaged_chunk_is_encoded_again(dataset, tmp_path, damage, caplog):
    codec = Codec()
    cache = encode_dataset(dataset, codec, tmp_path, chunk_size=16)
    paths = sorted(tmp_path.glob("latents-*/*.safetensors"))
    data = bytearray(paths[1].read_bytes())
    (paths[0].parent / ".00000.safetensors.tmp-1").write_bytes(b"left by a killed run")
    if damage == "flipped byte":
        data[-100] ^= 1
    paths[1].write_bytes({"cut": data[:-50], "empty": b"", "garbage": os.urandom(4096), "flipped byte": data,
                          "other chunk": paths[3].read_bytes(), "lost": b""}[damage])
    if damage == "lost":
        paths[1].unlink()
    with caplog.at_level(logging.WARNING):
        again = encode_dataset(dataset, codec, tmp_path, chunk_size=16)
    assert len(paths) == 4 and codec._encoded == 50 + 16 and torch.equal(again.latents, cache.latents)
    assert again.captions == cache.captions and (damage == "lost" or "00001.safetensors is damaged" in caplog.text)


def test_ranks_share_the_work(dataset, tmp_path):
    codecs = [Codec(), Codec()]
    caches = {}

    def run(rank):
        caches[rank] = encode_dataset(dataset, codecs[rank], tmp_path, rank=rank, world=2, chunk_size=16)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [codec._encoded for codec in codecs] == [32, 18]
    assert torch.equal(caches[0].latents, caches[1].latents) and caches[0].captions == caches[1].captions
    alone = Codec()                                           # another number of ranks reads the same chunks
    assert torch.equal(encode_dataset(dataset, alone, tmp_path, chunk_size=16).latents, caches[0].latents)
    assert alone._encoded == 0


def test_a_missing_rank_is_named(dataset, tmp_path):
    with pytest.raises(RuntimeError, match="waited.*00001.safetensors, which rank 1 encodes"):
        encode_dataset(dataset, Codec(), tmp_path, rank=0, world=2, chunk_size=16, timeout_s=0.2)


def test_any_change_of_data_or_weights_encodes_anew(dataset, tmp_path):
    def encoded(dataset, codec, **options):
        encode_dataset(dataset, codec, tmp_path, **options)
        return codec._encoded
    assert encoded(dataset, Codec()) == 50 and encoded(dataset, Codec()) == 0
    assert encoded(dataset, Codec(seed=1)) == 50
    assert encoded(dataset, Codec(scale=0.25)) == 50
    assert encoded(dataset, Codec(), dtype=torch.float32) == 50
    assert encoded(ShardDataset(dataset.index, 2 * SIZE), Codec()) == 50
    os.utime(dataset.index.shards[0], ns=(5, 5))
    assert encoded(ShardDataset(index_shards(dataset.index.shards[0].parent), SIZE), Codec()) == 50
    with pytest.raises(ValueError, match="float16 or float32"):
        encode_dataset(dataset, Codec(), tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="not finite"):
        encode_dataset(dataset, Codec(scale=1e6), tmp_path)


def test_weights_digest_looks_into_attributes():
    class Holder:
        def __init__(self, seed=0, shift=0.0):
            self.vae, self.shift, self.device = Codec(seed), shift, "cpu"
    digests = {weights_digest(h) for h in (Holder(), Holder(1), Holder(shift=0.5))}
    assert len(digests) == 3 and weights_digest(Holder()) in digests


def test_a_cached_batch_costs_next_to_nothing(tmp_path):
    image = Image.new("RGB", (8, 8))
    write_samples(tmp_path, [{"key": str(i), "image": image, "caption": "x"} for i in range(512)])

    class Portraits:
        def encode(self, images):
            return torch.zeros(len(images), 16, 8, 8)
    loader = encode_dataset(ShardDataset(index_shards(tmp_path), 8), Portraits(), tmp_path / "cache").batches(64)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3
