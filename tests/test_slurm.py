"""Jobs on a real Slurm cluster of two nodes, which tests/slurm/cluster.sh starts on this machine: preempted, killed, requeued, finished."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from faulty_shards import write_faulty_shards
from runs import BareRanks, assert_same_checkpoint, overrides
from slurm_jobs import MISSING, Job, cluster, python, requeue, run_all, signals, slurm  # noqa: F401: cluster is a fixture
from test_curation import files_of

import launchers.curate

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge")
LENGTH = dict(train__images=2400, train__log_every=80, train__checkpoint_every=800, train__threads=1, sample__every=0)


def kill_rank_1(job):
    """It must be known within 30 s, and who it was."""
    os.kill(job.pid(1), signal.SIGKILL)
    killed = time.monotonic()
    job.wait_for(lambda: any(row.get("outcome") == "failed" for row in job.rows()), timeout=30)
    job.noticed_after = time.monotonic() - killed
    job.status_after_the_kill = job.status()


def test_every_preemption_and_a_killed_rank_leave_no_trace_in_the_weights(cluster, settings, tmp_path):
    def queue(name, nodes, *events):
        run_dir = tmp_path / name
        arguments = overrides(settings, train__run_dir=run_dir, **LENGTH)
        return Job(run_dir, ["--nodes", nodes, "--time", "30", "--name", name], arguments, events)

    jobs = [queue("two-nodes", 2, signals("USR2"), kill_rank_1), queue("one-node", 1, signals("TERM"), requeue)]
    straight = {ranks: BareRanks(*overrides(settings, train__run_dir=tmp_path / f"straight-{ranks}", **LENGTH), ranks=ranks, log=tmp_path / f"log-{ranks}")
                for ranks in (1, 2)}
    run_all(jobs)
    for ranks, run in straight.items():
        assert run.wait() == [0] * ranks, run.output

    outcomes = {job.run_dir.name: [row["outcome"] for row in job.rows() if row["event"] == "end"] for job in jobs}
    assert outcomes == {"two-nodes": ["stopped", "failed", "finished"], "one-node": ["stopped", "stopped", "finished"]}
    by = {job.run_dir.name: [row["by"] for row in job.rows() if row["event"] == "requeued"] for job in jobs}
    assert by == {"two-nodes": ["launchers", "launchers"], "one-node": ["launchers", "Slurm"]}
    for job, ranks in zip(jobs, (2, 1)):
        starts = [row["images"] for row in job.rows() if row["event"] == "start"]
        assert starts[0] == 0 and sorted(starts) == starts and starts[1] > 0 and len(starts) == 3, job.everything()
        assert_same_checkpoint(tmp_path / f"straight-{ranks}" / "checkpoints" / "step-000002400", job.run_dir / "checkpoints" / "step-000002400", ranks)
        assert "train, finished" in job.status() and "2,400 images of 2,400 (100.0%)" in job.status()
    said = jobs[0].status_after_the_kill
    assert jobs[0].noticed_after < 30
    assert "failed: rank 1 ended first, by SIGKILL" in said and "died without a word" in said and "node[1-2]" in said


def test_an_array_names_its_poisoned_items(cluster, tmp_path):
    (tmp_path / "list").write_text("\n".join(f"item-{i}" for i in range(20)))
    command = ["bash", "-c", 'echo {item}; [ {index} != 7 ] && [ {index} != 16 ]']
    done = python("launchers.array", "--jobs", 3, "--tries", 2, "--list", tmp_path / "list", "--run", tmp_path / "run", "--wait", "--", *command, check=False)
    assert done.returncode == 1 and "18 of 20 items done, 2 failed, 0 left" in done.stdout, done.stdout + done.stderr
    failed = json.loads((tmp_path / "run" / "summary.json").read_text())["failed"]
    assert [(item["index"], item["item"], item["tries"]) for item in failed] == [(7, "item-7", 2), (16, "item-16", 2)]
    assert Path(failed[0]["log"]).read_text() == "item-7\nitem-7\n"
    assert (tmp_path / "run" / "items" / "000003.log").read_text() == "item-3\n"


def test_a_curation_in_stages_names_a_bad_shard_and_goes_on_when_it_is_repaired(cluster, tmp_path):
    """Two jobs share the shards of each stage; the result has the bytes of one process's."""
    shards, out, run = tmp_path / "shards", tmp_path / "out", tmp_path / "run"
    write_faulty_shards(shards, 60, per_shard=15, short=64)
    settings = ["filter.min_short=64", "write.shard_size=20", "write.held_out=0.1", "run.workers=1"]

    def curate(out, *launcher, check=True):
        return python("launchers.curate", *launcher, "--", shards, out, *settings, check=check)

    curate(tmp_path / "straight", "--local")
    (shards / "00002.tar").rename(tmp_path / "good.tar")
    (shards / "00002.tar").symlink_to("/proc/self/mem")  # every read of it is an I/O error
    first = curate(out, "--jobs", 2, "--run", run, "--wait", check=False)
    assert first.returncode == 1 and "curate, failed in scan" in first.stdout and "failed: 00002 in scan: [Errno 5]" in first.stdout, first.stdout + first.stderr
    assert len(list((out / "work" / "scan").glob("*.npy"))) == 3 and not (out / "manifest.json").exists()
    (shards / "00002.tar").unlink()
    (tmp_path / "good.tar").rename(shards / "00002.tar")
    second = curate(out, "--jobs", 2, "--run", run, "--wait")
    assert "curate, finished" in second.stdout and "of 60 samples kept" in second.stdout and "4 of 4 shards" in second.stdout, second.stdout
    one, other = files_of(tmp_path / "straight"), files_of(out)
    assert [name for name in one if name.endswith(".tar")] and all(one[name] == other[name] for name in one if name.endswith(".tar"))
    assert json.loads(one["manifest.json"]) == json.loads(other["manifest.json"])


