"""Worker processes: jobs in, results in the same order out, a bounded number on the way."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from proxt2i.signals import STOP_SIGNALS

AHEAD = 4  # jobs a worker on the way: enough to be busy while the main process is with the models


class Workers:
    """`num` processes (0: this one). Use with `with`. They end with the main process, however it ends."""

    def __init__(self, num: int):
        self.num, self._pool = num, None

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def ordered(self, jobs: Iterable[tuple], work: Callable, split: Callable | None = None, crashed: Callable | None = None,
                ahead: int = AHEAD) -> Iterator[tuple]:
        """(tag, work(job)) for (tag, job) of `jobs`, in their order. `work` returns a list, or an OSError, and is a module's function.

        When a worker dies (a decoder crashed), jobs are done again; the one that did it is split into single samples, and `crashed`
        gives the result of a sample that ends its process. RuntimeError if there is no `split`.
        """
        if not self.num:
            for tag, job in jobs:
                yield tag, work(job)
            return
        jobs, waiting = iter(jobs), deque()
        while True:
            while len(waiting) <= ahead * self.num and (item := next(jobs, None)) is not None:
                waiting.append([*item, self._submit(work, item[1])])
            if not waiting:
                return
            try:
                result = waiting[0][2].result()
            except BrokenProcessPool:
                if split is None:
                    raise RuntimeError("a worker process was killed (out of memory?); start again, and it goes on from the last finished shard") from None
                self._restart()
                self._recover(waiting, work, split, crashed)
                continue
            tag, _, _ = waiting.popleft()
            yield tag, result

    def _recover(self, waiting, work, split, crashed) -> None:
        """Do the waiting jobs again, one at a time, until the one is found that ends its process; then go on as usual."""
        for number, item in enumerate(waiting):
            item[2] = self._submit(work, item[1])
            try:
                item[2].result()
            except BrokenProcessPool:
                self._restart()
                item[2] = Future()
                results = [self._alone(work, single, crashed) for single in split(item[1])]
                item[2].set_result(next((one for one in results if isinstance(one, OSError)), None) or [one for result in results for one in result])
                for later in list(waiting)[number + 1:]:
                    later[2] = self._submit(work, later[1])
                return

    def _alone(self, work, job, crashed):
        for _ in range(2):  # a process may also be killed for what another one did
            try:
                return self._submit(work, job).result()
            except BrokenProcessPool:
                self._restart()
        try:
            self._submit(os.getpid).result()
        except BrokenProcessPool:
            raise RuntimeError("worker processes end as soon as they begin: is the memory, or the number of processes, exhausted? See what they wrote above") from None
        return crashed(job)

    def _submit(self, work, *job):
        try:
            return self._executor().submit(work, *job)
        except BrokenProcessPool:
            self._restart()
            return self._executor().submit(work, *job)

    def _executor(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not fork: the main process may hold a GPU and threads. The server that forks workers has only what they need.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["proxt2i.curation.samples"])
            self._pool = ProcessPoolExecutor(self.num, mp_context=context, initializer=_begin)
        return self._pool

    def _restart(self) -> None:
        pool, self._pool = self._pool, None
        pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    for number in STOP_SIGNALS:  # Ctrl-C reaches workers too; the main process ends them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
