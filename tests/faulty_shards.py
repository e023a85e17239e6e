"""Shards in img2dataset's layout with planted faults of twelve kinds, and what a curation has to make of each.

    python tests/faulty_shards.py FOLDER --images 20000
"""

import argparse
import hashlib
import io
import json
import os
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

# kind -> (share of the samples, cause it is dropped for; None: kept)
KINDS = {
    "truncated JPEG": (0.01, "image is cut short"), "not an image": (0.005, "not an image"), "wrong extension": (0.01, None), "bomb": (0.003, "more pixels than allowed"),
    "duplicate": (0.02, "exact duplicate"), "near duplicate": (0.02, "near duplicate"), "no caption": (0.01, "no caption"), "key of another shard": (0.01, None),
    "caption not UTF-8": (0.01, "caption is not UTF-8"), "EXIF rotation": (0.01, None), "CMYK": (0.01, None), "animated": (0.005, "animated"),
    "caption of another": (0.01, "mispaired"), "too small": (0.01, "short edge too short"), "too long": (0.01, "aspect ratio out of range"),
}  # fmt: skip
REPAIRED = {"wrong extension": "wrong extension", "EXIF rotation": "EXIF rotation", "CMYK": "CMYK"}
CUT_EVERY = 10  # shards: the last one of so many loses its end


