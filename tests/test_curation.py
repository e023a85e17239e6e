"""Curation: planted faults are caught under their own cause and nothing good is lost, whoever does which part, and however often it is killed."""

import fcntl
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faulty_shards import assert_as_expected, die_of_seven, encoded, picture, read_result, write_faulty_shards
from PIL import Image

from proxt2i.curation import dedup, pictures, samples
from proxt2i.curation.__main__ import main, task_of
from proxt2i.curation.config import load_curation
from proxt2i.curation.hashes import perceptual_hashes, thumbnails
from proxt2i.curation.samples import Chunk, Rules
from proxt2i.curation.scan import record_dtype
from proxt2i.curation.sources import IMAGE, Raw, find_units
from proxt2i.curation.workers import Workers
from proxt2i.data.index import index_shards
from proxt2i.data.shards import ShardDataset

SMALL = ["filter.min_short=64", "write.shard_size=120", "write.held_out=0.1", "--quiet"]


def files_of(out: Path) -> dict[str, bytes]:
    """Every file of a result; an index's entries without the times of their shards."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "index.jsonl":
            data = json.dumps([{**json.loads(line), "mtime_ns": 0} for line in data.splitlines()]).encode()
        found[str(path.relative_to(out))] = data
    return found


def curate(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty") / "shards"
    return folder, write_faulty_shards(folder, 400, per_shard=50, short=64)


@pytest.fixture(scope="module")
def curated(faulty, tmp_path_factory):
    out = tmp_path_factory.mktemp("curated") / "out"
    assert curate(faulty[0], out, *SMALL, "run.workers=2") == 0
    return out


# -- the whole --------------------------------------------------------------------------------------------------------


def test_every_fault_under_its_own_cause_and_nothing_good_lost(faulty, curated):
    assert_as_expected(curated, faulty[1])
    assert len(faulty[1]["dropped"]) == 12 and len(faulty[1]["repaired"]) == 3 and faulty[1]["repeated_keys"]


def test_the_training_reader_reads_the_result(faulty, curated):
    expected = set(faulty[1]["sha256"])
    for split in ("train", "held_out"):
        index = index_shards(curated / split)
        assert index.dropped == {} and index.damaged == []
        dataset = ShardDataset(index, 32)
        for i in range(len(dataset)):
            sample = dataset[i]
            assert sample["caption"] in expected and sample["attributes"]["caption"] == sample["caption"], sample
            expected.remove(sample["caption"])
    assert not expected


def test_repaired_pictures_are_upright_rgb_and_keep_their_looks(faulty, curated):
    seen = set()
    for path in sorted(curated.glob("train/*.tar")):
        dataset = ShardDataset(index_shards(path), 64)
        for i in range(len(dataset)):
            about = dataset[i]["attributes"]
            offset, size = dataset.index.spans[i, 0].tolist()
            image = Image.open(io.BytesIO(path.read_bytes()[offset:offset + size]))
            assert image.size == (about["width"], about["height"])
            if about["repaired"]:
                seen |= set(about["repaired"])
                assert image.mode == "RGB" and pictures.orientation(image) == 1
            if "EXIF rotation" in about["repaired"]:
                assert about["metadata"]["width"] == about["height"]  # it was stored lying down
    assert seen == {"EXIF rotation", "CMYK", "wrong extension"}


def test_split_prompts_and_page(faulty, curated):
    held_out = {sample["sha256"] for sample in read_result(curated).values() if int(sample["sha256"][:16], 16) < 0.1 * 2**64}
    index = index_shards(curated / "held_out")
    assert len(held_out) == len(index) > 10
    prompts = (curated / "prompts" / "held_out.txt").read_text().splitlines()
    assert len(prompts) == len(index) and set(prompts) < set(faulty[1]["sha256"])
    page, card = (curated / "report.html").read_text(), (curated / "datacard.md").read_text()
    for cause, count in faulty[1]["dropped"].items():
        assert f"<td>{cause}</td><td class=\"number\">{count}</td>" in page and f"| {cause} | {count} |" in card
    assert page.count("<img src=\"data:image/jpeg") > 30 and page.count("<svg") == 4
    assert not any(word in page for word in ("<script src", "<link", 'src="http'))  # one file, no network


def test_tasks_in_any_order_give_the_same_bytes(faulty, curated, tmp_path):
    out = tmp_path / "out"
    for stage, tasks in (("scan", (2, 0, 1)), ("dedup", (0,)), ("caption", (1, 0)), ("write", (1, 0)), ("merge", (0,))):
        if stage == "dedup":
            assert curate(faulty[0], out, *SMALL, "--stage", "merge") == 2  # too early: said, nothing done
        for task in tasks:
            assert curate(faulty[0], out, *SMALL, "run.workers=1", "--stage", stage, "--task-index", task, "--task-count", len(tasks)) == 0
    assert files_of(out) == files_of(curated)


def test_kill_and_go_on(faulty, curated, tmp_path):
    """SIGKILL twice, once in the middle of a scan and once later; then it ends as an unbroken run does. No worker outlives its main process."""
    import psutil

    out = tmp_path / "out"
    command = [sys.executable, "-m", "proxt2i.curation", str(faulty[0]), str(out), *SMALL, "run.workers=2"]
    for done in ("work/scan/*.json", "work/caption/*.json"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        while len(list(out.glob(done))) < 2 and process.poll() is None:
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)  # the main process alone
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
        assert not psutil.wait_procs(children, timeout=10)[1]
    assert curate(faulty[0], out, *SMALL, "run.workers=2") == 0
    assert files_of(out) == files_of(curated)


def test_only_what_depends_on_a_change_is_made_again(faulty, tmp_path, capsys):
    shards, out = tmp_path / "shards", tmp_path / "out"
    write_faulty_shards(shards, 80, per_shard=20, short=64)
    assert curate(shards, out, *SMALL, "run.workers=1") == 0
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")} | {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert curate(shards, out, *SMALL, "run.workers=1") == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}  # nothing to do
    (shards / "00003.tar").unlink()
    assert curate(shards, out, *SMALL, "run.workers=1") == 0
    assert {path.stem for path in (out / "work" / "scan").glob("*.npy")} == {"00000", "00001", "00002"}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path.parent.name == "scan" and path.exists())
    capsys.readouterr()
    next((out / "work" / "scan").glob("*.npy")).write_bytes(b"")  # a damaged result is made again
    assert curate(shards, out, *SMALL, "run.workers=1") == 0


def test_a_shard_that_cannot_be_read_is_tried_again_and_named_and_the_others_go_on(faulty, curated, tmp_path, capsys, monkeypatch):
    """Reading /proc/self/mem at its beginning is an I/O error, of the kind that a bad disk gives."""
    monkeypatch.setattr("proxt2i.curation.run.PAUSE_S", 0.05)
    shards, out, record = tmp_path / "shards", tmp_path / "out", tmp_path / "out" / "work" / "failed" / "scan-00005.json"
    shutil.copytree(faulty[0], shards, copy_function=os.link)
    (shards / "00005.tar").unlink()
    (shards / "00005.tar").symlink_to("/proc/self/mem")
    assert curate(shards, out, *SMALL, "run.workers=1") == 2
    said = capsys.readouterr().err
    assert "1 shards could not be treated after 3 tries" in said and "00005: [Errno 5]" in said
    assert len(list((out / "work" / "scan").glob("*.npy"))) == 7 and json.loads(record.read_text())["shard"] == "00005"
    (shards / "00005.tar").unlink()
    os.link(faulty[0] / "00005.tar", shards / "00005.tar")
    assert curate(shards, out, *SMALL, "run.workers=1") == 0 and not record.exists()
    assert {name: data for name, data in files_of(out).items() if name.endswith(".tar")} == {name: data for name, data in files_of(curated).items() if name.endswith(".tar")}


# -- a folder of images -----------------------------------------------------------------------------------------------


def test_a_folder_of_images(tmp_path):
    rng, images = np.random.default_rng(0), tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for i in range(6):
        path = images / ("sub" if i % 2 else ".") / f"my picture.{i}.{'png' if i == 3 else 'JPG'}"
        path.write_bytes(encoded(picture(rng, 80, 70), "PNG" if i == 3 else "JPEG"))
        if i != 5:
            path.with_suffix(".txt").write_text(f"photo {i}")
    (images / "notes.docx").write_bytes(b"x")
    Image.new("RGB", (80, 80)).save(images / "shot.bmp")
    (images / "shot.txt").write_text("a bitmap")
    assert curate(images, tmp_path / "out", *SMALL, "read.files_per_part=3", "run.workers=1", "write.held_out=0") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"no caption": 1, "format not supported": 1}
    dataset = ShardDataset(index_shards(tmp_path / "out" / "train"), 64)
    assert sorted(dataset[i]["caption"] for i in range(len(dataset))) == [f"photo {i}" for i in range(5)]


# -- duplicates -------------------------------------------------------------------------------------------------------


def table(rng, count, clusters):
    """Records with hashes in `clusters` groups of near neighbours, some of which are mirror images."""
    def flipped(values, times):
        for _ in range(times):
            values = values ^ np.where(rng.random(len(values)) < 0.5, np.uint64(1) << rng.integers(0, 64, len(values)).astype(np.uint64), np.uint64(0))
        return values

    rows = np.zeros(count, record_dtype(8))
    centers, of = rng.integers(0, 2**63, (clusters, 2, 3), dtype=np.uint64), rng.integers(0, clusters, count)
    turned = rng.random(count) < 0.3
    for side in range(2):
        for kind in (0, 2):
            rows["hashes"][:, side, kind] = flipped(np.where(turned, centers[of, 1 - side, kind], centers[of, side, kind]), 10)
        rows["hashes"][:, side, 1] = sum(np.uint64(1) << (rng.integers(0, 8, count) + 16 * band + 8 * half).astype(np.uint64) for band in range(4) for half in (0, 1))
    rows["sha256"] = rng.integers(0, 256, (count, 32))
    rows["width"], rows["height"] = rng.integers(10, 13, (2, count))
    looks = rng.integers(0, 256, (clusters, 8, 8, 3))
    thumbs = np.where(turned[:, None, None, None], looks[of][:, :, ::-1], looks[of]) * 0.8 + rng.integers(0, 20, (count, 1, 1, 1)) + rng.normal(0, rng.uniform(0, 9, (count, 1, 1, 1)), (count, 8, 8, 3))
    rows["thumb"] = thumbs.clip(0, 255).reshape(count, 192)
    for names in (["sha256"], ["hashes", "thumb"]):
        copies, to = rng.integers(0, count, (2, count // 5))
        for name in names:
            rows[name][to] = rows[name][copies]
    rows["key_hash"] = rng.integers(0, count * 4, count)
    return rows


def plainly_near(one, other, distance, color, mirrored) -> bool:
    """By the definition at the head of dedup.py, with Python's integers."""
    def alike(a, b, thumb_a, thumb_b):
        (hash_a, unsure_a, growing_a), (hash_b, unsure_b, growing_b) = (list(map(int, x)) for x in (a, b))
        differ = hash_a ^ hash_b
        band = any(not (differ & ~(unsure_a | unsure_b)) >> 16 * n & 0xFFFF for n in range(4))
        if not band or differ.bit_count() > 1.5 * distance or (growing_a ^ growing_b).bit_count() > distance * 5 // 4:
            return False
        found = dedup.difference(thumb_a[None].astype(np.float32), thumb_b.astype(np.float32))[0]
        return found <= (color if differ.bit_count() <= distance else 0.25 * color)

    (plain_a, mirrored_a), (plain_b, mirrored_b) = one["hashes"], other["hashes"]
    thumb = dedup.mirror(one["thumb"])
    return alike(plain_a, plain_b, one["thumb"], other["thumb"]) or (mirrored and (
        alike(mirrored_a, plain_b, thumb, other["thumb"]) or alike(plain_a, mirrored_b, thumb, other["thumb"])))


