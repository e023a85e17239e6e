"""Random numbers that depend on (run seed, global sample position) alone.

Sample `position` is the position-th image that the run trains on, counted over all ranks. Its noise, its (t, lambda)
pair and its caption dropout are pure functions of (seed, position): they do not depend on the number of ranks, and a
resumed run needs no generator state.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
PAIR, DROPOUT = 1, 2  # streams of `uniforms`


def sample_seeds(run_seed: int, positions: np.ndarray) -> np.ndarray:
    """One 64-bit seed per position: int64 [B], int64 [B] out."""
    with np.errstate(over="ignore"):
        run = _mix(np.asarray([run_seed]).astype(np.uint64) + _GOLDEN)
        return _mix(run + positions.astype(np.uint64) * _GOLDEN).view(np.int64)


def uniforms(seeds: np.ndarray, stream: int) -> np.ndarray:
    """Uniform numbers in [0, 1), one per seed, independent between streams: int64 [B] -> float64 [B]."""
    with np.errstate(over="ignore"):
        bits = _mix(seeds.view(np.uint64) + np.uint64(stream) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of 64-bit numbers without visible structure (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
