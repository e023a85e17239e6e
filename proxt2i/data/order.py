"""The order of samples: a pure function of (seed, images seen, images a step).

Samples lie in buckets, one a shape; without aspect-ratio buckets there is one. Each bucket of n samples has an endless
stream: its place q is entry q % n of the permutation of the bucket's round q // n. A step takes its B images from
consecutive places of ONE bucket's stream, rank r the r-th contiguous part, so all ranks have the same shape and equal work.

Epoch e (from 0) of the data set has floor((e + 1) n / B) - floor(e n / B) steps of every bucket, shuffled by (seed, e). So
after e epochs every sample was seen e times, except for fewer than B of each bucket: those lead the bucket's next step. With
one bucket this is a permutation an epoch, without a remainder. Resuming, on any number of ranks, needs `images_seen` alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_SCHEDULE = 2**16 - 1                  # stream number of the steps' order; buckets have the numbers from 0 on


def positions(images_seen: int, batch_size: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Global positions int64 [batch_size] of rank `rank`'s part of the step that starts at `images_seen`: what noise, flips and
    caption dropout are keyed by."""
    if batch_size < 1 or images_seen < 0 or not 0 <= rank < world:
        raise ValueError(f"batch_size={batch_size}, images_seen={images_seen}, rank={rank}, world={world}: "
                         f"needs batch_size >= 1, images_seen >= 0 and 0 <= rank < world")
    return images_seen + rank * batch_size + np.arange(batch_size, dtype=np.int64)


def flips(seed: int, positions: np.ndarray) -> np.ndarray:
    """bool [B]: a fair coin for each (seed, position), by the splitmix64 hash."""
    x = np.asarray(positions).astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x5851F42D4C957F2D) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x & np.uint64(1)).astype(bool)


def permutation(num: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """int64 [num], a function of its arguments on every machine and with every version of numpy."""
    # Sort raw Philox words that carry their index in the low bits: unlike Generator.permutation's, numpy promises
    # never to change that stream; and there are no ties.
    bits = np.uint64(num.bit_length())
    words = np.random.Philox(key=np.array([seed % 2**64, epoch | stream << 48], dtype=np.uint64)).random_raw(num)
    words = (words << bits) | np.arange(num, dtype=np.uint64)
    words.sort()
    return (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


class Stream:
    """stream(places int64 [B]) -> entries int64 [B] of range(num), each once in every `num` places."""

    def __init__(self, num: int, seed: int, number: int = 0):
        if num < 1:
            raise ValueError("an order needs at least one sample")
        self.num = num
        self._round = lru_cache(maxsize=2)(lambda epoch: permutation(num, seed, epoch, number))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        epochs, entries = np.divmod(np.asarray(places, dtype=np.int64), self.num)
        found = np.empty_like(entries)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._round(int(epoch))[entries[here]]
        return found


class BatchOrder:
    """Which samples a step trains on. bucket: of each sample, int [N]; step_size: B, images a step on all ranks together."""

    def __init__(self, bucket: np.ndarray, seed: int, step_size: int):
        if len(bucket) < 1 or step_size < 1:
            raise ValueError("an order needs at least one sample, and one image a step")
        self.num_samples, self.step_size, self.seed = len(bucket), step_size, seed
        self.counts = np.bincount(bucket).tolist()
        self._members = [np.flatnonzero(bucket == b).astype(np.int32) for b in range(len(self.counts))]
        self._streams = [Stream(n, seed, b) if n else None for b, n in enumerate(self.counts)]
        self._epoch = lru_cache(maxsize=2)(self._steps_of)

    def step(self, images_seen: int, batch_size: int, rank: int = 0, world: int = 1) -> tuple[int, np.ndarray]:
        """(bucket, places int64 [batch_size] in its stream) of rank `rank`'s part of the step that starts at `images_seen`."""
        if batch_size * world != self.step_size:
            raise ValueError(f"{world} ranks of {batch_size} images: this order is for {self.step_size} images a step")
        number, offset = divmod(images_seen, self.step_size)   # an offset is left by a run that went on with another batch size
        epoch = self._epoch_of(number)
        buckets, batches = self._epoch(epoch)
        entry = number - sum(self._batches_before(epoch))
        bucket = int(buckets[entry])
        start = (self._batches_before(epoch)[bucket] + int(batches[entry])) * self.step_size + offset
        return bucket, positions(start, batch_size, rank, world)

    def samples(self, bucket: int, places: np.ndarray) -> np.ndarray:
        """Sample indices int64 [B] at places of a bucket's stream."""
        return self._members[bucket][self._streams[bucket](places)].astype(np.int64)

    def replace(self, bucket: int, place: int, is_bad) -> int:
        """The first sample from `place` on, within its round and then from its start, for which not is_bad(index)."""
        num = self.counts[bucket]
        start = place - place % num
        for step in range(num):
            index = int(self.samples(bucket, np.array([start + (place - start + step) % num]))[0])
            if not is_bad(index):
                return index
        raise RuntimeError("every sample is bad")

    def _batches_before(self, epoch: int) -> list[int]:
        return [epoch * n // self.step_size for n in self.counts]

    def _epoch_of(self, number: int) -> int:
        epoch = number * self.step_size // self.num_samples    # at most that many steps come before it
        while sum(self._batches_before(epoch + 1)) <= number:
            epoch += 1
        return epoch

    def _steps_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's steps in order: (bucket, how many steps of that bucket came before in this epoch)."""
        counts = np.subtract(self._batches_before(epoch + 1), self._batches_before(epoch))
        buckets = np.repeat(np.arange(len(counts)), counts)
        buckets = buckets[permutation(len(buckets), self.seed, epoch, _SCHEDULE)]
        batches = np.empty_like(buckets)
        for bucket, count in enumerate(counts):
            batches[buckets == bucket] = np.arange(count)
        return buckets, batches