def test_a_curations_scripts_can_be_looked_at(cluster, tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    for number in range(5):
        (tmp_path / "shards" / f"{number}.tar").touch()
    options = ["--dry-run", "--jobs", "9", "--at-once", "2", "--gpus-per-node", "1", "--cpu-partition", "one", "--run", str(tmp_path / "run")]
    assert launchers.curate.main([*options, "--", str(tmp_path / "shards"), str(tmp_path / "out"), "aesthetic.reward=aesthetic"]) == 0
    scan, dedup, caption, write, merge = capsys.readouterr().out.split("# ---- ")[1:]
    assert "--array=0-4%2" in scan and "--gpus-per-node=1" in scan and "--partition=tiny" in scan and "dependency" not in scan
    assert "--array" not in dedup and "--dependency=afterok:JOB_OF_SCAN" in dedup and "--kill-on-invalid-dep=yes" in dedup and "--partition=one" in dedup
    assert "--array=0-4%2" in caption and "gpus" not in caption and "afterok:JOB_OF_CAPTION" in write and "afterok:JOB_OF_WRITE" in merge
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_what_the_cluster_cannot_give_is_refused_with_what_it_has(cluster, settings, tmp_path):
    def refused(*launcher, **changes):
        done = python("launchers.train", "--no-check", *launcher, "--", *overrides(settings, **changes), check=False)
        assert done.returncode == 2 and done.stdout == ""
        return done.stderr

    assert "no such partition. It has: tiny (2 nodes, 2 GPUs each), one (1 nodes" in refused("--partition", "nope")
    assert "--nodes 3: partition tiny has 2" in refused("--nodes", 3)
    assert "--gpus-per-node 4: the nodes of partition tiny have 2" in refused("--gpus-per-node", 4)
    assert "--time 3:00:00: partition tiny allows 2:00:00" in refused("--time", "3:00:00")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(train__run_dir=tmp_path / "file" / "run")
    (tmp_path / "run" / "checkpoints" / "step-000000064").mkdir(parents=True)
    assert "already holds checkpoints: add --resume" in refused()
    assert slurm("squeue", "-h") == ""
