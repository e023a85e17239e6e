"""How much of the decode-only rate a curation keeps, and what it needs of memory. One run, the same images, the same number of worker processes.

    python benchmarks/curation.py [--images 4000] [--size 512] [--format jpg] [--workers 2] [--repeats 3]

decode     worker processes read and decode every picture to RGB at full size with Pillow, and do nothing else
reduced    the same at the fraction of its size at which the scan decodes a JPEG: what is left of `scan` beside it is the scan's own work
scan       the stage that looks at every byte: read, check, decode, filter, SHA-256, perceptual hash, records written
all        every stage, the result's shards, index and report included

They take turns; the medians count. Because a busy machine shifts rates, the CPU time an image is measured besides, in one process without workers. Memory is that of all processes together (proportional set size), sampled while `all` runs.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from faulty_shards import encoded, picture  # noqa: E402

from proxt2i.curation import samples, scan as scan_module  # noqa: E402
from proxt2i.curation.config import load_curation  # noqa: E402
from proxt2i.curation.samples import Chunk  # noqa: E402
from proxt2i.curation.run import Run  # noqa: E402
from proxt2i.curation.scan import CHUNK, rules_of  # noqa: E402
from proxt2i.curation.stages import STAGES, run_stages  # noqa: E402
from proxt2i.curation.sources import find_units  # noqa: E402
from proxt2i.curation.workers import Workers  # noqa: E402


OPTIONS = {"jpg": {"kind": "JPEG", "quality": 90}, "webp": {"kind": "WEBP", "quality": 90, "method": 0}, "png": {"kind": "PNG", "compress_level": 1}}


def write_images(folder: Path, images: int, size: int, extension: str = "jpg") -> None:
    """JPEGs (or others) of about the bytes per pixel of photographs, in shards of 1,000, through the same writer as any data set."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for start in range(0, images, 1000):
        with tarfile.open(folder / f"{start // 1000:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, min(start + 1000, images)):
                width, height = (size, int(size * rng.uniform(0.65, 1.5)))
                for name, data in ((f"{i:09d}.{extension}", encoded(picture(rng, width, height), **OPTIONS[extension])), (f"{i:09d}.txt", b"a caption"), (f"{i:09d}.json", b'{"NSFW": "UNLIKELY"}')):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def decode_chunk(chunk: Chunk, least: int = 0) -> list[int]:
    with samples.Files(chunk.files) as files:
        sizes = []
        for raw in chunk.samples:
            with Image.open(io.BytesIO(files.read(raw.spans[0]))) as image:
                if least:
                    image.draft(None, (least, least))
                image.load()
                sizes.append(image.width)
        return sizes


def decode_chunk_reduced(chunk: Chunk) -> list[int]:
    return decode_chunk(chunk, samples.LEAST)


def timed(work, workers: int) -> float:
    """Seconds that work(pool) takes: by the clock, or CPU seconds where there are no worker processes."""
    clock = time.perf_counter if workers else time.process_time
    started = clock()
    with Workers(workers) as pool:
        work(pool)
    return clock() - started


def decode(data: Path, workers: int, work_on=decode_chunk) -> float:
    rules = rules_of(load_curation())

    def work(pool):
        jobs = ((None, Chunk(tuple(map(str, unit.files)), tuple(raws[i : i + CHUNK]), rules))
                for unit in find_units(data, 1000) for raws in [unit.list().samples] for i in range(0, len(raws), CHUNK))
        for _ in pool.ordered(jobs, work_on):
            pass

    return timed(work, workers)


def curate(data: Path, out: Path, workers: int, stages=STAGES) -> float:
    shutil.rmtree(out, ignore_errors=True)
    run = Run(data, out, load_curation((), [f"run.workers={workers}"]), quiet=True)
    return timed(lambda pool: run_stages(run, stages), workers)


def curate_alone(data: Path, out: Path, stages=STAGES) -> float:
    """CPU seconds, all work in this process."""
    original, scan_module.num_workers = scan_module.num_workers, lambda config: 0
    try:
        return curate(data, out, 0, stages)
    finally:
        scan_module.num_workers = original


class Memory(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stop = 0, False
        self.start()

    def run(self):
        me = psutil.Process()
        while not self.stop:
            try:
                self.peak = max(self.peak, sum(process.memory_full_info().pss for process in [me, *me.children(recursive=True)]))
            except psutil.Error:
                pass
            time.sleep(0.2)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", type=int, default=512, help="width of the pictures (pixels)")
    parser.add_argument("--format", choices=OPTIONS, default="jpg")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        data, out = Path(name, "shards"), Path(name, "out")
        write_images(data, args.images, args.size, args.format)
        decode(data, args.workers)  # files into the cache, libraries into memory
        times: dict[str, list[float]] = {"decode": [], "reduced": [], "scan": [], "all": []}
        cpu: dict[str, list[float]] = {"decode": [], "reduced": [], "scan": [], "all": []}
        for _ in range(args.repeats):
            times["decode"].append(decode(data, args.workers))
            times["reduced"].append(decode(data, args.workers, decode_chunk_reduced))
            times["scan"].append(curate(data, out, args.workers, ("scan",)))
            memory = Memory()
            times["all"].append(curate(data, out, args.workers))
            memory.stop = True
            cpu["decode"].append(decode(data, 0))
            cpu["reduced"].append(decode(data, 0, decode_chunk_reduced))
            cpu["scan"].append(curate_alone(data, out, ("scan",)))
            cpu["all"].append(curate_alone(data, out))
        size = sum(path.stat().st_size for path in data.iterdir()) / args.images
    rates = {what: args.images / statistics.median(seconds) for what, seconds in times.items()}
    result = {"images": args.images, "size": args.size, "format": args.format, "bytes_per_image": round(size), "workers": args.workers, "images_per_s": {what: round(rate, 1) for what, rate in rates.items()},
              "scan_over_decode": round(rates["scan"] / rates["decode"], 3), "all_over_decode": round(rates["all"] / rates["decode"], 3),
              "cpu_ms_per_image": {what: round(1e3 * statistics.median(seconds) / args.images, 3) for what, seconds in cpu.items()},
              "scan_over_decode_cpu_each": [round(d / s, 3) for d, s in zip(cpu["decode"], cpu["scan"])],
              "scan_over_decode_each": [round(d / s, 3) for d, s in zip(times["decode"], times["scan"])], "peak_memory_gib": round(memory.peak / 2**30, 3)}
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
