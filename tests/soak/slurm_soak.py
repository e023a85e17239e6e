"""The launchers under heavy fire, on the two-node test cluster: minutes, and therefore not part of `make test`.

    make soak [MOMENTS=10] [ARGS="-k moments"]

One run is preempted, requeued, out of time and killed at random moments, start-ups and saves included, and ends with the bits of an undisturbed
one. Then: a rank that hangs, a step that always fails, a lost node, reward workers beside the ranks, an accounting database.
"""

import os
import random
import shutil
import signal
import time

import psutil
import pytest
from runs import BareRanks, assert_same_checkpoint, overrides
from slurm_jobs import MISSING, Job, cluster, cluster_up, launched, requeue, run_all, signals, slurm  # noqa: F401: cluster is a fixture

import launchers.array
import launchers.grpo
import launchers.slurm
import launchers.status
from launchers.record import checkpoints, images_reached

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge")
MOMENTS = int(os.environ.get("MOMENTS", "10"))
SEED = int(os.environ.get("SEED", time.time_ns() % 10**6))
FOREVER = dict(train__images=10**8, train__log_every=80, train__checkpoint_every=800, train__threads=1, sample__every=0)


def kill_a_rank(job, number=signal.SIGKILL):
    os.kill(job.pid(1), number)


def time_limit(job):
    """It becomes so near that Slurm's warning is due; Slurm looks twice a minute, and the ranks go on until then."""
    ran, _ = launchers.slurm.seconds_run(launchers.slurm.job_facts(job.number))
    slurm("scontrol", "update", f"JobId={job.number}", f"TimeLimit={ran // 60 + 2}")


def test_random_moments(cluster, settings, tmp_path):  # noqa: F811
    rng = random.Random(SEED)
    images = 3000 * MOMENTS  # more than pass between two of them; until Slurm sees that the limit is near, 10,000 can
    length = FOREVER | dict(train__images=images)
    kinds = {"USR2": signals("USR2"), "TERM": signals("TERM"), "requeue": requeue, "time limit": time_limit, "kill -9": kill_a_rank}
    job = Job(tmp_path / "run", ["--nodes", 2, "--time", "60"], overrides(settings, **length))
    happened, began = [], time.monotonic()
    for start in range(MOMENTS):
        job.wait_for(lambda: job.log(start, 1).exists(), timeout=600)  # noqa: B023
        slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
        kind = rng.choice(list(kinds))
        if kind == "kill -9" or rng.random() < 0.6:
            job.wait_for(lambda: job.trains(start), timeout=300)  # noqa: B023
            time.sleep(rng.uniform(0, 2))
        else:
            time.sleep(rng.uniform(0, 6))
        kinds[kind](job)
        happened.append(kind)
        print(f"{time.monotonic() - began:.0f} s: {kind}, the last row of statistics at {images_reached(job.run_dir):,} images", flush=True)
    job.wait_for(lambda: job.log(MOMENTS, 1).exists(), timeout=600)
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    run_all([job], timeout=1800)
    print(f"{time.monotonic() - began:.0f} s: finished\n{job.status()}", flush=True)
    ends = [row["outcome"] for row in job.rows() if row["event"] == "end"]
    assert ends == ["failed" if kind == "kill -9" else "stopped" for kind in happened] + ["finished"], job.everything()
    straight = BareRanks(*overrides(settings, train__run_dir=tmp_path / "straight", **length), log=tmp_path / "log")
    assert straight.wait(1800) == [0, 0], straight.output
    name = f"step-{images:09d}"
    assert_same_checkpoint(tmp_path / "straight" / "checkpoints" / name, job.run_dir / "checkpoints" / name)


def test_the_time_limit_a_hung_rank_and_a_step_that_always_fails(cluster, settings, tmp_path):  # noqa: F811
    def queue(name, launcher, *events, **changes):
        run_dir = tmp_path / name
        return Job(run_dir, [*launcher, "--name", name], overrides(settings, train__run_dir=run_dir, **FOREVER | changes), events)

    limit = queue("limit", ["--time", "2", "--signal-before", 60])
    limit.wait_for(lambda: any(row["event"] == "requeued" for row in limit.rows()), timeout=200)
    first = next(row for row in limit.rows() if row["event"] == "end")
    assert (first["outcome"], first["reason"]) == ("stopped", "by SIGUSR2") and first["images"] > 0
    limit.wait_for(lambda: limit.trains(1), timeout=200)
    signals("INT")(limit)
    limit.wait_for(lambda: limit.rows()[-1].get("outcome") == "by hand", timeout=60)

    hung = queue("hung", ["--nodes", 2, "--time", "30", "--hang-minutes", 0.3, "--max-failures", 0], lambda job: kill_a_rank(job, signal.SIGSTOP))
    run_all([hung])
    said = hung.status()
    assert "given up" in said and "hung: nothing was written for 0.3 min; rank 1 does not answer" in said
    assert "torch/distributed" in hung.log(0, 0).read_text()  # the stack of the rank that waited

    # No sample of the fourth step can be read: every start gets as far as the third.
    failing = queue("failing", ["--time", "30"], data__shards=poisoned(tmp_path), data__cache_latents="false", data__workers=0, data__max_bad=0,
                    train__log_every=16, train__checkpoint_every=10**6)
    run_all([failing])
    assert [row["outcome"] for row in failing.rows() if row["event"] == "end"] == ["failed"] * 3
    assert "failed 3 times without getting further than" in failing.status() and "bad samples skipped" in failing.status()


