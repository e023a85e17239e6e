"""What a worker process does with one sample: read it once, check it, decode it once, and describe it in a few hundred bytes.

Pillow and numpy only: workers stay small and start fast. Nothing is decompressed before its header has passed the caps.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from proxt2i.curation.sources import IMAGE, JSON, TEXT, Raw

FORMATS = ("JPEG", "PNG", "WEBP")
REPAIRS = ("EXIF rotation", "CMYK", "wrong extension")  # bit i of Inspection.repairs; the first two need the picture to be encoded again
REENCODE = 0b011
MAX_TEXT_BYTES = 1 << 20
LARGE = 4_000_000  # pixels
SMALL = 32  # side of the copy that perceptual hash and colours come from (pixels)
THUMB = 8
Image.MAX_IMAGE_PIXELS = None  # Rules.max_pixels is the cap, and is looked at before decoding


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


class Unusable(Exception):
    """Why a sample is dropped."""


def inspect_chunk(chunk: Chunk) -> list[Inspection] | OSError:
    """An OSError is a result here: it concerns the shard, not the run."""
    try:
        with Files(chunk.files) as files:
            return [inspect(files, raw, chunk.rules) for raw in chunk.samples]
    except OSError as error:
        return error


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
        data = files.read(raw.spans[IMAGE])
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
    except Unusable as error:
        found.cause = str(error)
    return found


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


# -- pictures ---------------------------------------------------------------------------------------------------------


def sniff(data: bytes) -> str:
    """Format by the first bytes: JPEG, PNG or WEBP. Unusable for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        raise Unusable("animated" if _animated_gif(data) else "format not supported")
    if data[:2] == b"BM" or data[:4] in (b"II*\0", b"MM\0*") or data[4:8] == b"ftyp" or data[:4] in (b"\0\0\0\x0c", b"\xffO\xffQ", b"8BPS"):
        raise Unusable("format not supported")
    raise Unusable("not an image")


def _animated_gif(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("GIF",)) as image:
            return image.is_animated  # reads block headers only
    except Exception:  # a broken GIF is as useless as a whole one
        return False


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """Opened, nothing decoded. Unusable: too many pixels, animated, or a header that cannot be read."""
    kind = sniff(data)
    if kind == "WEBP" and (size := webp_size(data)) and size[0] * size[1] > max_pixels:  # Pillow allocates the canvas when it opens one
        raise Unusable("more pixels than allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=(kind,))
        too_large = image.width * image.height > max_pixels
        animated = getattr(image, "n_frames", 1) > 1 and not (kind == "JPEG")  # a JPEG with more frames has a preview beside the picture (MPO)
    except Exception as error:  # Pillow's parsers raise nearly every type there is
        raise Unusable(_broken(data, kind)) from error
    if too_large or animated:
        image.close()
        raise Unusable("more pixels than allowed" if too_large else "animated")
    return image


def webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from a WebP header (RFC 9649), None if it is none of the three kinds."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def load(image: Image.Image, least: int = 0) -> None:
    """Decode. least > 0: a JPEG may be decoded to 1/2, 1/4 or 1/8 of its size, with both sides at least this long; every byte is still parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if least:
                image.draft(None, (least, least))
            image.load()
    except Exception as error:  # Pillow's decoders raise nearly every type there is
        cut = any(word in str(error) for word in ("truncated", "frame", "end of"))
        raise Unusable("image is cut short" if cut else "image cannot be decoded") from error


@contextmanager
def one_large_picture_at_a_time(image: Image.Image):
    """On this machine: decoding a WebP takes 24 bytes a pixel. A JPEG is decoded at a fraction of its size. The lock goes with its process."""
    if image.format == "JPEG" or image.width * image.height <= LARGE:
        yield
        return
    with open(__file__) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _broken(data: bytes, kind: str) -> str:
    """Why a picture cannot be opened: most such files end before their formats' end marks."""
    ends = {"WEBP": int.from_bytes(data[4:8], "little") + 8 <= len(data), "JPEG": b"\xff\xd9" in data[-64:], "PNG": b"IEND" in data[-64:]}
    return "image cannot be decoded" if ends[kind] else "image is cut short"


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8; of a decoded picture, because a PNG may tell it last."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, on white where it is transparent; as the training's reader does it."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def upright(image: Image.Image, turn: int) -> Image.Image:
    """`image` turned as EXIF's orientation `turn` says."""
    method = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
              6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}.get(turn)  # fmt: skip
    return image if method is None else image.transpose(method)


