"""Image files: recognised, opened, decoded, turned, encoded again. Nothing is decompressed before its header has passed the caps."""

from __future__ import annotations

import fcntl
import io
import warnings
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
REPAIRS = ("EXIF rotation", "CMYK", "wrong extension")  # bit i of Inspection.repairs; the first two need the picture to be encoded again
REENCODE = 0b011
LARGE = 4_000_000  # pixels, see is_large
LARGE_FILE = 16_000_000  # bytes: such files are read one at a time
Image.MAX_IMAGE_PIXELS = None  # Rules.max_pixels is the cap, and is looked at before decoding


class Unusable(Exception):
    """Why a sample is dropped."""


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


def is_large(image: Image.Image) -> bool:
    """Whether decoding takes so much memory that it is done for one picture at a time: 24 bytes a pixel of a WebP, 6 to 8 of a progressive JPEG.

    Other JPEGs are decoded at a fraction of their size."""
    return image.width * image.height > LARGE and (image.format != "JPEG" or bool(image.info.get("progressive")))


_mine = False  # this process has the lock


@contextmanager
def one_at_a_time(large: bool):
    """If `large`, wait until no other process on this machine is within. The lock goes with its process; what has it passes again."""
    global _mine
    if not large or _mine:
        yield
        return
    with open(__file__) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        _mine = True
        try:
            yield
        finally:
            _mine = False


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


def full_picture(data: bytes, max_pixels: int, least: int = 0) -> Image.Image:
    """Decoded, upright, RGB. least: see load."""
    with open_picture(data, max_pixels) as image, one_at_a_time(is_large(image)):
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
