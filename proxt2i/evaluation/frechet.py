"""How sure a Fréchet distance is: a jackknife over parts of the prompts.

A distance is not a mean over prompts, and it is too high by an amount that depends on the number of pictures. Drawing prompts with replacement
repeats pictures and so shifts it; leaving a part of them out hardly does, and shifts all parts alike, so that the spread is right.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from proxt2i.embedded.judge import distance_of_gaussians, symmetric_root
from proxt2i.evaluation.statistics import LEVEL

PARTS = 20  # of the prompts, at most: each is left out once


def distances_without(features: Tensor, parts: Tensor, reference: Tensor) -> np.ndarray:
    """Fréchet distance to reference [K, D] of the pictures with features [N, D] that are not of part p: float64 [P].

    parts: int64 [N], numbered 0 ... P - 1. Each part's sums are taken once and subtracted, and the reference's root serves all parts.
    """
    features, reference = features.double(), reference.double()
    if len(features) - parts.bincount().max() < 2:
        raise ValueError("a Fréchet distance needs at least 2 pictures outside of each part")
    centre = reference.mean(0)
    covariance = torch.cov(reference.T)
    root = symmetric_root(covariance)
    shifted = features - centre  # sums are of small numbers
    members = [shifted[parts == p] for p in range(int(parts.max()) + 1)]
    total, squares = shifted.sum(0), shifted.T @ shifted
    found = []
    for part in members:
        count = len(shifted) - len(part)
        mean = (total - part.sum(0)) / count
        own = (squares - part.T @ part - count * mean[:, None] * mean) / (count - 1)
        found.append(distance_of_gaussians(mean, covariance, own, root))
    return np.array(found)


def parts_of(groups: np.ndarray) -> np.ndarray:
    """groups int [N], the number of each picture's prompt -> int64 [N]: which part of the prompts it belongs to."""
    return groups % min(PARTS, groups.max() + 1)


def interval_of(value: float, without: np.ndarray) -> tuple[float, float]:
    """The jackknife's 95 % interval of a figure, from that figure without each of P parts [P]: Student's t with P - 1 degrees of freedom."""
    error = np.sqrt((len(without) - 1) / len(without) * np.square(without - without.mean()).sum())
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(without) - 1) * error)
    return value - half, value + half
