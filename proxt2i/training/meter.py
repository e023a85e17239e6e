"""Averages between two log lines, over all ranks, without a device synchronisation per step."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from proxt2i.models.flops import peak_tflops, tokens_per_image, training_flops
from proxt2i.training.distributed import Ranks
from proxt2i.transfer import send


class Meter:
    """bucket_names: of the losses ("N4/k3"); uvit_config: the network's, for its FLOPs; peak: bf16 TFLOP/s of one rank's
    device, None: looked up by the GPU's name, and without one no MFU is reported."""

    def __init__(self, bucket_names: Sequence[str], uvit_config: Mapping, ranks: Ranks, peak: float | None = None):
        self.bucket_names, self.uvit_config, self.ranks = bucket_names, uvit_config, ranks
        self.peak = peak or device_peak(ranks)
        self.reset()

    def reset(self) -> None:
        self.loss_sum = torch.zeros(len(self.bucket_names), dtype=torch.float64, device=self.ranks.device)
        self.loss_count = torch.zeros_like(self.loss_sum)
        self.grad_norms: list[float] = []
        self.images = self.tokens = self.flops = 0  # this rank's
        self.data_seconds = self.paused_seconds = 0.0
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def waits_for_data(self):
        """Counts the time within as waiting, unless the device was busy all the while with what it had been given before."""
        start, given = time.perf_counter(), None
        if self.ranks.device.type == "cuda":
            given = torch.cuda.Event()
            given.record()
        yield
        if given is None or given.query():
            self.data_seconds += time.perf_counter() - start

    def add_images(self, latents: Tensor) -> None:
        """Count a batch of this rank, latents [B, C, h, w]."""
        count, _, *size = latents.shape
        self.images += count
        self.tokens += count * tokens_per_image(self.uvit_config, *size)
        self.flops += count * training_flops(self.uvit_config, *size)

    def add_losses(self, losses: Tensor, bucket: Tensor) -> None:
        """losses: [B], detached; bucket: int64 [B] on the CPU. Non-finite losses are left out."""
        bucket, finite = send(bucket, losses.device), losses.isfinite()
        self.loss_sum.index_add_(0, bucket, torch.where(finite, losses, 0.0).double())
        self.loss_count.index_add_(0, bucket, finite.double())

    def summary(self) -> dict[str, float]:
        """Means since the last reset, and a reset. Collective. Non-numbers are left out.

        Rates and losses are those of all ranks together, data_wait is their mean and memory_gib their largest. loss/N4 is
        the loss of step count 4, loss/N4/k3 that of its step 3. tflops_per_s counts useful operations (`training_flops`).
        """
        work = torch.tensor([self.images, self.tokens, self.flops, self.data_seconds], dtype=torch.float64, device=self.ranks.device)
        totals = torch.cat([work, self.loss_sum, self.loss_count])
        dist.all_reduce(totals)
        memory = torch.tensor(peak_memory(self.ranks), device=self.ranks.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        (images, tokens, flops, data_seconds), sums, counts = (part.tolist() for part in totals.split([4, *[len(self.bucket_names)] * 2]))
        seconds = time.perf_counter() - self.started - self.paused_seconds
        row = {
            "loss": sum(sums) / max(sum(counts), 1.0),
            "grad_norm": sum(self.grad_norms) / max(len(self.grad_norms), 1),
            "images_per_s": images / seconds,
            "tokens_per_s": tokens / seconds,
            "tflops_per_s": flops / seconds / 1e12,
            "data_wait": data_seconds / self.ranks.world_size / seconds,
            "memory_gib": int(memory) / 2**30,
        }
        if self.peak:
            row["mfu"] = row["tflops_per_s"] / (self.peak * self.ranks.world_size)
        self.reset()
        return {key: value for key, value in (row | self._losses(sums, counts)).items() if math.isfinite(value)}

    def _losses(self, sums: list[float], counts: list[float]) -> dict[str, float]:
        """Per bucket and per group of buckets ("N4" of "N4/k3"), where there were any."""
        totals = defaultdict(lambda: [0.0, 0.0])
        for name, loss_sum, count in zip(self.bucket_names, sums, counts):
            for key in dict.fromkeys((name.split("/")[0], name)):
                totals[key][0] += loss_sum
                totals[key][1] += count
        return {f"loss/{name}": s / c for name, (s, c) in totals.items() if c}


def device_peak(ranks: Ranks) -> float | None:
    """Dense bf16 TFLOP/s of this rank's GPU, None for a CPU or a GPU that is not known."""
    return peak_tflops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None


def peak_memory(ranks: Ranks) -> int:
    """Largest memory of this rank so far, in bytes: allocated on the GPU, or resident in the process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
