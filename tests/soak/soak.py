"""The trainer's promises under heavy fire: minutes, and therefore not part of `make test`.

    make soak [KILLS=20] [ARGS="-k disk"]

Two real ranks under the real deepspeed launcher die of kill -9, over and over: while they start, during a save (the temporary
folder is there), and at random moments; all at once, or one rank alone, which the other has to notice. --resume takes up each time. The
end is that of an unbroken run, bit for bit. Since the weights depend on every sample's content and order, that also says that every
sample was seen exactly once an epoch. Then: another number of ranks, a full disk, damaged checkpoints.
"""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runs import BareRanks, assert_same_checkpoint, kill, launch, overrides, rank_pids, resumed_at, rows, run_rank, wait_for

KILLS = int(os.environ.get("KILLS", "20"))
SEED = int(os.environ.get("SEED", time.time_ns() % 10**6))  # of the moments; printed, though timing is never quite the same again


def say(text):
    print(text, file=sys.__stderr__, flush=True)


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def kill_at(moment, run, folder, stats, rng):
    """Wait for the moment; False if the run ended before."""
    rows_before = stats.stat().st_size if stats.exists() else 0
    if moment == "start":
        time.sleep(rng.uniform(0, 8))
    elif moment == "save":
        stale = set(folder.glob("*.tmp"))  # the last victim's, until rank 0 writes that checkpoint again
        if not wait_for(lambda: {p for p in folder.glob("*.tmp")} - stale, run):
            return False
        time.sleep(rng.uniform(0, 0.03))
    else:
        if not wait_for(lambda: stats.exists() and stats.stat().st_size > rows_before, run):
            return False
        time.sleep(rng.uniform(0, 2))
    return run.poll() is None


def kill_one_rank(run, rng) -> str | None:
    """SIGKILL one rank alone; the rest must end by itself, at once. None if the ranks are not up yet."""
    pids = rank_pids(run)
    if len(pids) < 2:
        return None
    victim = rng.randrange(2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[victim], signal.SIGKILL)
    try:
        return run.communicate(timeout=40)[0]  # launch.py itself looks once a second and gives the other up to 30 s
    except subprocess.TimeoutExpired:
        raise AssertionError(f"rank {1 - victim} outlived rank {victim}: {kill(run)}") from None


def test_kill_9(settings, tmp_path):
    rng = random.Random(SEED)
    # Long enough for all kills: a life is rarely longer than 600 images.
    length = dict(train__images=600 * KILLS, train__checkpoint_every=160, train__log_every=160, sample__every=0)
    broken, straight = tmp_path / "run", tmp_path / "straight"
    folder, arguments = broken / "checkpoints", overrides(settings, **length)
    began, counts, starts = time.monotonic(), {"start": 0, "save": 0, "training": 0}, []
    tmp_left = alone = 0
    for number in range(KILLS):
        run = launch("--resume", *arguments)
        moment = rng.choices(list(counts), (3, 4, 4))[0]
        assert kill_at(moment, run, folder, broken / "stats.jsonl", rng), f"it ended before the kill: {run.communicate()[0]}"
        output = kill_one_rank(run, rng) if rng.random() < 0.25 and moment == "training" else None
        alone += output is not None
        output = kill(run) if output is None else output
        assert not (broken / "model").exists(), output
        counts[moment] += 1
        tmp_left += bool(list(folder.glob("*.tmp")))
        starts.append(resumed_at(output))
        say(f"kill {number + 1:2d} of {KILLS}: {moment:8s} began at {starts[-1]:,} images, "
            f"newest checkpoint {max((p.name for p in folder.glob('step-*') if p.suffix != '.tmp'), default='none')}")
    run = launch("--resume", *arguments)
    output = run.communicate(timeout=600)[0]
    assert run.returncode == 0, output
    assert resumed_at(output) > 0
    run = BareRanks(*overrides(settings, train__run_dir=straight, **length), log=tmp_path / "log")
    assert run.wait(600) == [0, 0], run.output

    kept = sorted(path.name for path in (straight / "checkpoints").glob("step-*"))
    assert kept == sorted(path.name for path in folder.iterdir() if path.name != "latest") and len(kept) == 2  # no *.tmp either
    for name in kept:
        assert_same_checkpoint(straight / "checkpoints" / name, folder / name)
    for file in sorted((straight / "model").rglob("*.safetensors")):
        one, other = load_file(file), load_file(broken / file.relative_to(straight))
        assert all((one[key] == other[key]).all() for key in one)
    images = list(range(160, 600 * KILLS + 1, 160))
    images += [600 * KILLS] if images[-1] != 600 * KILLS else []
    assert [row["images"] for row in rows(broken)] == images == [row["images"] for row in rows(straight)]
    assert [row["loss"] for row in rows(broken)] == [row["loss"] for row in rows(straight)]
    say(f"soak: {KILLS} kills -9 ({counts['start']} starting, {counts['save']} saving, {counts['training']} training; {alone} of one rank alone; "
        f"{tmp_left} left a half-written checkpoint), {600 * KILLS:,} images: the weights, checkpoints and losses of an unbroken run, bit for bit; "
        f"{time.monotonic() - began:.0f} s, SEED={SEED}")


