"""Samples a second of one core: pictures read, checked, decoded and collated from PNG shards, and latents from latent shards.

    python benchmarks/loader.py [--out benchmarks/results/loader-cpu-DATE.json]

One process, held to one core, with one thread, does what a loader process does: dataset.read_batch for batches in the order of
training. Files are in the page cache after the first round. The machine may be shared: of --repeats rounds the best is the
figure, and the median is given besides.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from timing import write_result

from proxt2i.data.latent_shards import ABOUT, LatentDataset, write_index, write_latent_shard
from proxt2i.data.order import BatchOrder, flips, positions
from proxt2i.data.portraits import write_portraits
from proxt2i.data.shards import ShardDataset, index_shards

BATCH = 64


def write_latents(folder: Path, num_shards: int, per_shard: int, channels: int = 16, side: int = 32) -> LatentDataset:
    """Random latents of 256 x 256 pictures in fp16 with their mirrored ones, captions of 12 words, no embeddings."""
    folder.mkdir()
    about = {"image_size": 8 * side, "buckets": [f"{8 * side}x{8 * side}"], "mirrored": True, "dtype": "fp16", "channels": channels,
             "factor": 8, "vae": "", "text": []}
    (folder / ABOUT).write_text(json.dumps(about))
    entries = []
    for number in range(num_shards):
        latents, mirrored = torch.randn(2, per_shard, channels, side, side).half()
        records = [{"key": f"{number:05d}{i:04d}", "caption": " ".join(["a word"] * 6)} for i in range(per_shard)]
        entry = write_latent_shard(folder / f"{number:05d}.safetensors", about, [latents], [mirrored], [], records)
        entries.append({**entry, "source": "", "bad": []})
    write_index(folder, about, entries)
    return LatentDataset(folder)


def rates(dataset, num_batches: int, repeats: int) -> list[float]:
    """Samples/s of every round over the same batches."""
    order = BatchOrder(dataset.bucket, 0, BATCH)
    requests = [(order.samples(*order.step(start, BATCH)), flips(0, positions(start, BATCH))) for start in range(0, num_batches * BATCH, BATCH)]
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for request in requests:
            if dataset.read_batch(*request)["bad"]:
                raise RuntimeError("bad samples: the figure would be of something else")
        found.append(num_batches * BATCH / (time.perf_counter() - start))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096, help="samples of every data set (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds over them (%(default)s)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core to run on (default: the last)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    num_batches = args.samples // BATCH
    with tempfile.TemporaryDirectory() as folder:
        write_portraits(Path(folder) / "png", args.samples, 64, progress=False)
        start = time.perf_counter()
        index = index_shards(Path(folder) / "png")
        indexing = args.samples / (time.perf_counter() - start)
        latents = write_latents(Path(folder) / "latents", 4, args.samples // 4)
        result = {"batch": BATCH, "samples": args.samples, "repeats": args.repeats, "cpu": _cpu(), "indexing_samples_per_s": indexing, "samples_per_s": {}}
        for name, dataset in {"64x64 PNG": ShardDataset(index, 64), "64x64 PNG to 48x80": ShardDataset(index, 64, buckets=[(48, 80)]),
                              "16x32x32 fp16 latents, from files": latents,
                              "16x32x32 fp16 latents, in memory": LatentDataset(latents.folder, in_memory=True)}.items():
            found = rates(dataset, num_batches, args.repeats)
            result["samples_per_s"][name] = {"best": max(found), "median": statistics.median(found)}
            print(f"{name:<36} {max(found):>9,.0f} samples/s of one core, best of {args.repeats}; median {statistics.median(found):,.0f}", flush=True)
        print(f"{'indexing (once)':<36} {indexing:>9,.0f} samples/s, one round")
    write_result(args.out, result)


def _cpu() -> str:
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    return f"{fields.get('model name')}, {fields.get('cpu MHz')} MHz"


if __name__ == "__main__":
    main()