def describe(image: Image.Image, found: Inspection, crop: int) -> None:
    """Decode and fill in the rest of `found`."""
    least = max(2 * crop, 6 * SMALL)
    with one_large_picture_at_a_time(image):
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
        small = np.asarray(upright(rgb.resize((SMALL, SMALL), Image.Resampling.BILINEAR), turn))
        if crop:
            found.crop = np.asarray(upright(ImageOps.fit(rgb, (crop, crop), Image.Resampling.BICUBIC), turn))
    except Exception as error:  # conversions of odd modes
        raise Unusable("image cannot be decoded") from error
    found.hashes = perceptual_hashes(small)
    found.thumb = small.reshape(THUMB, SMALL // THUMB, THUMB, SMALL // THUMB, 3).mean((1, 3)).round().astype(np.uint8).tobytes()


_COSINES = np.cos(np.pi / SMALL * (np.arange(SMALL) + 0.5) * np.arange(8)[:, None])  # float64 [8, 32]: the lowest rows of the DCT-II
_LUMA = np.array([0.299, 0.587, 0.114])
_ZIGZAG = np.array(sorted(range(64), key=lambda i: (i // 8 + i % 8, i)))  # low frequencies first
_MIRROR = np.where(np.arange(64)[_ZIGZAG] % 2, -1.0, 1.0)  # sign of each coefficient in the mirror image
BANDS = 4  # of 16 bits each; the first has the lowest frequencies, which change least
UNSURE = 2  # bits a band
_EDGES = np.linspace(0, SMALL, 10)
_COLUMNS = np.clip(np.minimum(np.arange(SMALL)[:, None] + 1, _EDGES[1:]) - np.maximum(np.arange(SMALL)[:, None], _EDGES[:-1]), 0, None)  # [32, 9]: overlaps


def perceptual_hashes(small: np.ndarray) -> np.ndarray:
    """uint8 [32, 32, 3] -> uint64 [2, 3], of the picture and of its mirror image: (pHash, its unsure bits, difference hash).

    pHash: bit i tells whether coefficient i of the 8x8 lowest ones of the luma's DCT lies above their median (bit 0, the mean's, is 0). Unsure
    are the two bits of each 16 whose coefficients lie nearest to the median: what scaling and compression turn over first. The difference
    hash tells for 8x8 places whether the luma grows to the right.
    """
    luma = small @ _LUMA
    coefficients = (_COSINES @ luma @ _COSINES.T).ravel()[_ZIGZAG]
    values = np.stack([coefficients, coefficients * _MIRROR])
    values -= np.partition(values[:, 1:], 31, axis=1)[:, 31:32]  # the median of 63
    values[:, 0] = -np.inf
    nearest = np.abs(values).reshape(2 * BANDS, -1).argsort(1, kind="stable")[:, :UNSURE].astype(np.uint16)
    rows = luma.reshape(8, SMALL // 8, SMALL).mean(1) @ _COLUMNS
    growing = np.stack([rows[:, 1:] > rows[:, :-1], rows[:, -2::-1] > rows[:, :0:-1]])
    bits = np.packbits(np.concatenate([values > 0, growing.reshape(2, 64)]), axis=1, bitorder="little").view("<u8")[:, 0]
    unsure = np.bitwise_or.reduce(np.left_shift(np.uint16(1), nearest), 1).astype("<u2").view("<u8")
    return np.stack([bits[:2], unsure, bits[2:]], 1).astype(np.uint64)


# -- the picture itself, for captions and for writing -----------------------------------------------------------------


def full_picture(data: bytes, max_pixels: int, least: int = 0) -> Image.Image:
    """Decoded, upright, RGB. least: see load."""
    with open_picture(data, max_pixels) as image, one_large_picture_at_a_time(image):
        load(image, least)
        return upright(to_rgb(image), orientation(image))


def repaired(data: bytes, repairs: int, max_pixels: int) -> tuple[str, bytes]:
    """(extension, bytes) of an image file to write: its own bytes, unless it has to be turned or is CMYK (then JPEG at quality 95, or PNG)."""
    kind = sniff(data)
    if repairs & REENCODE:
        image, buffer = full_picture(data, max_pixels), io.BytesIO()
        if kind == "JPEG":
            image.save(buffer, "JPEG", quality=95, subsampling=0)
        else:
            image.save(buffer, "PNG")
            kind = "PNG"
        data = buffer.getvalue()
    return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind], data


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