@pytest.mark.parametrize("distance, mirrored, part", [(0, True, 10**6), (8, False, 10**6), (16, True, 300)])
def test_duplicates_are_those_of_the_plain_definition(tmp_path, monkeypatch, distance, mirrored, part):
    """Greedy over all pairs in order of rank, first by bytes, then by looks."""
    rng, color = np.random.default_rng(distance), 6.0
    rows = table(rng, 300, 60)
    monkeypatch.setattr(dedup, "PART", part)
    found = dedup.find_duplicates([(0, rows[:120]), (1, rows[120:])], tmp_path / "db", distance=distance, color=color, mirrored=mirrored, placeholder_repeats=0)
    order = sorted(range(len(rows)), key=lambda i: (-int(rows["width"][i]) * int(rows["height"][i]), i))
    codes, shas = np.zeros(len(rows), int), set()
    for i in order:
        if rows["sha256"][i].tobytes() in shas:
            codes[i] = dedup.EXACT
        shas.add(rows["sha256"][i].tobytes())
    for n, i in enumerate(order):  # equal hashes first
        for j in order[:n]:
            if codes[i] == codes[j] == 0 and rows["hashes"][i, 0, 0] == rows["hashes"][j, 0, 0]:
                if dedup.difference(rows["thumb"][[j]].astype(np.float32), rows["thumb"][i].astype(np.float32))[0] <= color:
                    codes[i] = dedup.NEAR
    for n, i in enumerate(order if distance else []):
        for j in order[:n]:
            if codes[i] == codes[j] == 0 and plainly_near(rows[i], rows[j], distance, color, mirrored):
                codes[i] = dedup.NEAR
                break
    assert (found.codes == codes).all(), np.flatnonzero(found.codes != codes)
    assert (codes == dedup.NEAR).sum() > (20 if distance else 2) and (codes == 0).sum() > 50
    assert not list(tmp_path.iterdir())