# -- another number of ranks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer, tolerance", [("adamw", 1e-4), ("muon", 2e-3)])  # Muon's five rounds of products enlarge rounding
def test_two_ranks_then_one_then_two(settings, tmp_path, optimizer, tolerance):
    """The losses of an unbroken run of two ranks, to rounding: sums are taken in another order."""
    def train(run_dir, images, ranks, *more):
        run = BareRanks(*more, *overrides(settings, train__run_dir=run_dir, train__images=images, optim__schedule="constant", optim__name=optimizer,
                                          sample__every=0), ranks=ranks, log=tmp_path / f"log-{run_dir.name}-{images}")
        assert run.wait() == [0] * ranks, run.output

    train(tmp_path / "straight", 1440, 2)
    for images, ranks in ((480, 2), (960, 1), (1440, 2)):
        train(tmp_path / "changed", images, ranks, "--resume")
    straight, changed = rows(tmp_path / "straight"), rows(tmp_path / "changed")
    assert [row["images"] for row in changed] == [row["images"] for row in straight]
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(straight, changed))
    say(f"soak: 2 -> 1 -> 2 ranks with {optimizer}: the loss differs by at most {worst:.1e} of itself")
    assert worst < tolerance


# -- a full disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, kib: int):
    """A tmpfs at `folder`, or None where mounting is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def limited_rank(rank, ranks, port, arguments, log):
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    run_rank(rank, ranks, port, arguments, log)


LIMIT = 100_000  # bytes; less than the weights of the wider network


def refused(run, folder):
    """The full disk is said, with the checkpoint's path, and all ranks end."""
    codes = run.wait(120)
    assert set(codes) <= {1, 2} and len(set(codes)) == 1, run.output
    assert "No space left" in run.output or "File too large" in run.output
    assert str(folder) in [line for line in run.output.splitlines() if line.startswith("error: ")][-1]


def test_a_full_disk_keeps_the_last_good_checkpoint(settings, tmp_path):
    size = sum(p.stat().st_size for p in one_checkpoint(settings, tmp_path).rglob("*") if p.is_file())
    with small_disk(tmp_path / "disk", kib=int(2.5 * size / 1024)) as mounted:
        if not mounted:
            pytest.skip("mounting a small disk is not allowed here")
        run_dir = tmp_path / "disk" / "run"
        arguments = overrides(settings, train__run_dir=run_dir, train__keep_checkpoints=5, sample__every=0)
        run = BareRanks(*arguments, log=tmp_path / "full")
        refused(run, run_dir / "checkpoints")
        assert sorted(p.name for p in (run_dir / "checkpoints").glob("step-*")) == ["step-000000064", "step-000000128"]
        # Room again (a disk as large as before, and fewer checkpoints kept): it goes on from the last good one.
        subprocess.run(["mount", "-o", f"remount,size={20 * size // 1024 + 10_000}k", tmp_path / "disk"], check=True)
        again = BareRanks("--resume", *arguments, log=tmp_path / "again")
        assert again.wait() == [0, 0] and resumed_at(again.output) == 128, again.output


def test_a_file_size_limit_is_said_too(settings, tmp_path):
    """As quotas and `ulimit -f` make it: the first checkpoint cannot be written at all."""
    run_dir = tmp_path / "run"
    run = BareRanks(*overrides(settings, train__run_dir=run_dir, model__embed_dim=64, sample__every=0), log=tmp_path / "log", program=limited_rank)
    refused(run, run_dir / "checkpoints")
    assert not list((run_dir / "checkpoints").glob("step-*[0-9]"))


def one_checkpoint(settings, tmp_path) -> Path:
    run = BareRanks(*overrides(settings, train__run_dir=tmp_path / "one", train__images=64, sample__every=0), log=tmp_path / "log-one")
    assert run.wait() == [0, 0], run.output
    return tmp_path / "one" / "checkpoints" / "step-000000064"


# -- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_checkpoints_are_skipped(settings, tmp_path):
    arguments = overrides(settings, train__keep_checkpoints=3, sample__every=0)
    folder, straight = tmp_path / "run" / "checkpoints", tmp_path / "straight"
    for name, run_dir in (("run", tmp_path / "run"), ("straight", straight)):
        run = BareRanks(*arguments, f"train.run_dir={run_dir}", log=tmp_path / f"log-{name}")
        assert run.wait() == [0, 0], run.output
    for name, damage in (("step-000000192", lambda data: data[:-100]), ("step-000000128", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])):
        file = max((folder / name).rglob("*.safetensors"), key=lambda p: p.stat().st_size)
        file.write_bytes(damage(file.read_bytes()))
    run = BareRanks("--resume", *arguments, log=tmp_path / "log-again")
    assert run.wait() == [0, 0] and resumed_at(run.output) == 64, run.output
    assert run.output.count("skipping a damaged checkpoint") == 2
    assert_same_checkpoint(straight / "checkpoints" / "step-000000192", folder / "step-000000192")
