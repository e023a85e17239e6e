"""Shards: what is read is what was written, never a wrong pair, in an order that needs no state."""

import base64
import io
import json
import logging
import multiprocessing
import os
import pickle
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from proxt2i.data import index as index_module
from proxt2i.data.index import index_shards
from proxt2i.data.loader import BatchLoader
from proxt2i.data.order import Stream, flips, positions
from proxt2i.data.shards import Bad, ShardDataset, decode_image
from proxt2i.data.writing import write_samples

SIZE = 16


def picture(number: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def samples(count: int, start: int = 0):
    return [{"key": f"{i:06d}", "image": picture(i), "caption": f"picture {i}", "json": {"number": i}}
            for i in range(start, start + count)]


def encoded(image: np.ndarray, format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path, members: list[tuple[str, bytes]]) -> dict[str, int]:
    """Write the members in the given order; returns where each one's data begins."""
    offsets = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            offsets[name] = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(member, io.BytesIO(data))
    return offsets


def good(number: int, key: str | None = None) -> list[tuple[str, bytes]]:
    key = key or f"{number:06d}"
    return [(f"{key}.png", encoded(picture(number))), (f"{key}.txt", f"picture {number}".encode())]


def sample_order(num: int, seed: int, images_seen: int, batch_size: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Of one bucket."""
    return Stream(num, seed)(positions(images_seen, batch_size, rank, world))


def assert_pairs(dataset: ShardDataset) -> list[int]:
    """Every sample's caption must name its own image; returns the numbers read."""
    numbers = []
    for i in range(len(dataset)):
        sample = dataset[i]
        number = int(sample["caption"].split()[-1])
        assert (sample["image"].permute(1, 2, 0).numpy() == picture(number)).all()
        numbers.append(number)
    return numbers


# ------------------------------------------------------------------------------------------------------------
# Reading what was written.

def test_round_trip(tmp_path):
    paths = write_samples(tmp_path, samples(25), shard_size=10)
    assert [p.name for p in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    index = index_shards(tmp_path)
    dataset = ShardDataset(index, SIZE)
    assert assert_pairs(dataset) == list(range(25)) and index.dropped == {} and index.damaged == []
    assert dataset[3]["attributes"] == {"number": 3} and dataset[3]["key"] == "000003"
    assert pickle.loads(pickle.dumps(dataset))[24]["caption"] == "picture 24"


def test_shards_are_reproducible_and_webdataset_reads_them(tmp_path):
    import webdataset
    first, second = (write_samples(tmp_path / name, samples(4)) for name in "ab")
    assert first[0].read_bytes() == second[0].read_bytes()
    read = list(webdataset.WebDataset(str(first[0]), shardshuffle=False))
    assert [s["txt"].decode() for s in read] == [f"picture {i}" for i in range(4)]


def test_img2dataset_layout(tmp_path):
    about = json.dumps({"caption": "from the JSON 1", "url": "https://example.org/1.jpg", "exif": "{}"}).encode()
    write_tar(tmp_path / "00000.tar", [
        ("000000001.jpg", encoded(picture(1), "jpeg", quality=95)), ("000000001.txt", b"\xef\xbb\xbfpicture 1\n"),
        ("000000001.json", about), ("000000001.clip.npy", b"ignored"), ("README", b"ignored"),
        ("000000002.json", about), ("000000002.WEBP", encoded(picture(2), "webp", lossless=True))])
    write_tar(tmp_path / "00001.tar", [("./sub/a.jpeg", encoded(picture(3), "jpeg")), ("./sub/a.txt", "ein Bär".encode())])
    (tmp_path / "00000_stats.json").write_text("{}")
    dataset = ShardDataset(index_shards(tmp_path), SIZE)
    assert [dataset[i]["caption"] for i in range(3)] == ["picture 1", "from the JSON 1", "ein Bär"]
    assert dataset[0]["attributes"]["url"] == "https://example.org/1.jpg" and dataset[2]["attributes"] is None
    assert (dataset[1]["image"].permute(1, 2, 0).numpy() == picture(2)).all()


def test_list_of_shards(tmp_path):
    paths = write_samples(tmp_path, samples(30), shard_size=10)
    assert assert_pairs(ShardDataset(index_shards([paths[2], paths[0]]), SIZE)) == [*range(20, 30), *range(10)]
    assert len(index_shards(paths[1])) == 10


# ------------------------------------------------------------------------------------------------------------
# Damage: drop, count, name; never pair across samples or shards.

@pytest.mark.parametrize("where", ["in the image", "in the caption's header", "in the caption", "before the end mark"])
def test_truncated_shard_never_mispairs(tmp_path, where, caplog):
    members = [m for i in range(4) for m in good(i)]
    offsets = write_tar(tmp_path / "00000.tar", members)
    cut = {"in the image": offsets["000003.png"] + 100, "in the caption's header": offsets["000003.txt"] - 100,
           "in the caption": offsets["000003.txt"] + 4, "before the end mark": offsets["000003.txt"] + 512}[where]
    os.truncate(tmp_path / "00000.tar", cut)
    # The next shard restarts at the very key that was cut, caption first.
    write_tar(tmp_path / "00001.tar", [good(13, "000003")[1], good(13, "000003")[0], *good(14, "000004")])
    with caplog.at_level(logging.WARNING):
        index = index_shards(tmp_path)
    whole = where == "before the end mark"
    assert assert_pairs(ShardDataset(index, SIZE)) == [0, 1, 2] + [3] * whole + [13, 14]
    cause = {"in the caption's header": "no caption"}.get(where, "cut short")
    assert index.dropped == ({} if whole else {cause: 1})
    assert len(index.damaged) == 1 and "00000.tar ends early" in caplog.text
    assert whole or f"00000.tar/000003: {cause}" in caplog.text


def test_garbage_in_the_middle_is_reported(tmp_path):
    offsets = write_tar(tmp_path / "00000.tar", [m for i in range(4) for m in good(i)])
    with open(tmp_path / "00000.tar", "r+b") as f:
        f.seek(offsets["000002.png"] - 512)
        f.write(b"\xa5" * 512)
    index = index_shards(tmp_path)
    assert assert_pairs(ShardDataset(index, SIZE)) == [0, 1] and "ends early at byte" in index.damaged[0]


def test_incomplete_and_duplicate_samples_are_counted_by_cause(tmp_path):
    write_tar(tmp_path / "00000.tar", [
        *good(0), ("000001.txt", b"no image"), ("000002.png", encoded(picture(2))), good(3)[0], ("000003.txt", b""),
        *good(4), *good(5, "000004"), ("000006.png", encoded(picture(6))), ("000006.json", b'{"caption": null}'), *good(7)])
    (tmp_path / "00001.tar").write_bytes(b"this is no tar file" * 100)
    (tmp_path / "00002.tar").write_bytes(b"")
    index = index_shards(tmp_path)
    assert assert_pairs(ShardDataset(index, SIZE)) == [0, 7]
    assert index.dropped == {"no image": 1, "no caption": 3, "duplicate key": 1}
    assert [text.split()[0] for text in index.damaged] == ["00001.tar", "00002.tar"]
    assert "00000.tar/000001: no image" in index.summary()


def test_links_and_paths_out_of_the_folder_are_harmless(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in [("a.txt", b"x"), *good(1, "../../b")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    index = index_shards(folder)
    assert assert_pairs(ShardDataset(index, SIZE)) == [1] and index.dropped == {"no image": 1}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["0.tar", "index.jsonl", "shards"]


def bad_members() -> list[tuple[str, bytes]]:
    png, jpeg = encoded(picture(50)), encoded(picture(51, 64), "jpeg")
    broken = bytearray(png)
    broken[len(png) // 2] ^= 0xFF
    return [("bad-png.png", bytes(broken)), ("bad-png.txt", b"x"),
            ("bad-jpeg.jpg", jpeg[:len(jpeg) // 2]), ("bad-jpeg.txt", b"x"),
            ("bad-utf8.png", png), ("bad-utf8.txt", b"caf\xe9"), ("bad-json.png", png), ("bad-json.txt", b"x"),
            ("bad-json.json", b"[" * 100_000), ("bad-gif.png", encoded(picture(1), "gif")), ("bad-gif.txt", b"x"),
            ("bad-blank.png", png), ("bad-blank.txt", b" \n")]


def test_bad_samples_are_replaced_deterministically_and_named(tmp_path, caplog):
    write_tar(tmp_path / "00000.tar", [m for i in range(12) for m in good(i)] + bad_members())
    dataset = ShardDataset(index_shards(tmp_path), SIZE)
    num = len(dataset)
    reasons = {s.key: s.reason for s in (dataset[i] for i in range(num)) if isinstance(s, Bad)}
    assert num == 18 and len(reasons) == 6
    for key, text in {"bad-png": "cannot be decoded", "bad-jpeg": "truncated", "bad-utf8": "not UTF-8",
                      "bad-json": "JSON", "bad-gif": "cannot be decoded", "bad-blank": "empty caption"}.items():
        assert text in reasons[key], reasons

    def epoch(world, batch, workers=0):
        loaders = [BatchLoader(dataset, batch, seed=3, rank=r, world=world, num_workers=workers) for r in range(world)]
        read = {}
        for _ in range(num // (world * batch)):
            for loader in loaders:
                got = next(loader)
                for position, caption, key, image in zip(got["ids"].tolist(), got["captions"], got["keys"],
                                                         got["images"]):
                    number = int(caption.split()[-1])
                    expected = torch.from_numpy(picture(number)).permute(2, 0, 1) / 127.5 - 1
                    torch.testing.assert_close(image, expected)
                    read[position] = key
        for loader in loaders:
            loader.close()
        assert len({bad.key for loader in loaders for bad in loader.bad.found.values()}) == 6
        return read

    with caplog.at_level(logging.WARNING):
        one = epoch(1, 6, workers=1)
    assert "00000.tar/bad-" in caplog.text and "6 bad samples" in caplog.text
    assert one == epoch(2, 3) == epoch(3, 2)
    order = sample_order(num, 3, 0, num)
    for position, index in enumerate(order):
        while dataset.index.key(index) in reasons:            # the documented rule: the next one in the epoch's order
            index = order[(list(order).index(index) + 1) % num]
        assert one[position] == dataset.index.key(index)


def test_too_many_bad_samples_stop(tmp_path):
    write_tar(tmp_path / "00000.tar", [*good(0), *bad_members()])
    dataset = ShardDataset(index_shards(tmp_path), SIZE)
    with pytest.raises(RuntimeError, match="bad samples.*budget of 2"):
        with BatchLoader(dataset, 7, num_workers=0, max_bad=2) as loader:
            next(loader)
    write_tar(tmp_path / "00000.tar", bad_members())
    dataset = ShardDataset(index_shards(tmp_path), SIZE)
    with pytest.raises(RuntimeError, match="budget"):         # not one good sample: must end, not search for ever
        next(BatchLoader(dataset, 2, num_workers=0))


def test_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    bomb = encoded(np.zeros((3000, 3000, 3), np.uint8))
    write_tar(tmp_path / "0.tar", [("bomb.png", bomb), ("bomb.txt", b"x"), *good(0)])
    index = index_shards(tmp_path)
    from PIL import ImageFile
    original = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load",
                        lambda self: pytest.fail("decoded") if self.width > SIZE else original(self))
    bad = ShardDataset(index, SIZE, max_pixels=1_000_000)[0]
    assert isinstance(bad, Bad) and "3000 x 3000 pixels" in bad.reason
    bad = ShardDataset(index, SIZE, max_bytes=len(bomb) - 1)[0]
    assert isinstance(bad, Bad) and "bytes" in bad.reason


def test_a_byte_that_changes_after_indexing_is_found_though_the_picture_decodes(tmp_path):
    """JPEG has no checksum of its own: a flipped bit gives another picture."""
    offsets = write_tar(tmp_path / "0.tar", [("a.jpg", jpeg := encoded(picture(1, 64), "jpeg")), ("a.txt", b"x"), *good(0)])
    index, stat = index_shards(tmp_path), os.stat(tmp_path / "0.tar")
    with open(tmp_path / "0.tar", "r+b") as f:
        f.seek(offsets["a.jpg"] + len(jpeg) // 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 4]))
    os.utime(tmp_path / "0.tar", ns=(stat.st_mtime_ns, stat.st_mtime_ns))     # as a failing disk does it
    bad, fine = ShardDataset(index, 64)[0], ShardDataset(index, SIZE)[1]
    assert isinstance(bad, Bad) and "CRC-32 differs" in bad.reason and fine["caption"] == "picture 0"


def test_bad_samples_are_listed_once_however_often_they_are_met(tmp_path):
    write_tar(tmp_path / "00000.tar", [m for i in range(12) for m in good(i)] + bad_members())
    dataset, listed = ShardDataset(index_shards(tmp_path), SIZE), tmp_path / "run" / "bad_samples.jsonl"
    for _ in range(2):                                        # a run, and its continuation
        with BatchLoader(dataset, 9, num_workers=0, bad_list=listed) as loader:
            for _ in range(5):
                next(loader)
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(lines) == len(loader.bad.found) == 6 and {line["shard"] for line in lines} == {"00000.tar"}
    assert {line["key"]: line["reason"] for line in lines}["bad-blank"] == "empty caption"


@pytest.mark.parametrize("how", ["a file that nobody answers for", "a stopped process"])
def test_a_loader_that_hangs_is_ended_and_its_shard_named(tmp_path, how):
    write_samples(tmp_path, samples(40), shard_size=10)
    dataset = ShardDataset(index_shards(tmp_path), SIZE)
    loader = BatchLoader(dataset, 4, num_workers=1, timeout_s=3.0)
    if how == "a stopped process":
        next(loader)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGSTOP)
    else:
        (tmp_path / "00002.tar").unlink()
        os.mkfifo(tmp_path / "00002.tar")                     # opening it blocks, as on a file server that is gone
    with pytest.raises(RuntimeError, match=r"no batch of data for 3 s \(data.timeout_s\): loader process \d+ hangs") as error:
        for _ in range(30):
            next(loader)
    assert multiprocessing.active_children() == []            # the error comes after its processes have gone: none dies later
    if how != "a stopped process":
        assert f"{tmp_path / '00002.tar'}, sample 00002" in str(error.value)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 3 and multiprocessing.active_children() == []


def test_a_shard_that_changes_under_the_reader_is_an_error(tmp_path):
    paths = write_samples(tmp_path, samples(4))
    index = index_shards(tmp_path)
    write_samples(tmp_path, samples(4, start=10), overwrite=True)
    with pytest.raises(RuntimeError, match="has changed since it was indexed"):
        ShardDataset(index, SIZE)[0]
    assert paths[0].exists()


# ------------------------------------------------------------------------------------------------------------
# Images.

def test_images_become_upright_rgb_on_white_centre_cropped():
    left_red = np.zeros((8, 16, 3), np.uint8)
    left_red[:, :8] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6                                          # stored turned: rotate by 90 degrees clockwise to show
    upright = decode_image(encoded(left_red, "png", exif=exif), (8, 8))
    assert upright.shape == (8, 8, 3) and (upright[0, :, 0] > 200).all() and (upright[-1, :, 0] < 50).all()

    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(buffer, "png")
    assert (decode_image(buffer.getvalue(), (8, 8)) == 255).all()
    grey = decode_image(encoded(np.full((8, 8), 40 * 256, np.uint16)), (8, 8))
    assert (grey == 40).all()
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert (decode_image(encoded(wide), (20, 20)) == 200).all()
    assert decode_image(encoded(wide), (32, 64)).shape == (32, 64, 3)
    assert decode_image(encoded(np.zeros((1, 9000, 3), np.uint8)), (32, 32)).shape == (32, 32, 3)


def test_large_jpegs_are_halved_in_the_decoder_almost_unseen():
    y, x = np.mgrid[0:640, 0:480]
    smooth = np.stack([x * 255 // 480, y * 255 // 640, (x + y) * 255 // 1120], -1).astype(np.uint8)
    jpeg = encoded(smooth, "jpeg", quality=95)
    with Image.open(io.BytesIO(jpeg)) as image:
        expected = np.asarray(ImageOps.fit(image, (64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decode_image(jpeg, (64, 64)) - expected).max() <= 3


# ------------------------------------------------------------------------------------------------------------
# Order.

@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_an_epoch_on_any_number_of_ranks(world):
    num, batch = 60, 60 // world // 5
    epochs = []
    for epoch in range(2):
        seen = np.concatenate([sample_order(num, 7, epoch * num + step * batch * world, batch, rank, world)
                               for step in range(5) for rank in range(world)])
        assert sorted(seen) == list(range(num))
        epochs.append(seen)
    assert (epochs[0] != epochs[1]).any() and (epochs[0] == sample_order(num, 7, 0, num)).all()


def test_resume_at_any_point_onto_another_world_size():
    reference = Stream(23, seed=5)(np.arange(23 * 4))
    rng = np.random.default_rng(0)
    seen, got = 0, []
    while seen + 12 <= len(reference):                        # each step on a fresh loader: only images_seen survives
        world, batch = [(1, 12), (2, 6), (3, 4), (4, 1), (1, 1)][rng.integers(5)]
        got += [sample_order(23, 5, seen, batch, rank, world) for rank in range(world)]
        seen += world * batch
    assert (np.concatenate(got) == reference[:seen]).all() and seen > 23 * 3


def test_order_is_pinned_and_depends_on_seed():
    assert sample_order(10, 0, 0, 10).tolist() == [3, 4, 8, 9, 6, 0, 5, 7, 2, 1]  # a changed order would break every resumed run
    assert sample_order(1000, 0, 0, 1000).tolist() != sample_order(1000, 1, 0, 1000).tolist()
    for bad in ({"batch_size": 0}, {"images_seen": -1}, {"rank": 2, "world": 2}):
        with pytest.raises(ValueError):
            positions(**{"images_seen": 0, "batch_size": 1, **bad})


def test_loader_resumes_where_another_stopped(tmp_path):
    write_samples(tmp_path, samples(20), shard_size=7)
    dataset = ShardDataset(index_shards(tmp_path), SIZE)
    with BatchLoader(dataset, 6, seed=1, num_workers=2, flip=True) as loader:
        whole = [next(loader) for _ in range(6)]
        assert loader.images_seen == 36
        loader.close()                                        # and continues after a close
        assert multiprocessing.active_children() == []
        whole.append(next(loader))
    assert multiprocessing.active_children() == []
    for world in (1, 2, 3):
        loaders = [BatchLoader(dataset, 6 // world, seed=1, images_seen=18, rank=r, world=world, num_workers=0, flip=True)
                   for r in range(world)]
        for step in range(3, 7):
            parts = [next(loader) for loader in loaders]
            assert torch.equal(torch.cat([p["images"] for p in parts]), whole[step]["images"])
            assert torch.equal(torch.cat([p["ids"] for p in parts]), torch.arange(step * 6, step * 6 + 6))
            assert sum([p["captions"] for p in parts], []) == whole[step]["captions"]


def test_loader_leaves_the_global_generator_alone(tmp_path):
    write_samples(tmp_path, samples(4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with BatchLoader(ShardDataset(index_shards(tmp_path), SIZE), 2, num_workers=1) as loader:
        next(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_flips_mirror_about_half_keyed_by_position(tmp_path):
    coin = flips(3, np.arange(4000))
    assert 0.46 < coin.mean() < 0.54 and (coin[100:200] == flips(3, np.arange(100, 200))).all()
    assert 0.46 < (coin ^ flips(4, np.arange(4000))).mean() < 0.54
    write_samples(tmp_path, samples(8))
    dataset = ShardDataset(index_shards(tmp_path), SIZE)
    plain, flipped = (next(BatchLoader(dataset, 8, seed=3, num_workers=0, flip=flip))["images"] for flip in (False, True))
    expected = [image.flip(-1) if turn else image for image, turn in zip(plain, coin)]
    assert torch.equal(flipped, torch.stack(expected)) and coin[:8].any() and not coin[:8].all()


# ------------------------------------------------------------------------------------------------------------
# The cached index, and writing.

def test_index_cache_is_reused_and_rebuilt(tmp_path, monkeypatch):
    write_samples(tmp_path, samples(20), shard_size=10)
    scanned = []
    original = index_module._scan
    monkeypatch.setattr(index_module, "_scan", lambda path: scanned.append(path.name) or original(path))
    digest = index_shards(tmp_path).digest
    assert scanned == ["00000.tar", "00001.tar"]
    assert index_shards(tmp_path).digest == digest and len(scanned) == 2

    os.utime(tmp_path / "00001.tar", ns=(1, 1))
    assert index_shards(tmp_path).digest == digest and scanned[2:] == ["00001.tar"]
    cache = tmp_path / "index.jsonl"
    lines = cache.read_text().splitlines()
    entry = json.loads(lines[0])
    for garbage in (b"\xff\x00garbage", b"", b"[]\n{}\n", lines[0][:40].encode() + b"\n" + lines[1].encode(),
                    json.dumps({**entry, "spans": entry["spans"][64:]}).encode(),
                    json.dumps({**entry, "sizes": entry["sizes"][::-1] + "!"}).encode(),
                    json.dumps({**entry, "spans": base64.b64encode(np.full(60, 10**9).tobytes()).decode()}).encode(),
                    json.dumps({**entry, "version": 1}).encode() + b"\n" + lines[1].encode()):
        cache.write_bytes(garbage)
        assert index_shards(tmp_path).digest == digest
        assert cache.read_text().splitlines() == lines
    (tmp_path / "00002.tar").write_bytes((tmp_path / "00000.tar").read_bytes())
    count = len(scanned)
    assert len(index_shards(tmp_path)) == 30 and scanned[count:] == ["00002.tar"]


def test_index_of_a_read_only_folder_is_cached_elsewhere(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "shards", tmp_path / "cache"
    write_samples(folder, samples(3))
    (folder / "index.jsonl").mkdir()                          # cannot be written; chmod does not stop root
    assert len(index_shards(folder, cache_dir=elsewhere)) == 3
    monkeypatch.setattr(index_module, "_scan", lambda path: pytest.fail("scanned again"))
    assert len(index_shards(folder, cache_dir=elsewhere)) == 3


def test_a_killed_indexing_keeps_the_shards_that_it_has_read(tmp_path, monkeypatch):
    write_samples(tmp_path, samples(8), shard_size=2)
    original, scanned = index_module._scan, []

    def scan(path):
        if path.name == "00002.tar" and os.getpid() != parent:
            os._exit(9)                                       # as kill -9 would: no clean-up
        scanned.append(path.name)
        return original(path)

    parent = os.getpid()
    monkeypatch.setattr(index_module, "_scan", scan)
    if (pid := os.fork()) == 0:
        index_shards(tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with open(tmp_path / "index.jsonl", "a") as f:
        f.write('\n{"version": 2, "name": "00002')            # a line cut short
    assert assert_pairs(ShardDataset(index_shards(tmp_path), SIZE)) == list(range(8)) and scanned == ["00002.tar", "00003.tar"]


def test_scanning_in_processes_gives_the_same_index(tmp_path):
    write_samples(tmp_path, samples(12), shard_size=2)
    digest = index_shards(tmp_path, num_workers=2).digest
    (tmp_path / "index.jsonl").unlink()
    assert index_shards(tmp_path, num_workers=0).digest == digest


def test_killed_write_leaves_no_shard(tmp_path):
    def dying():
        yield from samples(5)
        os._exit(9)                                           # as kill -9 would: no clean-up
    if (pid := os.fork()) == 0:
        write_samples(tmp_path, dying(), shard_size=2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = list(tmp_path.iterdir())
    assert left and not [p for p in left if p.suffix == ".tar"]
    (tmp_path / ".index.jsonl.tmp-1").write_text("half an ind")
    with pytest.raises(ValueError, match="no .tar shard"):
        index_shards(tmp_path)
    write_samples(tmp_path, samples(5), shard_size=2)
    assert assert_pairs(ShardDataset(index_shards(tmp_path), SIZE)) == list(range(5))


def test_write_refuses_what_it_cannot_mend(tmp_path):
    write_samples(tmp_path, samples(30), shard_size=10)
    with pytest.raises(ValueError, match="already holds 3 shards"):
        write_samples(tmp_path, samples(3))
    write_samples(tmp_path, samples(3), overwrite=True)       # the old second and third shard must not linger
    assert len(index_shards(tmp_path)) == 3
    for bad in ([{**samples(1)[0], "key": "a.b"}], samples(1) * 2, []):
        with pytest.raises(ValueError, match="key|no samples"):
            write_samples(tmp_path / "new", bad)
        assert list((tmp_path / "new").iterdir()) == []


def test_missing_or_empty_data_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist.*img2dataset.*data.shards=portraits"):
        index_shards(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"no .tar shard in {tmp_path}.*data.shards=portraits"):
        index_shards(tmp_path)
    write_tar(tmp_path / "0.tar", [("a.txt", b"x"), ("b.pkl", pickle.dumps(1))])
    with pytest.raises(ValueError, match=f"{tmp_path}: no usable sample.*2 no image"):
        index_shards(tmp_path)
    for url in ("pipe:curl -s https://example.org/0.tar", "https://example.org/0.tar", "s3://bucket/shards"):
        with pytest.raises(ValueError, match="local files"):
            index_shards(url)
        with pytest.raises(ValueError, match="local files"):
            index_shards([url])
    with pytest.raises(ValueError, match="does not exist"):
        index_shards([tmp_path / "7.tar"])