def altered(image, rng):
    """What becomes of pictures as they wander through the web: {name: the picture again}."""
    def small_crop(share):
        width, height = (round(side * (1 - share)) for side in image.size)
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        return image.crop((x, y, x + width, y + height))

    return {"half the size": image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS), "JPEG at quality 30": Image.open(io.BytesIO(encoded(image, quality=30))),
            "mirrored": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "darker": image.point(lambda value: value * 0.75), "crop": small_crop(0.01)}


def test_altered_copies_are_found_and_others_are_not(tmp_path):
    rng, folder = np.random.default_rng(3), tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        soft = Image.fromarray(rng.integers(0, 256, (int(rng.integers(3, 10)), int(rng.integers(3, 10)), 3), dtype=np.uint8)).resize((200, 160), Image.Resampling.BICUBIC)
        for name, image in {"": soft, **altered(soft, rng)}.items():
            (folder / f"{number}{name}.jpg").write_bytes(encoded(image, quality=88))
            (folder / f"{number}{name}.txt").write_text(f"{number}")
    assert curate(folder, tmp_path / "out", *SMALL, "run.workers=1", "write.held_out=0") == 0
    captions = sorted(int(line) for line in read_texts(tmp_path / "out"))
    assert captions == list(range(12))


def read_texts(out):
    for path in sorted(out.glob("*/*.tar")):
        dataset = ShardDataset(index_shards(path), 32)
        yield from (dataset[i]["caption"] for i in range(len(dataset)))


