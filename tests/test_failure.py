"""Ranks that die, fail or are stopped, as real processes: all end at once, it is said why, and --resume gives the bits of an unbroken run."""

import os
import random
import signal
import time

import pytest
from PIL import Image

from runs import BareRanks, assert_same_checkpoint, become_rank, launch, overrides, rank_pids, resumed_at, rows, wait_for

FOREVER = dict(train__images=10**8, train__log_every=160, train__checkpoint_every=10**7, sample__every=0)


def wait_until_it_trains(run):
    assert wait_for(lambda: run.log.exists() and "min left" in run.output, run), run.output


def ends(run, codes):
    """All ranks end by themselves, long before a collective's time-out of minutes."""
    assert run.wait(timeout=30) == codes, run.output


@pytest.mark.parametrize("victim, codes", [(0, [-signal.SIGKILL, 1]), (1, [1, -signal.SIGKILL])])
def test_a_killed_rank_ends_the_other_which_names_it(settings, tmp_path, victim, codes):
    run = BareRanks(*overrides(settings, **FOREVER), log=tmp_path / "log")
    wait_until_it_trains(run)
    run.signal(signal.SIGKILL, victim)
    ends(run, codes)
    said = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f"rank {victim} (" in said[0] and f"process {run.processes[victim].pid}) died without a word" in said[0]


def test_a_failed_rank_ends_the_other_and_its_reason_comes_once_and_last(settings, tmp_path):
    """One undecodable image, and none may be bad: the rank that meets it fails while the other waits for its gradients."""
    from proxt2i.data.shards import write_samples

    image = Image.new("RGB", (32, 32), (220, 40, 40))
    samples = [{"key": f"{i:04d}", "image": image, "caption": "a red square"} for i in range(64)]
    shards = tmp_path / "shards"
    write_samples(shards, samples, shard_size=64)
    shard = next(shards.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    start_of_image = data.index(b"\x89PNG", len(data) // 2)
    data[start_of_image:start_of_image + 16] = bytes(16)
    shard.write_bytes(data)
    run = BareRanks(*overrides(settings, **FOREVER, data__shards=shards, data__cache_latents="false", data__workers=0, data__max_bad=0),
                    log=tmp_path / "log")
    ends(run, [1, 1])
    lines = run.output.splitlines()
    reasons = [line for line in lines if line.startswith("error: ")]
    assert len(reasons) == 1 and lines[-1] == reasons[0]
    assert " failed: RuntimeError: 1 bad samples skipped" in reasons[0] and "rank " in reasons[0]
    assert run.output.count("Traceback") == 1


def test_input_that_only_training_finds_wrong_is_said_once_with_status_2(settings, tmp_path):
    run = BareRanks("--resume", tmp_path / "nothing", *overrides(settings), log=tmp_path / "log")
    ends(run, [2, 2])
    assert run.output.count("no such folder") == 1 and "Traceback" not in run.output


def join_and_leave_slowly(rank, ranks, port, arguments, log):
    """A rank whose hub takes its time between telling one rank and the next."""
    become_rank(rank, ranks, port, log)
    from proxt2i.training import distributed, lifeline

    tell = lifeline._Hub._tell
    lifeline._Hub._tell = lambda hub, peer, line: (tell(hub, peer, line), time.sleep(0.3))
    distributed.start(1)
    distributed.stop()


def test_a_slow_goodbye_is_no_death(tmp_path):
    """Rank 0's process must not be gone before all others know that it may go."""
    run = BareRanks(program=join_and_leave_slowly, log=tmp_path / "log")
    assert run.wait(60) == [0, 0], run.output


def test_a_stop_before_the_training_steps(settings, tmp_path):
    """Every instant of a start-up is a good one to be stopped at."""
    run = BareRanks(*overrides(settings, train__images=64_000, sample__every=0), log=tmp_path / "log")
    time.sleep(2 * random.random())
    run.signal(signal.SIGTERM)
    codes = run.wait(60)
    assert set(codes) <= {-signal.SIGTERM, 128 + signal.SIGTERM}, run.output
    assert "Traceback" not in run.output and not (tmp_path / "run" / "model").exists()


def test_kills_and_stops_leave_no_trace_in_the_weights(settings, tmp_path):
    """Killed at random, while it starts and during a save; stopped by submitit's signal to one rank."""
    length = dict(train__images=1600, train__checkpoint_every=160, sample__every=0)
    broken, straight = tmp_path / "run", tmp_path / "straight"
    arguments = overrides(settings, **length)

    run = BareRanks(*arguments, log=tmp_path / "random")
    assert wait_for((broken / "checkpoints" / "latest").exists, run)
    time.sleep(random.random() * 0.5)
    run.signal(signal.SIGKILL)
    run.wait()
    assert not (broken / "model").exists(), run.output

    run = BareRanks("--resume", *arguments, log=tmp_path / "starting")
    time.sleep(random.random())
    run.signal(signal.SIGKILL)
    run.wait()

    run = BareRanks("--resume", *arguments, log=tmp_path / "saving")
    wait_for(lambda: list((broken / "checkpoints").glob("*.tmp")), run)
    run.signal(signal.SIGKILL)
    run.wait()

    run = BareRanks("--resume", *arguments, log=tmp_path / "stopped")
    wait_until_it_trains(run)
    run.signal(signal.SIGUSR2, 1)
    ends(run, [128 + signal.SIGUSR2] * 2)
    assert "all saved; continue with --resume" in run.output

    run = BareRanks("--resume", *arguments, log=tmp_path / "finished")
    assert run.wait() == [0, 0], run.output
    assert resumed_at(run.output) > 0
    unbroken = BareRanks(*overrides(settings, train__run_dir=straight, **length), log=tmp_path / "unbroken")
    assert unbroken.wait() == [0, 0] and "error" not in unbroken.output and "Traceback" not in unbroken.output
    assert_same_checkpoint(straight / "checkpoints" / "step-000001600", broken / "checkpoints" / "step-000001600")
    assert [row["images"] for row in rows(broken)] == [row["images"] for row in rows(straight)] == list(range(32, 1601, 32))
    assert not list((broken / "checkpoints").glob("*.tmp"))


def test_ctrl_c_twice_under_the_launcher_saves_and_resume_continues(settings, tmp_path):
    """With loader processes, which get the signals as well."""
    run = launch(*overrides(settings, **FOREVER, data__cache_latents="false", data__workers=1))
    folder = tmp_path / "run" / "checkpoints"
    stats = tmp_path / "run" / "stats.jsonl"
    assert wait_for(lambda: stats.exists() and stats.read_text(), run)
    pids = rank_pids(run)
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    output = run.communicate(timeout=60)[0]
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert "2 rank(s) on cpu, 1 CPU thread(s) each" in output or os.cpu_count() > 3
    assert "interrupted by signal" in output and "all saved" in output and "died without a word" not in output
    (checkpoint,) = folder.glob("step-*")
    images = int(checkpoint.name[5:])
    alone = BareRanks("--resume", *overrides(settings, **FOREVER | dict(train__images=images + 16), data__cache_latents="false"), ranks=1, log=tmp_path / "log")
    assert alone.wait() == [0] and resumed_at(alone.output) == images
