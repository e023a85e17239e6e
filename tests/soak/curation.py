"""A curation under heavy fire: 20,000 images with planted faults, kill -9 over and over, then the bytes of an unbroken run. Minutes.

    make soak [KILLS=20] [IMAGES=20000] [ARGS="-k curation"]
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from faulty_shards import assert_as_expected, write_faulty_shards  # noqa: E402
from test_curation import files_of  # noqa: E402

KILLS = int(os.environ.get("KILLS", "20"))
IMAGES = int(os.environ.get("IMAGES", "20000"))
SEED = int(os.environ.get("SEED", time.time_ns() % 10**6))
LIMIT = 1.5  # GiB


def say(text):
    print(text, file=sys.__stderr__, flush=True)


def start(shards, out):
    command = [sys.executable, "-m", "proxt2i.curation", str(shards), str(out), "write.held_out=0.05", "run.workers=2", "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True)


def tree(pid):
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


class Memory(threading.Thread):
    """The most that a process and its descendants held at once: proportional set sizes, GiB."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.peak, self.samples = pid, 0.0, 0
        self.start()

    def run(self):
        while psutil.pid_exists(self.pid):
            try:
                self.peak = max(self.peak, sum(process.memory_full_info().pss for process in tree(self.pid)) / 2**30)
                self.samples += 1
            except psutil.Error:
                pass
            time.sleep(0.2)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak") / "shards"
    return folder, write_faulty_shards(folder, IMAGES, per_shard=max(20, IMAGES // 100))


def test_curation_survives_kills(faulty, tmp_path):
    shards, expected = faulty
    straight, broken = tmp_path / "straight" / "out", tmp_path / "broken" / "out"
    began = time.monotonic()
    run = start(shards, straight)
    memory = Memory(run.pid)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    seconds = time.monotonic() - began
    assert_as_expected(straight, expected)
    faults = sum(expected["dropped"].values()) + sum(expected["repaired"].values())
    say(f"soak: {IMAGES:,} images curated in {seconds:.0f} s; {faults:,} planted faults each under its own cause, {len(expected['sha256']):,} good ones kept; "
        f"peak memory of all processes {memory.peak:.2f} GiB")
    assert memory.samples > 3 and memory.peak < LIMIT

    rng, where, orphans, rounds = random.Random(SEED), Counter(), 0, 0
    one = files_of(straight)
    for number in range(KILLS):
        while True:
            run = start(shards, broken)
            seen = len(list(broken.rglob("*")))
            while run.poll() is None and len(list(broken.rglob("*"))) <= seen:  # it has begun to work
                time.sleep(0.01)
            time.sleep(rng.uniform(0, seconds / 4))
            if run.poll() is None:
                break
            output = run.communicate()[0]  # it was faster: it has to be right, and the next one begins anew
            assert run.returncode == 0, output
            assert files_of(broken) == one
            shutil.rmtree(broken)
            rounds += 1
        processes = tree(run.pid)
        if rng.random() < 0.5:
            os.killpg(run.pid, signal.SIGKILL)
        else:
            run.kill()  # the main process alone; its workers have to notice
        run.communicate()
        orphans += len(psutil.wait_procs(processes[1:], timeout=20)[1])
        done = {stage: len(list((broken / "work" / stage).glob("*.json"))) for stage in ("scan", "caption", "write")}
        stage = next((stage for stage in ("write", "caption", "scan") if done[stage]), "start")
        where[stage] += 1
        say(f"kill {number + 1:2d} of {KILLS}: {stage}, {done} finished, {len(list(broken.rglob('.*.tmp-*')))} half-written files")
    run = start(shards, broken)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    other = files_of(broken)
    assert one.keys() == other.keys() and [name for name in one if one[name] != other[name]] == [] and not orphans
    say(f"soak: curation: {KILLS} kills -9 ({dict(where)}), {rounds + 1} results: all {len(one):,} files have the bytes of an unbroken run; SEED={SEED}")
