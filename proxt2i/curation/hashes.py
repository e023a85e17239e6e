"""By what two pictures are known to look the same: perceptual hashes and a colour thumbnail, from a copy of 32x32 pixels."""

from __future__ import annotations

import numpy as np

SMALL = 32  # side of the copy that perceptual hash and colours come from (pixels)
THUMB = 8
_COSINES = np.cos(np.pi / SMALL * (np.arange(SMALL) + 0.5) * np.arange(8)[:, None])  # float64 [8, 32]: the lowest rows of the DCT-II
_LUMA = np.array([0.299, 0.587, 0.114])
_ZIGZAG = np.array(sorted(range(64), key=lambda i: (i // 8 + i % 8, i)))  # low frequencies first
_MIRROR = np.where(np.arange(64)[_ZIGZAG] % 2, -1.0, 1.0)  # sign of each coefficient in the mirror image
BANDS = 4  # of 16 bits each; the first has the lowest frequencies, which change least
UNSURE = 2  # bits a band
_EDGES = np.linspace(0, SMALL, 10)
_COLUMNS = np.clip(np.minimum(np.arange(SMALL)[:, None] + 1, _EDGES[1:]) - np.maximum(np.arange(SMALL)[:, None], _EDGES[:-1]), 0, None)  # [32, 9]: overlaps


def perceptual_hashes(small: np.ndarray) -> np.ndarray:
    """uint8 [B, 32, 32, 3] -> uint64 [B, 2, 3], of each picture and of its mirror image: (pHash, its unsure bits, difference hash).

    pHash: bit i tells whether coefficient i of the 8x8 lowest ones of the luma's DCT lies above their median (bit 0, the mean's, is 0). Unsure
    are the two bits of each 16 whose coefficients lie nearest to the median: what scaling and compression turn over first. The difference
    hash tells for 8x8 places whether the luma grows to the right. What a picture gets does not depend on the others of its batch.
    """
    num, luma = len(small), small @ _LUMA
    coefficients = (_COSINES @ luma @ _COSINES.T).reshape(num, 64)[:, _ZIGZAG]
    values = np.stack([coefficients, coefficients * _MIRROR], 1)
    values -= np.partition(values[..., 1:], 31, axis=2)[..., 31:32]  # the median of 63
    values[..., 0] = -np.inf
    nearest = np.abs(values).reshape(num, 2 * BANDS, -1).argsort(2, kind="stable")[..., :UNSURE].astype(np.uint16)
    rows = luma.reshape(num, 8, SMALL // 8, SMALL).mean(2) @ _COLUMNS
    growing = np.stack([rows[..., 1:] > rows[..., :-1], rows[..., -2::-1] > rows[..., :0:-1]], 1)
    bits = np.packbits(np.concatenate([values > 0, growing.reshape(num, 2, 64)], 1), axis=2, bitorder="little").view("<u8")[..., 0]
    unsure = np.bitwise_or.reduce(np.left_shift(np.uint16(1), nearest), 2).astype("<u2").view("<u8")
    return np.stack([bits[:, :2], unsure, bits[:, 2:]], 2).astype(np.uint64)


def thumbnails(small: np.ndarray) -> np.ndarray:
    """uint8 [B, 32, 32, 3] -> uint8 [B, 192]: means of 4x4 places."""
    side = SMALL // THUMB
    sums = small.reshape(-1, THUMB, side, THUMB, side, 3).sum((2, 4), dtype=np.uint32).reshape(-1, 3 * THUMB * THUMB)
    return np.rint(sums / side**2).astype(np.uint8)