def poisoned(tmp_path):
    """Shards of 256 squares, one of which is damaged."""
    from PIL import Image

    from proxt2i.data.shards import write_samples

    samples = [{"key": f"{i:04d}", "image": Image.new("RGB", (32, 32), (220, 40, 40)), "caption": "a red square"} for i in range(256)]
    write_samples(tmp_path / "poisoned", samples, shard_size=256)
    shard = next((tmp_path / "poisoned").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    at = data.index(b"\x89PNG", len(data) // 2)
    data[at:at + 16] = bytes(16)
    shard.write_bytes(data)
    return tmp_path / "poisoned"


def test_a_lost_node_is_named_and_the_run_goes_on_with_what_is_there(settings, tmp_path):
    """Its daemon, its step and its rank vanish at once, as when its power fails."""
    with cluster_up(tmp_path / "cluster", "SlurmdTimeout=15") as folder:
        run_dir = tmp_path / "run"
        arguments = overrides(settings, train__run_dir=run_dir, **FOREVER | dict(train__checkpoint_every=160))
        job = Job(run_dir, ["--nodes", "1-2", "--time", 60], arguments)
        job.wait_for(lambda: checkpoints(run_dir), timeout=300)
        rank = psutil.Process(job.pid(1))
        for process in (int((folder / "slurmd-node2.pid").read_text()), rank.parent().pid, rank.pid):
            os.kill(process, signal.SIGKILL)
        job.wait_for(lambda: job.trains(1), timeout=300)
        lost, again = [row for row in job.rows() if row["event"] in ("end", "start")][1:3]
        assert lost["outcome"] == "failed" and lost["reason"].startswith("node2 was lost (Slurm: node failure)") and "rank 1" in lost["reason"], job.everything()
        assert again["nodes"] == "node1" and again["images"] == lost["images"] > 0
        assert "node2 was lost" in job.status() and [row["by"] for row in job.rows() if row["event"] == "requeued"] == ["Slurm"]
        assert "resuming from" in job.log(1).read_text()
        signals("INT")(job)
        job.wait_for(lambda: job.rows()[-1].get("outcome") == "by hand", timeout=60)


@pytest.mark.skipif(not (shutil.which("slurmdbd", path=os.environ["PATH"] + ":/usr/sbin") and shutil.which("mariadb-install-db")),
                    reason="no slurmdbd or MariaDB here: apt-get install slurmdbd mariadb-server")
def test_the_accounting_database_knows_how_a_job_ended_that_slurm_has_forgotten(tmp_path, monkeypatch):
    ends = {"fine": ("true", [], "COMPLETED", "finished"), "limit": ("trap '' TERM; sleep 600", ["--time", 1, "--signal-before", 0], "TIMEOUT", "over: Slurm says TIMEOUT"),
            "cancelled": ("sleep 600", [], "CANCELLED", "over: Slurm says CANCELLED"), "killed": ("sleep 600", [], "FAILED", "over: Slurm says FAILED")}
    with cluster_up(tmp_path / "cluster", "accounting", "MinJobAge=2", "KillWait=2"):
        jobs = {}
        for name, (command, options, _, _) in ends.items():
            (tmp_path / "list").write_text("one\n")
            status, said, complaints = launched(launchers.array, "--list", tmp_path / "list", "--run", tmp_path / name, *options, "--", "bash", "-c", f"{command} # {{item}}")
            assert status == 0, complaints
            jobs[name] = said.split("queued as job ")[1].split()[0]
        wait_for(lambda: all((tmp_path / name / "items" / "000000.log").exists() for name in ends))
        slurm("scancel", jobs["cancelled"])
        supervisor(jobs["killed"]).kill()
        wait_for(lambda: not slurm("squeue", "-h", "-t", "all"), timeout=240)
        for name, (_, _, state, words) in ends.items():
            found = launchers.status.status(tmp_path / name)
            assert launchers.slurm.job_facts(jobs[name]) == {} and found["state"] == state, (name, found)
            assert words in launchers.status.show(found), launchers.status.show(found)
    monkeypatch.delenv("SLURM_CONF", raising=False)  # of a cluster that other tests use, which has jobs of the same numbers
    for name in ends:  # and without Slurm it says what it has noted itself
        assert launchers.status.status(tmp_path / name)["state"] == "UNKNOWN"
    assert "finished" in launchers.status.show(launchers.status.status(tmp_path / "fine"))
    assert "left no word of its end" in launchers.status.show(launchers.status.status(tmp_path / "killed"))


def test_reward_workers_of_a_heterogeneous_job_come_back_with_it(cluster, grpo, tmp_path):  # noqa: F811
    arguments = overrides(grpo, train__images=480, train__checkpoint_every=32,
                          rewards__train='[{name: http, url: "http://$REWARD_WORKER_1/jpeg_compressibility", token_file: $REWARD_TOKEN}]')
    job = Job(tmp_path / "run", ["--time", 30, "--reward-worker", "--reward jpeg_compressibility", "--reward-gpus", 1], arguments,
              [signals("USR2")], front_end=launchers.grpo)
    run_all([job], timeout=600)
    assert [row["outcome"] for row in job.rows() if row["event"] == "end"] == ["stopped", "finished"], job.everything()
    for start in range(2):
        assert "serving http://" in (job.run_dir / "launch" / f"{job.number}-{start}" / "reward-worker-1.log").read_text()


def supervisor(job):
    """The process in the job's batch step."""
    for process in psutil.process_iter(["cmdline"]):
        if "submitit.core._submit" in (process.info["cmdline"] or []) and process.environ().get("SLURM_JOB_ID") == job:
            return process
    raise AssertionError(f"job {job} has no supervisor")


def wait_for(happened, timeout=120):
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)
