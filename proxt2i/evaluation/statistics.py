"""How sure a mean over prompts is: bootstrap over prompts, and differences of two samplers on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEW = 20  # prompts below which a percentile interval is too narrow to be taken at its word


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """values [N] or [S, N] of pictures, groups int [N] numbered 0 ... G - 1 -> means of the groups [G] or [S, G], float64."""
    counts = np.bincount(groups)
    rows = np.atleast_2d(np.asarray(values, np.float64))
    means = np.stack([np.bincount(groups, row) / counts for row in rows])
    return means if np.ndim(values) == 2 else means[0]


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of `values` [S, G] over prompts drawn with replacement: float64 [S, resamples]. The same draws for all S rows, so that their
    differences are differences on the same prompts. A function of (values, resamples, seed)."""
    values = np.asarray(values, np.float64)
    count, rng = values.shape[1], np.random.Generator(np.random.PCG64(seed))
    centre = values.mean(1, keepdims=True)  # summed apart: rounding is that of the spread
    means = np.empty((len(values), resamples))
    step = max(1, 10_000_000 // count)  # draws held at a time
    for at in range(0, resamples, step):
        chosen = rng.integers(0, count, (min(step, resamples - at), count))
        for row, value in enumerate(values - centre):
            means[row, at:at + len(chosen)] = value[chosen].mean(1)
    return means + centre


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of bootstrapped means [resamples]."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_and_interval(values: np.ndarray) -> dict:
    """{"mean", "low", "high", "prompts"} of per-prompt values [G]; no interval of a single prompt."""
    low, high = interval(bootstrap_means(values[None])[0]) if len(values) > 1 else (None, None)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "prompts": len(values)}


def difference(a: np.ndarray, b: np.ndarray) -> dict:
    """a - b of two samplers on the same prompts, per-prompt values [G] each: mean, interval, share of prompts where a is higher (equal: half)."""
    found = mean_and_interval(a - b)
    return found | {"wins": float(((a > b) + 0.5 * (a == b)).mean()), "excludes_zero": found["low"] is not None and (found["low"] > 0 or found["high"] < 0)}


def numbered(keys: Sequence) -> np.ndarray:
    """int64 [N]: equal keys have equal numbers, counted in the order they come."""
    numbers: dict = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
