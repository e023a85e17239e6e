"""Trainers measured against each other: each a process of its own, bound to a core (on a GPU to none), asked in turn for a second or two, in a new order every round."""

import multiprocessing
import os
import platform
import random
import statistics
import time
from pathlib import Path

import torch

from proxt2i.training import distributed


def serve(pipe, core: int | None, environment: dict, log: Path, make, arguments, warmup: int) -> None:
    """A contestant: answers a number of steps by its (seconds, processor seconds), None by its end."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    step = make(*arguments)
    for _ in range(warmup):
        step()
    pipe.send("ready")
    while (steps := pipe.recv()) is not None:
        start, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        pipe.send((time.perf_counter() - start, time.process_time() - used))
    if os.environ.get("RANK"):
        distributed.stop()


class Contestant:
    """Processes that are asked together: ranks of one job, or jobs that run at the same time. `arguments`: of each. warmup: steps before the first turn."""

    def __init__(self, folder: Path, name: str, make, arguments: list[tuple], cores: list[int | None], one_job: bool = False, warmup: int = 5):
        context, port = multiprocessing.get_context("spawn"), distributed._free_port()
        self.name, self.log, self.pipes, self.processes = name, folder / f"{name}.log", [], []
        for rank, (core, its) in enumerate(zip(cores, arguments)):
            near, far = context.Pipe()
            job = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(cores)), LOCAL_WORLD_SIZE=str(len(cores)),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) if one_job else {}
            process = context.Process(target=serve, args=(far, core, job, self.log, make, (folder, *its), warmup))
            process.start()
            far.close()
            self.pipes.append(near)
            self.processes.append(process)

    def wait(self):
        try:
            for pipe in self.pipes:
                pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}") from None
        return self

    def run(self, steps: int) -> list[tuple[float, float]]:
        """(seconds, processor seconds) of `steps` steps, of each process."""
        for pipe in self.pipes:
            pipe.send(steps)
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def take_turns(contestants: list[Contestant], rounds: int, seconds: float) -> list[dict[str, list[tuple[float, float]]]]:
    """Of each round, the seconds and processor seconds that a step took each process of each contestant. seconds: of a turn; 0: one step."""
    steps = {c.name: max(1, round(seconds / (c.run(3)[0][0] / 3))) if seconds else 1 for c in contestants}
    order, results = random.Random(0), []
    for _ in range(rounds):
        order.shuffle(contestants)
        results.append({c.name: [(wall / steps[c.name], cpu / steps[c.name]) for wall, cpu in c.run(steps[c.name])] for c in contestants})
    return results


def spread(values) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * list(values)
    return {"median": median, "quartiles": [low, high]}


def machine() -> dict:
    from proxt2i import _C

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key: next((line.split(":")[1].strip() for line in lines if line.startswith(key)), "") for key in ("model name", "cpu MHz")}
    return {"processor": facts["model name"] or platform.processor(), "mhz": facts["cpu MHz"], "cores": os.cpu_count(), "torch": torch.__version__,
            "build": _C.build_info()}
