"""Memory, communication and time of training on 8 to 1,024 GPUs, from one GPU's measured speed and a model of the network.

    python benchmarks/scaling.py [--peak-tflops 989 --efficiency 0.378 --images 32 ...]

Prints the tables of docs/scaling.md. Memory is proxt2i/dry_run.py's count, operations are proxt2i/models/flops.py's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from proxt2i.dry_run import activation_bytes, state_memory  # noqa: E402
from proxt2i.models.flops import forward_flops  # noqa: E402
from proxt2i.models.uvit import build_uvit  # noqa: E402
from proxt2i.training.engine import MAX_BUCKET  # noqa: E402

SIZES = {"H": {}, "2B": {"embed_dim": 2048, "depth": 36, "num_heads": 16, "gradient_checkpointing": True},
         "8B": {"embed_dim": 3584, "depth": 48, "num_heads": 28, "gradient_checkpointing": True}}
GPUS = (8, 64, 256, 1024)
A_NODE = 8  # GPUs
FP32 = 4  # bytes: gradients and weights travel in it


def collective_seconds(num_bytes: float, gpus: int, given) -> float:
    """All-gather or reduce-scatter of `num_bytes` in all, as a ring through each node: every GPU sends its (gpus - 1) / gpus over NVLink,
    every node as much over its network cards together; and one latency a ring step and bucket."""
    nodes = gpus / A_NODE
    inside = num_bytes * (gpus - 1) / gpus / (given.nvlink * 1e9)
    between = num_bytes * (nodes - 1) / nodes / (A_NODE * given.network * 1e9)
    buckets = max(1.0, num_bytes / given.bucket)
    return max(inside, between) + buckets * (gpus - 1) * given.latency * 1e-6


def step_seconds(num_params: int, forward: float, backward: int, stage: int, gpus: int, given) -> tuple[float, float]:
    """(seconds of one step, share of them in which the GPUs wait for the network). forward: operations of one rank's images; backward: how
    many forward passes a backward pass costs, 2, or 3 with recomputation.

    ZeRO-2 sums gradients during the backward pass and gathers the new weights afterwards. ZeRO-3 gathers weights before both passes and
    sums gradients, all behind the arithmetic.
    """
    unit = forward / (given.peak_tflops * 1e12 * given.efficiency)
    once = collective_seconds(FP32 * num_params, gpus, given)
    total = unit + max(backward * unit, once) + once if stage == 2 else max(unit, once) + max(backward * unit, 2 * once)
    return total, 1 - (1 + backward) * unit / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peak-tflops", type=float, default=989, help="dense bf16 peak of a GPU (TFLOP/s)")
    add("--efficiency", type=float, default=0.378, help="share of it that the arithmetic reaches, recomputation included (measured: docs/kernels.md)")
    add("--images", type=int, default=32, help="images of a rank and step (default: 32)")
    add("--batch", type=int, help="images of a step, all ranks together: the ranks share them (default: each has --images)")
    add("--nvlink", type=float, default=300, help="what a GPU sends within its node (GB/s)")
    add("--network", type=float, default=40, help="what one GPU's network card sends (GB/s)")
    add("--latency", type=float, default=5, help="of one step of a ring (microseconds)")
    add("--bucket", type=float, default=4 * MAX_BUCKET, help="bytes that are sent at once")
    given = parser.parse_args()
    for name, shape in SIZES.items():
        with torch.device("meta"):
            uvit = build_uvit("H", qk_norm=True, **shape)
        num_params = sum(p.numel() for p in uvit.parameters())
        forward = forward_flops(uvit.config)
        print(f"\n**{name}**: {num_params / 1e6:,.0f} M parameters, {3 * forward / 1e12:.2f} TFLOP an image\n")
        print("| GPUs | images a step | activations, GiB | state, GiB | sent by a rank a step, GB | images/s | waiting | MFU | days for 300 M images |")
        print("|---|---|---|---|---|---|---|---|---|")
        for gpus in GPUS:
            images = given.batch // gpus if given.batch else given.images
            cells = {key: [] for key in ("state", "sent", "speed", "wait", "mfu", "days")}
            for stage in (2, 3):
                seconds, waiting = step_seconds(num_params, images * forward, 3 if uvit.gradient_checkpointing else 2, stage, gpus, given)
                speed = images * gpus / seconds
                cells["state"].append(f"{sum(state_memory(0, num_params, stage, gpus).values()) / 2**30:.1f}")
                cells["sent"].append(f"{stage * FP32 * num_params * (gpus - 1) / gpus / 1e9:.1f}")
                cells["speed"].append(f"{speed:,.0f}")
                cells["wait"].append(f"{waiting:.0%}")
                cells["mfu"].append(f"{3 * forward * speed / gpus / given.peak_tflops / 1e12:.0%}")
                cells["days"].append(f"{300e6 / speed / 86400:,.2f}")
            kept = f"{activation_bytes(uvit, images, bf16=True) / 2**30:.1f}"
            print(f"| {gpus:,} | {gpus * images:,} | {kept} | " + " | ".join(" / ".join(pair) for pair in cells.values()) + " |")


if __name__ == "__main__":
    main()
