"""Endless batches of one rank, in the order of order.py, from tar shards or latent shards."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from proxt2i.data.order import BatchOrder, flips, positions
from proxt2i.data.shards import Bad
from proxt2i.signals import outlive_signals

log = logging.getLogger(__name__)


class BadSamples:
    """Counts bad samples, each once, names the first few, and appends all to `list_in` (JSON lines: shard, key, reason).
    RuntimeError beyond `budget` (default: 1 %, at least 10)."""

    def __init__(self, num_samples: int, budget: int | None = None, list_in: Path | None = None, num_named: int = 5):
        budget = max(10, num_samples // 100) if budget is None else budget
        self.budget, self.num_named, self.list_in = min(budget, num_samples - 1), num_named, list_in
        self.found: dict[tuple[str, str], Bad] = {}
        self._listed = set() if list_in is None else _already_listed(list_in)

    def add(self, bad: Bad, here: bool = True) -> None:
        """here: met by this process, not told by another rank."""
        if (bad.shard, bad.key) in self.found:
            return
        self.found[bad.shard, bad.key] = bad
        if here:
            self._name(bad)
        if len(self.found) > self.budget:
            raise RuntimeError(f"{self.summary()}: more than the budget of {self.budget}. "
                               f"Mend the shards, or allow more bad samples (data.max_bad)")

    def _name(self, bad: Bad) -> None:
        if len(self.found) <= self.num_named:
            log.warning("bad sample %s; skipped%s", bad, ", further ones are only counted"
                        if len(self.found) == self.num_named else "")
        if self.list_in is not None and (bad.shard, bad.key) not in self._listed:
            self.list_in.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"shard": bad.shard, "key": bad.key, "reason": bad.reason}) + "\n"
            descriptor = os.open(self.list_in, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, line.encode())           # one write a line: ranks may append at the same time
            finally:
                os.close(descriptor)

    def summary(self) -> str:
        if not self.found:
            return "no bad samples"
        listed = f", listed in {self.list_in}" if self.list_in else ""
        return f"{len(self.found)} bad samples skipped{listed}, the last: {list(self.found.values())[-1]}"


def _already_listed(path: Path) -> set[tuple[str, str]]:
    listed = set()
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            listed.add((entry["shard"], entry["key"]))
        except (ValueError, KeyError, TypeError):             # cut short by a kill
            pass
    return listed


class BatchLoader:
    """Endless batches of one rank, from `images_seen` on. Use as an iterator, and close() it (or use `with`).

    dataset: a ShardDataset or LatentDataset. A batch has one shape, the same on every rank: {"images": float32 [B, 3, H, W] in
    [-1, 1] or "latents": float32 [B, C, h, w], with "text": a float32 [B, L_i, D_i] for every encoder whose
    embeddings are stored; all on `device`, "captions", "keys": list[str], "ids": int64 [B], the global positions}. `num_workers` processes
    read ahead (0: none). `flip` mirrors with probability 1/2, keyed by (seed, position). A bad sample gives its place to the
    next good one in its bucket's order, the same on any number of ranks, and is added to `bad`; RuntimeError when there are
    more than `max_bad`. RuntimeError too when no batch comes for `timeout_s` (with workers), naming the shard that hangs.
    """

    def __init__(self, dataset, batch_size: int, *, seed: int = 0, images_seen: int = 0, rank: int = 0, world: int = 1,
                 num_workers: int = 2, device: str | torch.device = "cpu", flip: bool = False, max_bad: int | None = None,
                 bad_list: Path | None = None, timeout_s: float = 0.0):
        positions(images_seen, batch_size, rank, world)       # refuses bad arguments here, not at the first batch
        self.dataset, self.batch_size, self.seed, self.images_seen = dataset, batch_size, seed, images_seen
        self.rank, self.world, self.device, self.flip, self.timeout_s = rank, world, torch.device(device), flip, timeout_s
        self.num_workers = 0 if dataset.in_memory else num_workers
        self.order = BatchOrder(dataset.bucket, seed, batch_size * world)
        self.bad = BadSamples(len(dataset), max_bad, bad_list)
        self._batches = None

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        ids = self._positions(self.images_seen)
        for row, bad in batch.pop("bad").items():
            self._replace(batch, row, bad)
        self.images_seen += self.batch_size * self.world
        return {**self._on_device(batch), "ids": torch.from_numpy(ids)}

    def _positions(self, images_seen: int) -> np.ndarray:
        return positions(images_seen, self.batch_size, self.rank, self.world)

    def _mirrored(self, images_seen: int) -> np.ndarray:
        return flips(self.seed, self._positions(images_seen)) if self.flip else np.zeros(self.batch_size, dtype=bool)

    def _start(self) -> ReadAhead:
        def requests():
            for start in itertools.count(self.images_seen, self.batch_size * self.world):
                bucket, places = self.order.step(start, self.batch_size, self.rank, self.world)
                yield self.order.samples(bucket, places), self._mirrored(start)

        return ReadAhead(self.dataset, requests(), self.num_workers, self.timeout_s, pin_memory=self.device.type == "cuda")

    def _replace(self, batch: dict, row: int, bad: Bad) -> None:
        self.bad.add(bad)
        found: dict = {}
        bucket, places = self.order.step(self.images_seen, self.batch_size, self.rank, self.world)
        mirrored = self._mirrored(self.images_seen)[row:row + 1]

        def is_bad(index: int) -> bool:
            nonlocal found
            found = self.dataset.read_batch(np.array([index]), mirrored)
            for another in found["bad"].values():
                self.bad.add(another)
            return bool(found["bad"])

        self.order.replace(bucket, int(places[row]), is_bad)
        for name, value in found.items():
            if name == "text":
                for whole, one in zip(batch["text"], value):
                    whole[row] = one[0]
            elif name != "bad":
                batch[name][row] = value[0]

    def _on_device(self, batch: dict) -> dict:
        def moved(tensor):
            return tensor.to(self.device, non_blocking=True)

        if "images" in batch:
            images = moved(batch["images"]).permute(0, 3, 1, 2).contiguous()
            return {**batch, "images": images.float().div_(127.5).sub_(1)}
        return {**batch, "latents": moved(batch["latents"]).float(), "text": [moved(t).float() for t in batch["text"]]}

    def close(self) -> None:
        """Stop the workers and log the number of bad samples. Iterating again continues where it stopped."""
        self._batches = None                                  # the last reference: torch joins the workers
        if self.bad.found:
            log.warning("%s", self.bad.summary())

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class ReadAhead:
    """dataset.read_batch(*request) for each of `requests`, in order, from `num_workers` processes that read ahead (0: none).

    RuntimeError when a batch does not come within `timeout_s` (0: never; without processes there is no limit either).
    """

    def __init__(self, dataset, requests: Iterable[tuple[np.ndarray, np.ndarray]], num_workers: int, timeout_s: float, pin_memory: bool = False):
        self._reader, self._num_workers, self._timeout_s, self._received = _Reader(dataset, num_workers), num_workers, timeout_s, 0
        self._hanging: str | None = None
        self._batches = iter(DataLoader(
            self._reader, batch_size=None, sampler=requests, num_workers=num_workers, collate_fn=_as_it_is, pin_memory=pin_memory,
            generator=torch.Generator(), prefetch_factor=4 if num_workers else None, worker_init_fn=outlive_signals,
            timeout=timeout_s + 5 if num_workers and timeout_s else 0))         # for a process that cannot even be killed

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if not (self._num_workers and self._timeout_s):
            return next(self._batches)
        timer = threading.Timer(self._timeout_s, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            batch = next(self._batches)
        except Exception:                                     # of many types: it depends on where the process was killed
            if self._hanging is None:
                raise
            self._reader.wait_for_the_killed()
            raise RuntimeError(f"no batch of data for {self._timeout_s:g} s (data.timeout_s): {self._hanging}. "
                               "Does its disk or file server answer?") from None
        finally:
            timer.cancel()
        self._received += 1
        return batch

    def _give_up(self) -> None:
        """Note which sample is late, and kill the processes: torch would wait for a stopped one beyond its own time-out."""
        self._hanging = self._reader.place(self._received % self._num_workers)   # torch hands the batches out in turn
        self._reader.kill()


class _Reader(Dataset):
    """[indices, mirrored] -> a batch. Notes in shared memory which process reads which sample, for when one hangs."""

    def __init__(self, dataset, num_workers: int):
        self.dataset = dataset
        self.pids, self.reading = RawArray("q", num_workers or 1), RawArray("q", [-1] * (num_workers or 1))

    def __getitem__(self, request: tuple[np.ndarray, np.ndarray]) -> dict:
        worker = get_worker_info()
        number = worker.id if worker else 0
        if worker:
            self.pids[number] = os.getpid()

        def note(index: int) -> None:
            self.reading[number] = index

        batch = self.dataset.read_batch(*request, note)
        note(-1)
        return batch

    def place(self, worker: int) -> str:
        index, process = self.reading[worker], f"loader process {self.pids[worker] or worker}"
        return f"{process} hangs reading {self.dataset.name(index)}" if index >= 0 else f"{process} hangs, but not in reading"

    def kill(self) -> None:
        for pid in filter(None, self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_for_the_killed(self, timeout_s: float = 2.0) -> None:
        """A dying process closes its sockets, which is noticed, before it is gone. Until it is, torch's handler of SIGCHLD may
        raise, once, wherever this process happens to be: let that be here."""
        until = time.monotonic() + timeout_s                  # one in the kernel's hands cannot be killed: it is not waited for
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError):
                if not {process.pid for process in multiprocessing.active_children()} & set(self.pids):
                    return
                time.sleep(0.01)


def _as_it_is(batch: dict) -> dict:
    return batch
