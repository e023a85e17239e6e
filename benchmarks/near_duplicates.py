"""How many altered copies of pictures the search for near duplicates finds, and which different pictures it takes for the same.

    python benchmarks/near_duplicates.py FOLDER [--altered 300] [--json FILE]

FOLDER holds pictures that differ from each other. --altered of them are searched for duplicates together with one altered copy of each, for every
kind of alteration (proxt2i/curation/dedup.py says what counts); then all pictures among themselves: what is found is counted and named.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from proxt2i.curation import dedup, hashes, pictures, samples
from proxt2i.curation.config import Curation
from proxt2i.curation.scan import record_dtype


def stored(image: Image.Image, kind: str = "JPEG", quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, quality=quality)
    return buffer.getvalue()


def cropped(image: Image.Image, share: float, rng: random.Random) -> Image.Image:
    width, height = (round(side * (1 - share)) for side in image.size)
    x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((x, y, x + width, y + height))


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.LANCZOS)


def copies(image: Image.Image, rng: random.Random) -> dict[str, bytes]:
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return {
        "half the size": stored(scaled(image, 0.5)), "twice the size": stored(scaled(image, 2)), "0.9 of the size, JPEG 60": stored(scaled(image, 0.9), quality=60),
        "JPEG 75": stored(image, quality=75), "JPEG 50": stored(image, quality=50), "JPEG 25": stored(image, quality=25), "WebP 60": stored(image, "WEBP", 60),
        "crop to 98 % of each side": stored(cropped(image, 0.02, rng)), "crop to 95 %": stored(cropped(image, 0.05, rng)), "crop to 90 %": stored(cropped(image, 0.1, rng)),
        "brightness 0.75": stored(ImageEnhance.Brightness(image).enhance(0.75)), "brightness 1.1": stored(ImageEnhance.Brightness(image).enhance(1.1)),
        "brightness 1.25": stored(ImageEnhance.Brightness(image).enhance(1.25)), "contrast 1.2": stored(ImageEnhance.Contrast(image).enhance(1.2)),
        "mirrored": stored(flipped), "mirrored, 0.8 of the size, JPEG 60": stored(scaled(flipped, 0.8), quality=60),
    }  # fmt: skip


def record(data: bytes) -> np.ndarray:
    found = samples.Inspection()
    with pictures.open_picture(data, 10**9) as image:
        found.size = image.size
        samples.describe(image, found, 0)
    row = np.zeros(1, record_dtype(1))
    row["hashes"], row["thumb"] = hashes.perceptual_hashes(found.small[None]), hashes.thumbnails(found.small[None])
    row["sha256"] = np.random.default_rng(len(data)).integers(0, 256, 32)
    row["width"], row["height"] = found.size
    return row


def search(rows: np.ndarray, folder: Path, num_pairs: int = 20) -> dedup.Duplicates:
    settings = Curation().dedup
    return dedup.find_duplicates([(0, rows)], folder / "db", exact=False, distance=settings.distance, color=settings.color, mirrored=settings.mirrored,
                                 placeholder_repeats=0, num_pairs=num_pairs)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--altered", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    paths = sorted(path for path in args.folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not paths:
        print(f"error: no pictures in {args.folder}", file=sys.stderr)
        sys.exit(2)
    rng, rows, chosen, altered = random.Random(0), [], [], {}
    numbers = set(rng.sample(range(len(paths)), min(args.altered, len(paths))))
    for number, path in enumerate(paths):
        rows.append(record(path.read_bytes()))
        if number in numbers:
            chosen.append(rows[-1])
            for kind, data in copies(Image.open(path).convert("RGB"), rng).items():
                altered.setdefault(kind, []).append(record(data))
    with tempfile.TemporaryDirectory() as name:
        alone = (search(np.concatenate(chosen), Path(name)).codes == dedup.NEAR).sum()
        found = {kind: int((search(np.concatenate([*chosen, *ones]), Path(name)).codes == dedup.NEAR).sum() - alone) for kind, ones in altered.items()}
        among = search(np.concatenate(rows), Path(name))
    result = {"pictures": len(paths), "altered": len(chosen), "found": found, "taken_for_the_same": int((among.codes == dedup.NEAR).sum()),
              "pairs": [[paths[a].name, paths[b].name] for a, b, _ in among.pairs]}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
