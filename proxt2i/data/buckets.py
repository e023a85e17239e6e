"""Aspect-ratio buckets: the few picture sizes that a data set is trained at."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

MAX_BUCKETS = 1000


def make_buckets(image_size: int, step: int, sizes: Sequence[str] = (), max_aspect: float = 1.0) -> list[tuple[int, int]]:
    """(height, width) of every bucket in pixels, each side a multiple of `step`, from wide to tall.

    `sizes` ("HEIGHTxWIDTH") are taken as they are. Without them: for every width the largest height with at most
    image_size^2 pixels, where the longer side is at most `max_aspect` times the shorter; max_aspect 1 gives the square alone.
    ValueError: a side that is no multiple, a size twice, no size at all.
    """
    if sizes:
        buckets = [parse_size(size) for size in sizes]
        if len(set(buckets)) < len(buckets):
            raise ValueError(f"data.buckets names a size twice: {', '.join(sizes)}")
    else:
        if image_size % step:
            raise ValueError(f"data.image_size ({image_size}) must be a multiple of {step}: pixels per latent times patch size")
        buckets = [(image_size, image_size)]
        for short in range(step, image_size, step):
            long = image_size**2 // short // step * step
            # Where several short sides share a long one, the largest has the most pixels.
            if long <= max_aspect * short and not (short + step < image_size and image_size**2 // (short + step) // step * step == long):
                buckets += [(short, long), (long, short)] if long > image_size else []
    for height, width in buckets:
        if min(height, width) < step or height % step or width % step:
            raise ValueError(f"bucket {height}x{width}: both sides must be multiples of {step}: pixels per latent times patch size")
    if len(buckets) > MAX_BUCKETS:
        raise ValueError(f"{len(buckets):,} buckets are too many: lower data.max_aspect, or list sizes in data.buckets")
    return sorted(buckets, key=lambda size: size[0] / size[1])


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", str(text))
    if match is None:
        raise ValueError(f"size {text!r}: expected HEIGHTxWIDTH in pixels, for example 320x192")
    return int(match[1]), int(match[2])


def assign(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket with the nearest aspect ratio, by the logarithm of height / width: int16 [N]; ties go to the wider one.

    sizes: int [N, 2], (height, width) of the upright picture; (0, 0), unknown, counts as square.
    """
    log_ratio = np.log(np.maximum(sizes, 1)[:, 0] / np.maximum(sizes, 1)[:, 1])
    ratios = np.array([math.log(height / width) for height, width in buckets])
    middles = (ratios[1:] + ratios[:-1]) / 2                   # sorted, as the buckets are
    return np.searchsorted(middles, log_ratio, side="left").astype(np.int16)


def describe(buckets: Sequence[tuple[int, int]], bucket: np.ndarray) -> str:
    """"3 sizes: 192x320 (4,000), ..." """
    counts = np.bincount(bucket, minlength=len(buckets))
    return f"{len(buckets)} sizes: " + ", ".join(f"{h}x{w} ({count:,})" for (h, w), count in zip(buckets, counts))
