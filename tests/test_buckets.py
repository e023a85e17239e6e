"""Aspect-ratio buckets: which sizes, which picture goes where, and an order of whole batches of one shape that loses no sample."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from runs import overrides
from tiny_run import make_trainer

from proxt2i.data.buckets import assign, make_buckets, parse_size
from proxt2i.data.index import index_shards, picture_size
from proxt2i.data.loader import BatchLoader
from proxt2i.data.order import BatchOrder, permutation
from proxt2i.data.shards import ShardDataset
from proxt2i.data.writing import write_samples
from proxt2i.train import main

COUNTS = [23, 40, 0, 9, 2]                                    # samples a bucket: one is empty, one is smaller than a batch


@pytest.fixture
def bucket():
    return np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS)).astype(np.int16)


# ------------------------------------------------------------------------------------------------------------
# Sizes.

def test_made_buckets_have_about_the_area_and_every_shape_once():
    assert make_buckets(64, 16) == [(64, 64)] and make_buckets(64, 16, max_aspect=2) == [(48, 80), (64, 64), (80, 48)]
    for size, step, aspect in [(256, 16, 2.0), (512, 16, 3.0), (1024, 64, 4.0), (96, 16, 1.5)]:
        buckets = make_buckets(size, step, max_aspect=aspect)
        ratios = [h / w for h, w in buckets]
        assert (size, size) in buckets and ratios == sorted(set(ratios)) and len(buckets) > 2
        assert {(w, h) for h, w in buckets} == set(buckets)
        for height, width in buckets:
            assert height % step == width % step == 0 and 1 / aspect <= height / width <= aspect
            assert size**2 - step * max(height, width) < height * width <= size**2
    assert make_buckets(64, 8, ["80x48", "48x80"]) == [(48, 80), (80, 48)]
    for arguments, message in [((60, 16), "multiple of 16"), ((64, 16, ["64x40"]), "64x40.*multiples of 16"), ((64, 16, ["64x64", "64x64"]), "twice"),
                               ((64, 16, ["0x64"]), "multiples"), ((64, 16, ["64"]), "HEIGHTxWIDTH"), ((8192, 2, (), 16.0), "too many")]:
        with pytest.raises(ValueError, match=message):
            make_buckets(*arguments)
    assert parse_size("320x192") == (320, 192)


def test_a_picture_goes_to_the_bucket_of_the_nearest_shape():
    buckets = make_buckets(256, 16, max_aspect=2)
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4000, (500, 2))
    nearest = [min(range(len(buckets)), key=lambda b: abs(np.log(h / w) - np.log(buckets[b][0] / buckets[b][1]))) for h, w in sizes]
    assert assign(sizes, buckets).tolist() == nearest
    assert [buckets[b] for b in assign(np.array([[0, 0], [10, 1000], [3000, 10]]), buckets)] == [(256, 256), buckets[0], buckets[-1]]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("orientation, size", [(None, (20, 30)), (3, (20, 30)), (6, (30, 20)), (8, (30, 20))])
def test_sizes_are_read_from_headers_and_upright(format, orientation, size, monkeypatch):
    from PIL import ImageFile

    exif, buffer = Image.Exif(), io.BytesIO()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(buffer, format, **({"exif": exif} if orientation else {}))
    if not (format == "png" and orientation):                 # Pillow decodes a PNG before it tells of a note on orientation
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert picture_size(buffer.getvalue()) == size
    assert picture_size(buffer.getvalue()[:10]) == (0, 0)


# ------------------------------------------------------------------------------------------------------------
# Order.

def steps(bucket, step_size, count, world=1, start=0, seed=5):
    """(bucket, samples of all ranks) of `count` steps, each from an order made anew: only images_seen survives."""
    done = []
    for number in range(start, start + count):
        parts = []
        for rank in range(world):
            order = BatchOrder(bucket, seed, step_size)
            chosen, places = order.step(number * step_size, step_size // world, rank, world)
            parts.append((chosen, order.samples(chosen, places)))
        assert len({chosen for chosen, _ in parts}) == 1      # one shape on all ranks
        done.append((parts[0][0], np.concatenate([samples for _, samples in parts]).tolist()))
    return done


def test_batches_are_of_one_bucket_and_the_same_on_any_number_of_ranks(bucket):
    reference = steps(bucket, 6, 60)
    for chosen, samples in reference:
        assert len(samples) == 6 and (bucket[samples] == chosen).all()
    assert len({chosen for chosen, _ in reference}) == 4
    for world in (2, 3, 6):
        assert steps(bucket, 6, 20, world, start=13) == reference[13:33]


def test_every_sample_once_an_epoch_but_for_less_than_a_batch_of_each_bucket(bucket):
    """After e epochs: seen e times, or, fewer than B samples of a bucket, less often; those come first in its next batch."""
    step_size, num = 6, len(bucket)
    order, seen, number = BatchOrder(bucket, 5, step_size), Counter(), 0
    for epoch in range(1, 60):
        while order._epoch_of(number) < epoch:
            chosen, places = order.step(number * step_size, step_size)
            seen.update(order.samples(chosen, places).tolist())
            number += 1
        for b, count in enumerate(COUNTS):
            times = np.array([seen[i] for i in np.flatnonzero(bucket == b)])
            assert (times <= epoch).all() and (epoch - times).sum() < step_size, (epoch, b, times)
    assert min(seen[i] for i in range(num)) > 50              # none is lost for ever
    assert number * step_size <= 59 * num


def test_one_bucket_is_a_plain_permutation_an_epoch():
    order = BatchOrder(np.zeros(20, dtype=int), 3, 6)
    seen = [i for step in range(20) for i in order.samples(*order.step(step * 6, 6))]
    assert seen == [i for epoch in range(6) for i in permutation(20, 3, epoch)]


def test_the_order_is_pinned(bucket):
    """A changed order would break every resumed run."""
    order = BatchOrder(np.array([0, 1] * 8), 0, 4)
    assert [(b, order.samples(b, places).tolist()) for b, places in (order.step(4 * s, 4) for s in range(4))] == [
        (1, [5, 13, 9, 1]), (1, [3, 15, 11, 7]), (0, [6, 8, 12, 0]), (0, [10, 14, 4, 2])]
    assert [s[0] for s in steps(bucket, 6, 40, seed=1)] != [s[0] for s in steps(bucket, 6, 40, seed=2)]


def test_another_batch_size_goes_on_and_still_loses_nothing(bucket):
    order, seen = BatchOrder(bucket, 5, 6), Counter()
    for number in range(130):                                 # the run had seen 9 images in steps of another size
        chosen, places = order.step(9 + number * 6, 6)
        seen.update(order.samples(chosen, places).tolist())
    assert len(seen) == len(bucket) and max(seen.values()) - min(seen.values()) <= 4


# ------------------------------------------------------------------------------------------------------------
# From shards to training.

@pytest.fixture
def shards(tmp_path):
    """60 pictures in three shapes whose colour tells the number."""
    samples = []
    for i in range(60):
        size = [(32, 32), (64, 32), (32, 64)][i % 3]
        samples.append({"key": f"{i:03d}", "image": Image.new("RGB", size, (i, 2 * i, 255 - i)), "caption": "a red square"})
    write_samples(tmp_path / "shards", samples, shard_size=25)
    return tmp_path / "shards"


def test_the_loader_cuts_pictures_to_their_bucket(shards):
    dataset = ShardDataset(index_shards(shards), 32, buckets=[(16, 32), (32, 32), (32, 16)])
    shapes = Counter()
    with BatchLoader(dataset, 4, seed=1, num_workers=1) as one:
        two = [BatchLoader(dataset, 2, seed=1, images_seen=12, rank=rank, world=2, num_workers=0) for rank in range(2)]
        whole = [next(one) for _ in range(15)]                # an epoch: five batches of each shape
        for batch in whole:
            numbers = [int(key) for key in batch["keys"]]
            shape = tuple(batch["images"].shape[2:])
            assert {[(32, 32), (16, 32), (32, 16)][n % 3] for n in numbers} == {shape}
            colours = ((batch["images"].mean((2, 3)) + 1) * 127.5).round().int().tolist()
            assert colours == [[n, 2 * n, 255 - n] for n in numbers]
            shapes[shape] += 1
        for batch in whole[3:]:
            parts = [next(loader) for loader in two]
            assert torch.equal(torch.cat([part["images"] for part in parts]), batch["images"])
            assert torch.equal(torch.cat([part["ids"] for part in parts]), batch["ids"])
    assert shapes == {(32, 32): 5, (16, 32): 5, (32, 16): 5}


@pytest.mark.parametrize("cached", ["true", "false"])
def test_training_on_buckets_counts_the_tokens_of_their_shapes(shards, settings, ranks, tmp_path, cached):
    changes = dict(data__shards=shards, data__buckets="[16x32,32x32,32x16]", data__cache_latents=cached, data__workers=0, data__flip="true",
                   data__cache_dir=tmp_path / "cache", train__images=192, train__log_every=192, sample__every=192, sample__size="16x32")
    trainer = make_trainer(settings, ranks, **changes)
    counted = []
    add = None

    def open_and_watch(*arguments):
        nonlocal add
        opened(*arguments)
        add = trainer.feed.next
        trainer.feed.next = lambda: counted.append(add()) or counted[-1]

    opened, trainer.feed.open = trainer.feed.open, open_and_watch
    assert trainer.run() == 0
    shapes = Counter(tuple(batch.latents.shape[2:]) for batch in counted)
    assert set(shapes) == {(4, 4), (2, 4), (4, 2)}
    (row,) = [json.loads(line) for line in (trainer.run_dir / "stats.jsonl").read_text().splitlines()]
    patch = trainer.uvit.config.patch_size
    tokens = sum(16 * count * (2 + 4 + h * w // patch**2) for (h, w), count in shapes.items())
    assert row["tokens_per_s"] / row["images_per_s"] == pytest.approx(tokens / 192)
    with Image.open(trainer.run_dir / "samples" / "000000192.png") as grid:
        assert grid.size == (64, 32)                          # 2 x 2 pictures of 16 x 32
    with pytest.raises(ValueError, match="24x32: both sides must be multiples of 16"):
        make_trainer(settings, ranks, **{**changes, "sample__size": "24x32", "train__run_dir": tmp_path / "other"}).run()


def test_a_dry_run_of_buckets(shards, settings, capsys):
    assert main(["--dry-run", *overrides(settings, data__shards=shards, data__max_aspect=2, data__image_size=64)]) == 0
    output = capsys.readouterr().out
    assert "3 sizes: 48x80 (20), 64x64 (20), 80x48 (20)" in output and "the mean of all sizes is" in output