def test_bytes_that_repeat_often_are_a_placeholder(tmp_path):
    rows = table(np.random.default_rng(0), 50, 50)
    rows["sha256"][:9] = 7
    found = dedup.find_duplicates([(0, rows)], tmp_path / "db", near=False, placeholder_repeats=9)
    assert (found.codes[:9] == dedup.PLACEHOLDER).all() and found.placeholders == [("07" * 32, 9)]
    assert not (dedup.find_duplicates([(0, rows)], tmp_path / "db", near=False, placeholder_repeats=10).codes == dedup.PLACEHOLDER).any()


# -- single samples ---------------------------------------------------------------------------------------------------


def look(tmp_path, data, metadata=None, text=b"a caption", extension="jpg", key="1", **rules):
    (tmp_path / "file").write_bytes(data + text + json.dumps(metadata or {}).encode())
    spans = ((0, 0, len(data)), (0, len(data), len(text)), (0, len(data) + len(text), len(json.dumps(metadata or {}))))
    rules = {"min_short": 32, **rules}
    return samples.inspect_chunk(Chunk((str(tmp_path / "file"),), (Raw(key, extension, spans),), Rules(**rules)))[0]


def test_filters(tmp_path):
    image = picture(np.random.default_rng(0), 90, 60)
    data = encoded(image)
    assert look(tmp_path, data).cause == "" and look(tmp_path, data).size == (90, 60)
    assert look(tmp_path, data, max_aspect=1.5).cause == "" and look(tmp_path, data, max_aspect=1.49).cause == "aspect ratio out of range"
    assert look(tmp_path, data, min_short=61).cause == "short edge too short"
    assert look(tmp_path, data, max_bytes=len(data) - 1).cause == "more bytes than allowed"
    assert look(tmp_path, data, max_pixels=90 * 60 - 1).cause == "more pixels than allowed"
    assert look(tmp_path, data, {"punsafe": 0.9}).cause == "" and look(tmp_path, data, {"punsafe": 0.9}, max_punsafe=0.5).cause == "unsafe"
    assert look(tmp_path, data, {"pwatermark": 0.9}, max_pwatermark=0.5).cause == "watermark"
    assert look(tmp_path, data, {"NSFW": "NSFW"}, nsfw=("UNLIKELY",)).cause == "unsafe" and look(tmp_path, data, {"NSFW": "UNLIKELY"}, nsfw=("UNLIKELY",)).cause == ""
    assert look(tmp_path, data, {"key": "2"}).cause == look(tmp_path, data, {"width": 91, "height": 60}).cause == "mispaired"
    assert look(tmp_path, data, {"key": "2"}, check_pairs=False).cause == "" and look(tmp_path, data, {"width": 60, "height": 90}).cause == ""
    assert look(tmp_path, data, placeholders=frozenset([look(tmp_path, data).sha256])).cause == "known placeholder"
    assert [look(tmp_path, data, {"hands": value}, hand_keys=("hands",)).hands for value in (2, 0, [], "no", [[1, 2, 3, 4]])] == [1, 0, 0, 0, 1]
    webp = bytearray(encoded(image, "WEBP", lossless=True, icc_profile=b"x" * 200))
    webp[24:30] = b"\xfe\x3f\0\xfe\x3f\0"  # 16383 x 16383 in the header of the canvas
    assert webp[12:16] == b"VP8X" and look(tmp_path, bytes(webp), extension="webp").cause == "more pixels than allowed"
    for whole in (data, encoded(image, "PNG"), encoded(image, "WEBP")):
        assert {look(tmp_path, whole[:share * len(whole) // 100]).cause for share in (3, 12, 50, 90)} == {"image is cut short"}
    grey = Image.fromarray((np.arange(6400, dtype=np.uint16) * 10).reshape(80, 80))
    for odd in (encoded(grey, "PNG"), encoded(image.convert("P"), "PNG"), encoded(image.convert("RGBA"), "PNG"), encoded(image.convert("L"))):
        assert look(tmp_path, odd, extension="png").cause == ""


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_has_one_hash_however_it_is_stored(tmp_path, turn):
    image = picture(np.random.default_rng(1), 96, 64)
    stored = pictures.upright(image, {6: 8, 8: 6}.get(turn, turn))  # what a camera would have stored
    exif = Image.Exif()
    exif[0x0112] = turn
    one, other = look(tmp_path, encoded(image, quality=95), crop=16), look(tmp_path, encoded(stored, quality=95, exif=exif), crop=16)
    assert other.size == (96, 64) and int(one.hashes[0, 0] ^ other.hashes[0, 0]).bit_count() <= 3
    assert np.abs(one.crop.astype(int) - other.crop).mean() < 4 and other.repairs == (turn != 1)
    extension, data = pictures.repaired(encoded(stored, quality=95, exif=exif), other.repairs, 10**6)
    assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - np.asarray(image)).mean() < 8


def test_what_a_picture_gets_does_not_depend_on_its_batch():
    small = np.random.default_rng(0).integers(0, 256, (33, 32, 32, 3), dtype=np.uint8)
    small[0], small[1] = 7, small[1, :1]  # flat; rows that are all the same
    hashes, thumbs = perceptual_hashes(small), thumbnails(small)
    for start, stop in ((0, 1), (0, 7), (5, 6), (17, 33)):
        assert (perceptual_hashes(small[start:stop]) == hashes[start:stop]).all() and (thumbnails(small[start:stop]) == thumbs[start:stop]).all()
    flipped = perceptual_hashes(np.ascontiguousarray(small[2:, :, ::-1]))
    assert (flipped[:, ::-1] == hashes[2:]).mean() > 0.98  # but for sums that round otherwise


def test_pictures_that_take_much_memory_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(pictures, "LARGE", 999)
    image = Image.new("RGB", (40, 25))
    for data, large in ((encoded(image), False), (encoded(image, progressive=True), True), (encoded(image, "WEBP"), True), (encoded(image, "PNG"), True),
                        (encoded(image.resize((37, 27)), "PNG"), False)):
        with pictures.open_picture(data, 10**6) as opened:
            assert pictures.is_large(opened) == large

    def free() -> bool:
        with open(pictures.__file__) as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    assert free()
    with pictures.one_at_a_time(False):
        assert free()
    with pictures.one_at_a_time(True):
        assert not free()
        with pictures.one_at_a_time(True):  # what has it passes
            assert not free()
        assert not free()
    assert free()


def test_a_sample_that_kills_its_process_costs_only_itself():
    jobs = [(n, list(range(3 * n, 3 * n + 3))) for n in range(6)]
    with Workers(2) as workers:
        found = list(workers.ordered(iter(jobs), die_of_seven, lambda job: [[one] for one in job], lambda job: ["dead"]))
    assert found == [(n, ["dead" if one == 7 else 2 * one for one in job]) for n, job in jobs]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_bad_input_is_said_before_work(faulty, curated, tmp_path, capsys, monkeypatch):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "thesis.doc").write_text("")
    for arguments, words in (
        ([tmp_path / "nowhere", tmp_path / "o"], "does not exist; give a folder of img2dataset shards"),
        ([empty, tmp_path / "o"], "neither .tar shards nor"), (["s3://bucket/x", tmp_path / "o"], "local files"),
        ([faulty[0], full], "is not empty and holds no curation"), ([faulty[0], faulty[0] / "out"], "must not lie in the input folder"),
        ([faulty[0], curated, *SMALL, "filter.min_short=65"], "filter.min_short = 64, not 65"),
        ([faulty[0], tmp_path / "o", "--stage", "filter"], "there are scan, dedup, caption, write, merge"),
        ([faulty[0], tmp_path / "o", "--task-index", "3", "--task-count", "3", "--stage", "scan"], "between 0 and"),
        ([faulty[0], tmp_path / "o", "--task-index", "0", "--task-count", "3"], "name a --stage"),
        ([faulty[0], tmp_path / "o", "filter.min_shrt=3"], "did you mean filter.min_short?"), ([faulty[0], tmp_path / "o", "dedup.distance=21"], "between 0 and 20"),
        ([faulty[0], tmp_path / "o", "filter.placeholders=/no/such"], "does not exist"),
        ([faulty[0], tmp_path / "o", f"caption.model={empty}"], "hf download Qwen/Qwen2.5-VL-7B-Instruct"),
        ([faulty[0], tmp_path / "o", "aesthetic.reward=aesthetic", f"aesthetic.path={empty}"], "improved-aesthetic-predictor"),
        ([faulty[0], tmp_path / "o", "hands.detector=clip:/no/such"], "hf download openai/clip-vit-large-patch14"),
        ([faulty[0], tmp_path / "o", "hands.detector=no.such.module:f"], "cannot import f"),
    ):
        assert curate(*arguments) == 2
        assert words in (said := capsys.readouterr().err), said
        assert not (tmp_path / "o").exists()
    assert curate(faulty[0], tmp_path / "o", "filter.min_short=4000", "run.workers=1", "--quiet") == 2
    assert "no sample is left: " in (said := capsys.readouterr().err) and "short edge too short" in said


def test_settings_and_tasks(tmp_path):
    (tmp_path / "a.yaml").write_text("filter:\n  min_short: 300\nwrite:\n  shard_size: 7\n")
    config = load_curation([tmp_path / "a.yaml"], ["write.shard_size=8"])
    assert (config.filter.min_short, config.write.shard_size, config.filter.max_aspect) == (300, 8, 16 / 9)
    args = type("Args", (), {"task_index": None, "task_count": None})
    assert task_of(args, {}) == (0, 1)
    assert task_of(args, {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}) == (4, 8)


def test_units_do_not_depend_on_the_file_system(tmp_path):
    names = [f"{a}/{b}.jpg" for a in "cab" for b in "213"]
    random.Random(0).shuffle(names)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.tar").symlink_to("nowhere")
    with pytest.raises(ValueError, match="0.tar is no file"):
        find_units(tmp_path / "other", 4)
    units = find_units(tmp_path, 4)
    assert [key for unit in units for key in unit.keys] == sorted(name[:-4] for name in names) and [len(unit.files) for unit in units] == [4, 4, 1]
    assert all(raw.spans[IMAGE][2] == 1 for unit in units for raw in unit.list().samples)