def picture(rng, width, height):
    """Soft random colours with some grain; no two look alike."""
    soft = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.resize(rng.integers(-12, 13, 4096 + int(rng.integers(64)), dtype=np.int16), (height, width, 1))
    return Image.fromarray((np.asarray(soft).astype(np.int16) + grain).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width=60_000, height=60_000):
    """A PNG of a few bytes that says it has 3.6 billion pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b""))


def write_faulty_shards(folder: Path, images: int, per_shard: int = 200, seed: int = 0, short: int = 256) -> dict:
    """Returns {"sha256": {caption that must come through: of its image file}, "dropped": {cause: n}, "repaired": {cause: n}, "repeated_keys",
    "damaged": shards, "samples"}. short: least short edge (pixels)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    planted = [kind for kind, (share, _) in KINDS.items() for _ in range(max(3, round(share * images)))]
    kinds = rng.permutation(planted + ["good"] * (images - len(planted)))
    expected = {"dropped": Counter(), "repaired": Counter(), "repeated_keys": 0, "damaged": [], "samples": images, "sha256": {}}
    originals: list[tuple[int, int, int]] = []  # (seed, width, height) of good pictures that nobody has copied yet
    stolen: set[str] = set()
    keys: dict[str, list[int]] = {}  # of samples that get as far as the search for duplicates
    for shard, start in enumerate(range(0, images, per_shard)):
        path, numbers = folder / f"{shard:05d}.tar", range(start, min(start + per_shard, images))
        cut = shard % CUT_EVERY == CUT_EVERY - 1 or (shard == 1 and images <= CUT_EVERY * per_shard)
        fresh = []
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                last = cut and number == numbers[-1]
                kind = "good" if last or (kinds[number] in ("duplicate", "near duplicate") and not originals) else str(kinds[number])
                seed_of, width, height = int(rng.integers(1 << 60)), *(short + rng.integers(0, short // 2, 2)).tolist()
                key, caption, extension = f"{shard:05d}{number - start:04d}", f"picture {number}", "jpg"
                if kind in ("duplicate", "near duplicate"):
                    seed_of, width, height = originals.pop(int(rng.integers(len(originals))))
                if kind == "too small":
                    height = short - 1 - int(rng.integers(0, short // 4))
                if kind == "too long":
                    width, height = short * 2 + int(rng.integers(0, short // 2)), short
                if kind == "key of another shard":
                    victim = f"{(shard + 1) % -(-images // per_shard):05d}{number - start:04d}"
                    if shard % 2 or victim in stolen or number - start >= len(range(start + per_shard, min(start + 2 * per_shard, images))):
                        kind = "good"
                    else:
                        stolen.add(victim)
                image = picture(np.random.default_rng(seed_of), width, height)
                data = encoded(image, quality=90)
                if kind == "truncated JPEG":
                    data = data[: len(data) * int(rng.integers(20, 90)) // 100]
                elif kind == "not an image":
                    data = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
                elif kind == "wrong extension":
                    data = encoded(image, "PNG", compress_level=1) if number % 2 else encoded(image, "WEBP", quality=80)
                elif kind == "bomb":
                    data, extension = bomb(), "png"
                elif kind == "near duplicate":
                    width, height = max(short, width * 9 // 10), max(short, height * 9 // 10)
                    width, height = (width - 1, height) if width > short else (width, height)
                    data = encoded(image.resize((width, height), Image.Resampling.LANCZOS), quality=60)
                elif kind == "EXIF rotation":
                    exif = Image.Exif()
                    exif[0x0112] = 6
                    data = encoded(image, quality=90, exif=exif)
                elif kind == "CMYK":
                    data = encoded(image.convert("CMYK"), quality=90)
                elif kind == "animated":
                    more = [picture(rng, width, height)]
                    data, extension = (encoded(image, "WEBP", save_all=True, append_images=more), "webp") if number % 2 else (encoded(image, "GIF", save_all=True, append_images=more), "jpg")
                elif kind == "key of another shard":
                    key = victim
                about = {"key": key, "caption": caption, "width": width, "height": height, "url": f"https://example.org/{number}.jpg"}
                text = caption.encode()
                if kind == "caption not UTF-8":
                    text = caption.encode() + b" \xff\xfe\xe9"
                elif kind == "caption of another":
                    text = f"picture {number + 1}".encode()
                members = [(f"{key}.{extension}", data), (f"{key}.json", json.dumps(about).encode()), (f"{key}.txt", text)]
                if kind == "no caption":
                    members = [members[0], (members[1][0], json.dumps({**about, "caption": None}).encode())]
                for name, content in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    at = tar.offset
                    tar.addfile(info, io.BytesIO(content))
                    if last and name == members[0][0]:
                        cut_at = at + tarfile.BLOCKSIZE + len(content) // 2
                cause = KINDS[kind][1] if kind != "good" else None
                if last:
                    cause = "cut short"
                if cause:
                    expected["dropped"][cause] += 1
                else:
                    expected["sha256"][caption] = hashlib.sha256(data).hexdigest()
                    if kind == "good":
                        fresh.append((seed_of, width, height))
                if kind in REPAIRED and not cause:
                    expected["repaired"][REPAIRED[kind]] += 1
                if cause is None or kind in ("duplicate", "near duplicate"):
                    keys.setdefault(key, []).append(number)
        originals += fresh
        if cut:
            with open(path, "r+b") as file:
                file.truncate(cut_at)
            expected["damaged"].append(path.stem)
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"successes": len(numbers)}))
    expected["repeated_keys"] = sum(len(numbers) for numbers in keys.values() if len(numbers) > 1)
    return expected


def read_result(out: Path) -> dict[str, dict]:
    """{caption: JSON} of every sample of a result, by tarfile alone."""
    found, samples = {}, 0
    for path in sorted(out.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".txt"):
                found[data.decode()] = json.loads(members[name.replace(".txt", ".json")])
                samples += 1
    assert samples == len(found)
    return found


def assert_as_expected(out: Path, expected: dict) -> None:
    """Every fault under its own cause; every good sample there, once, its own caption with its own picture."""
    manifest, samples = json.loads((out / "manifest.json").read_text()), read_result(out)
    assert manifest["samples_in"] == expected["samples"] and manifest["samples_out"] == len(samples)
    assert manifest["dropped"] == dict(expected["dropped"]), (manifest["dropped"], expected["dropped"])
    assert manifest["repaired"] == dict(expected["repaired"])
    assert manifest["repeated_keys"] == expected["repeated_keys"]
    assert [line.split()[0] for line in manifest["damaged_shards"]] == expected["damaged"] and manifest["lost_in_damaged_shards"] == 0
    missing, extra = expected["sha256"].keys() - samples.keys(), samples.keys() - expected["sha256"].keys()
    assert not missing and not extra, (sorted(missing)[:5], sorted(extra)[:5])
    assert {caption: sample["sha256"] for caption, sample in samples.items()} == expected["sha256"]


def die_of_seven(job: list[int]) -> list[int]:
    """Work for worker processes, which a sample ends as a crashing decoder would."""
    if 7 in job:
        os._exit(9)
    return [2 * one for one in job]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--per-shard", type=int, default=200)
    args = parser.parse_args()
    planted = write_faulty_shards(args.folder, args.images, args.per_shard)
    print(json.dumps({**planted, "sha256": f"{len(planted['sha256']):,} kept"}, indent=1))
