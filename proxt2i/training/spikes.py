"""Steps that are better not taken: a non-finite gradient, or one far longer than those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 100  # steps that the running mean looks back, and that it needs before it judges


@dataclass
class SpikeGuard:
    """limit: a step is refused when its gradient norm is more than `limit` times the running mean (0: never).

    The norm is that of all ranks together, so every rank decides alike. `skipped` steps so far, `in_a_row` the last ones.
    """

    limit: float
    mean: float = 0.0
    steps: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def refuses(self, norm: float) -> bool:
        return bool(self.limit) and self.steps >= MEMORY and norm > self.limit * self.mean

    def judge(self, norm: float) -> str:
        """What is wrong with the step of this gradient norm, or "": then it joins the mean."""
        bad = ""
        if not math.isfinite(norm):
            bad = "non-finite gradient"
        elif self.refuses(norm):
            bad = f"gradient norm of {norm:.3g}, {norm / self.mean:.0f} times the mean of the last {MEMORY} steps"
        if bad:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        else:
            self.steps, self.in_a_row = self.steps + 1, 0
            self.mean += (norm - self.mean) / min(self.steps, MEMORY)
        return bad

    def state(self) -> dict:
        return {"mean": self.mean, "steps": self.steps, "skipped": self.skipped, "in_a_row": self.in_a_row}
