"""What a worker process does with one sample: read it once, check it, decode it once, and describe it in a few hundred bytes.

Pillow and numpy only: workers stay small and start fast. Nothing is decompressed before its header has passed the caps.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from proxt2i.curation.hashes import SMALL, perceptual_hashes, thumbnails
from proxt2i.curation.pictures import LARGE_FILE, REPAIRS, Unusable, full_picture, is_large, load, one_at_a_time, open_picture, orientation, sniff, to_rgb, upright
from proxt2i.curation.sources import IMAGE, JSON, TEXT, Raw

MAX_TEXT_BYTES = 1 << 20
LEAST = 2 * SMALL  # short edge down to which a picture may be reduced before it is made small (pixels)


@dataclass(frozen=True)
class Rules:
    """What pictures are held against; see config.py for the fields that have its names."""

    max_bytes: int = 50_000_000
    max_pixels: int = 40_000_000
    check_pairs: bool = True
    require_caption: bool = True
    min_short: int = 256
    max_aspect: float = 16 / 9
    max_punsafe: float | None = None
    max_pwatermark: float | None = None
    nsfw: tuple[str, ...] = ()
    placeholders: frozenset[bytes] = frozenset()
    hand_keys: tuple[str, ...] = ()
    crop: int = 0  # side of the square that models are shown (pixels); 0: none


@dataclass(frozen=True)
class Chunk:
    """Neighbouring samples of one unit."""

    files: tuple[str, ...]
    samples: tuple[Raw, ...]
    rules: Rules


@dataclass
class Inspection:
    """A sample as it was found. cause: why it is dropped, "" if it is not; what follows is set as far as the sample got."""

    cause: str = ""
    size: tuple[int, int] | None = None  # (width, height), upright
    repairs: int = 0  # bits, see REPAIRS
    sha256: bytes = b""  # of the image file
    hashes: np.ndarray | None = None  # uint64 [2, 3]: of the picture and of its mirror image, see perceptual_hashes
    thumb: bytes = b""  # uint8 [8, 8, 3]
    hands: int = -1  # as the JSON says: 1 yes, 0 no, -1 it does not say
    caption: str = ""
    score: float = float("nan")
    crop: np.ndarray | None = None  # uint8 [rules.crop, rules.crop, 3]
    small: np.ndarray | None = None  # uint8 [32, 32, 3], until hashes and thumb have been made of it


def inspect_chunk(chunk: Chunk) -> list[Inspection] | OSError:
    """An OSError is a result here: it concerns the shard, not the run."""
    try:
        with Files(chunk.files) as files:
            found = [inspect(files, raw, chunk.rules) for raw in chunk.samples]
    except OSError as error:
        return error
    if seen := [one for one in found if one.small is not None]:
        small = np.stack([one.small for one in seen])
        for one, hashes, thumb in zip(seen, perceptual_hashes(small), thumbnails(small)):
            one.hashes, one.thumb, one.small = hashes, thumb.tobytes(), None
    return found


def crashed(chunk: Chunk) -> list[Inspection]:
    """Stands for a chunk of one sample that ends the process that decodes it."""
    return [Inspection("crashes the decoder")]


def split(chunk: Chunk) -> list[Chunk]:
    return [replace(chunk, samples=(raw,)) for raw in chunk.samples]


class Files:
    """The files of a unit, opened as they are needed, read by position."""

    def __init__(self, paths):
        self.paths, self.open = paths, {}

    def read(self, span) -> bytes:
        number, offset, size = (int(n) for n in span)
        if number not in self.open:
            if len(self.open) > 64:
                self.close()
            self.open[number] = os.open(self.paths[number], os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self.open[number], size, offset)
        if len(data) < size:
            raise Unusable("cut short")
        return data

    def close(self) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)
        self.open.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def inspect(files: Files, raw: Raw, rules: Rules) -> Inspection:
    found = Inspection()
    try:
        if raw.spans[IMAGE][2] > rules.max_bytes:
            raise Unusable("more bytes than allowed")
        metadata, found.caption = read_text(files, raw, rules.require_caption)
        with one_at_a_time(raw.spans[IMAGE][2] > LARGE_FILE):
            inspect_image(files.read(raw.spans[IMAGE]), raw, metadata, rules, found)
    except Unusable as error:
        found.cause = str(error)
    return found


def inspect_image(data: bytes, raw: Raw, metadata: dict, rules: Rules, found: Inspection) -> None:
    found.sha256 = hashlib.sha256(data).digest()
    if found.sha256 in rules.placeholders:
        raise Unusable("known placeholder")
    if sniff(data) != {"jpg": "JPEG", "jpeg": "JPEG"}.get(raw.extension, raw.extension.upper()):
        found.repairs |= 1 << REPAIRS.index("wrong extension")
    with open_picture(data, rules.max_pixels) as image:
        found.size = image.size
        if rules.check_pairs:
            check_pair(raw, metadata, found)
        check_metadata(metadata, rules)
        if min(image.size) < rules.min_short:
            raise Unusable("short edge too short")
        if max(image.size) / min(image.size) > rules.max_aspect:
            raise Unusable("aspect ratio out of range")
        found.hands = hands_of(metadata, rules.hand_keys)
        describe(image, found, rules.crop)


def describe(image: Image.Image, found: Inspection, crop: int) -> None:
    """Decode and fill in the rest of `found`; `small` stands for hashes and thumb."""
    least = max(2 * crop, LEAST)
    with one_at_a_time(is_large(image)):
        load(image, least)
        turn, cmyk = orientation(image), image.mode == "CMYK"
        factor = min(image.size) // least
        if factor > 1 and image.mode in ("RGB", "RGBA", "L", "LA", "CMYK"):  # the rest is done on a small copy
            small = image.reduce(factor)
            image.im = None  # the caller still holds `image`; its pixels are not needed any more
            image = small
    if turn in range(2, 9):
        found.repairs |= 1 << REPAIRS.index("EXIF rotation")
        found.size = found.size[::-1] if turn >= 5 else found.size
    if cmyk:
        found.repairs |= 1 << REPAIRS.index("CMYK")
    try:
        rgb = to_rgb(image)
        found.small = np.asarray(upright(rgb.resize((SMALL, SMALL), Image.Resampling.BILINEAR), turn))
        if crop:
            found.crop = np.asarray(upright(ImageOps.fit(rgb, (crop, crop), Image.Resampling.BICUBIC), turn))
    except Exception as error:  # conversions of odd modes
        raise Unusable("image cannot be decoded") from error


# -- text and JSON ----------------------------------------------------------------------------------------------------


def read_text(files: Files, raw: Raw, required: bool) -> tuple[dict, str]:
    """(JSON, {} without one; caption, "" if it cannot be used). Unusable if a caption is required and there is none."""
    metadata: dict = {}
    if raw.spans[JSON] is not None:
        try:
            metadata = json.loads(files.read(raw.spans[JSON])) if raw.spans[JSON][2] <= MAX_TEXT_BYTES else None
        except (ValueError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict):
            raise Unusable("JSON cannot be read")
    caption, cause = metadata.get("caption"), "no caption"
    if raw.spans[TEXT] is not None:
        caption = None
        try:
            caption = files.read(raw.spans[TEXT]).decode("utf-8-sig") if raw.spans[TEXT][2] <= MAX_TEXT_BYTES else None
        except UnicodeDecodeError:
            cause = "caption is not UTF-8"
    caption = caption.strip() if isinstance(caption, str) else ""
    if required and not caption:
        raise Unusable(cause)
    return metadata, caption


def check_pair(raw: Raw, metadata: dict, found: Inspection) -> None:
    """img2dataset writes key, caption, width and height into the JSON too; a picture of another sample gives itself away by them."""
    key, caption = metadata.get("key"), metadata.get("caption")
    if key is not None and str(key) != raw.key.rpartition("/")[2]:
        raise Unusable("mispaired")
    if raw.spans[TEXT] is not None and isinstance(caption, str) and found.caption and caption.strip() != found.caption:
        raise Unusable("mispaired")
    size = metadata.get("width"), metadata.get("height")
    if all(type(n) is int for n in size) and size != found.size and size != found.size[::-1]:  # with or without EXIF's rotation
        raise Unusable("mispaired")


def check_metadata(metadata: dict, rules: Rules) -> None:
    for key, limit, cause in (("punsafe", rules.max_punsafe, "unsafe"), ("pwatermark", rules.max_pwatermark, "watermark")):
        value = metadata.get(key)
        if limit is not None and isinstance(value, (int, float)) and value > limit:
            raise Unusable(cause)
    if rules.nsfw and metadata.get("NSFW") is not None and str(metadata["NSFW"]) not in rules.nsfw:
        raise Unusable("unsafe")


def hands_of(metadata: dict, keys: tuple[str, ...]) -> int:
    """1, 0 or -1 (unknown), by the first of `keys` that the JSON has: a truth value, a number, a list, or either as text."""
    for key in keys:
        value = metadata.get(key)
        if value is not None:
            return int(value.strip().lower() not in ("", "0", "0.0", "false", "no", "none", "[]") if isinstance(value, str) else bool(value))
    return -1


# -- for captions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """Neighbouring samples of one unit whose pictures a captioner is to see."""

    files: tuple[str, ...]
    spans: tuple
    shown_pixels: int  # what the captioner looks at; larger pictures are reduced to half as much again
    max_pixels: int


def show_chunk(chunk: Shown) -> list[np.ndarray] | OSError:
    """uint8 [H, W, 3] of each; an OSError as in inspect_chunk."""
    try:
        with Files(chunk.files) as files:
            return _show(files, chunk)
    except OSError as error:
        return error


def _show(files: Files, chunk: Shown) -> list[np.ndarray]:
    arrays = []
    for span in chunk.spans:
        image = full_picture(files.read(span), chunk.max_pixels, round((1.5 * chunk.shown_pixels) ** 0.5))
        scale = (1.5 * chunk.shown_pixels / (image.width * image.height)) ** 0.5
        if scale < 1:
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(image))
    return arrays
