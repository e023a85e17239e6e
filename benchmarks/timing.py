"""Medians of times on a GPU (CUDA events) or, for dry runs, on the CPU. They take turns: a change of clocks hits all alike.

And what the benchmarks of single operators share: their command line, what they ran on, the result file.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def medians(functions: dict[str, Callable], device: str, repeats: int, warmup: int = 3) -> dict[str, float]:
    """Seconds of one call of each function, as called: from its first kernel's start to its last one's end, waits for the host included."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    times = {name: [] for name in functions}
    if device == "cpu":
        for _ in range(repeats):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times.items()}
    events = {name: [] for name in functions}
    torch.cuda.synchronize()
    for _ in range(repeats):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs) for name, pairs in events.items()}


def graph_medians(functions: dict[str, list[Callable]], device: str, repeats: int, rounds: int = 4) -> dict[str, float]:
    """Seconds of one call on the device alone: `rounds` rounds over a list of calls are captured in a CUDA graph, and replays are timed.

    The calls of one list do the same work on memory of their own. Where their memory together is several times the L2 cache, every
    call finds its inputs in the device's memory and not in the cache.
    """
    if device == "cpu":
        return medians({name: calls[0] for name, calls in functions.items()}, device, repeats)
    replays, results = {}, []
    for name, calls in functions.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is created at a first call must not be created during the capture
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                results += [call() for call in calls]  # they stay alive: calls do not write where another has just written
        replays[name] = graph.replay
    seconds = medians(replays, device, repeats)
    return {name: value / (rounds * len(functions[name])) for name, value in seconds.items()}


def copy_bandwidth(device: str, num_bytes: int, repeats: int = 20) -> float:
    """Bytes per second, read and written, of copying a tensor that is much larger than any cache."""
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / medians({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]


def operator_arguments(description: str, repeats: int) -> argparse.Namespace:
    """The command line of a benchmark of native operators; sets torch's threads and seed."""
    from proxt2i import _C

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[8, 16, 64, 64], help="batch first (default: 8 16 64 64)")
    parser.add_argument("--threads", type=int, default=None, help="torch.set_num_threads (default: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="count only while the thread runs, for a machine that is busy otherwise; needs --threads 1")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        parser.error("--cpu-time counts one CPU thread: it needs --device cpu --threads 1")
    if args.device == "cuda" and not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        parser.error("--device cuda needs a GPU and an extension built with CUDA kernels (make gpu-check)")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def ran_on(args: argparse.Namespace) -> dict:
    """What a result file says of the run beside its figures."""
    from proxt2i import _C

    device_name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    return {"shape": args.shape, "dtype": "float32", "device": args.device, "device_name": device_name, "threads": torch.get_num_threads(),
            "clock": "the thread's CPU time" if args.cpu_time else "wall",
            "repeats": args.repeats, "torch": torch.__version__, "build": _C.build_info()}


def write_result(path: Path | None, result: dict) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
