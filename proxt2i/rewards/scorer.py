"""Scoring in the background, so that rewards are computed while the next pictures are drawn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from .base import Reward, score


class Scorer:
    """One thread that scores what it is given, in order.

        with Scorer(rewards) as scorer:
            future = scorer.submit(images, prompts, metadata)
            ...                       # draw the next pictures
            scores = future.result()  # {name: float32 [B]}; raises what `score` raises, with the reward's name

    Leaving the block drops what has not begun and waits for what has. seconds: spent scoring so far, in whatever else's shadow.
    """

    def __init__(self, rewards: Sequence[Reward]):
        self.rewards, self.seconds = list(rewards), 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict | None] | None = None) -> Future[dict[str, Tensor]]:
        """As `score`. The images are copied to the CPU first, so the caller may overwrite its own."""
        images = images.detach().to("cpu", copy=True)
        return self._pool.submit(self._score, images, list(prompts), None if metadata is None else list(metadata))

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None) -> dict[str, Tensor]:
        start = time.perf_counter()
        try:
            return score(self.rewards, images, prompts, metadata)
        finally:
            self.seconds += time.perf_counter() - start

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
