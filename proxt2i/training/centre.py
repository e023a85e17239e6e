"""What the centred proximal matching loss is centred on: the running mean of the error in each bucket of training pairs."""

import torch
import torch.distributed as dist
from torch import Tensor

RATE = 0.05  # share of a step's mean in the running mean


class Centre:
    """mean: float64 [num_buckets], nan where nothing was seen yet; the same on every rank, and part of a checkpoint."""

    def __init__(self, num_buckets: int, device: torch.device | str = "cpu"):
        self.mean = torch.full((num_buckets,), torch.nan, dtype=torch.float64, device=device)
        self.sums = torch.zeros(2, num_buckets, dtype=torch.float64, device=device)

    def add(self, mse: Tensor, bucket: Tensor) -> None:
        """mse: [B]; bucket: int64 [B], on any device. Non-finite ones are left out."""
        finite = mse.isfinite()
        values = torch.stack([torch.where(finite, mse, 0.0), finite.to(mse.dtype)])
        self.sums.index_add_(1, bucket.to(self.sums.device), values.double())

    def update(self) -> None:
        """After an optimiser step: take in what was added since the last one. Collective."""
        dist.all_reduce(self.sums)
        step = self.sums[0] / self.sums[1]  # nan where a bucket had no sample
        moved = torch.where(self.mean.isnan(), step, self.mean + RATE * (step - self.mean))
        self.mean = torch.where(step.isnan(), self.mean, moved)
        self.sums.zero_()

    def of(self, bucket: Tensor, mse: Tensor) -> Tensor:
        """The mean of each sample's bucket, [B]; where there is none yet, the sample's own mse."""
        mean = self.mean[bucket.to(self.mean.device)].to(mse.dtype)
        return torch.where(mean.isnan(), mse, mean)

    def state(self) -> list[float | None]:
        """For a checkpoint's JSON."""
        return [None if m != m else m for m in self.mean.tolist()]

    def load(self, state: list[float | None]) -> None:
        """Nothing of another number of buckets is taken over (the pairs have changed)."""
        if len(state) == len(self.mean):
            self.mean = torch.tensor([torch.nan if m is None else m for m in state], dtype=torch.float64, device=self.mean.device)
