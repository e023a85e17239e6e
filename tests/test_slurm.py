"""Jobs on a real Slurm cluster of two nodes, which tests/slurm/cluster.sh starts on this machine: preempted, killed, requeued, finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_shards import write_faulty_shards
from runs import ROOT, BareRanks, assert_same_checkpoint, overrides
from slurm_jobs import MISSING, Job, cluster, launched, requeue, run_all, run_out_of_time, signals, slurm  # noqa: F401: cluster is a fixture
from test_curation import files_of

import launchers.array
import launchers.curate
import launchers.grpo
import launchers.status
import launchers.train

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt-get install slurm-wlm munge")
LENGTH = dict(train__images=3200, train__log_every=80, train__checkpoint_every=800, train__threads=1, sample__every=0)


def kill_rank_1(job):
    """It must be known within 30 s, and who it was."""
    os.kill(job.pid(1), signal.SIGKILL)
    killed = time.monotonic()
    job.wait_for(lambda: any(row.get("outcome") == "failed" for row in job.rows()), timeout=30)
    job.noticed_after = time.monotonic() - killed
    job.status_after_the_kill = job.status()


@pytest.mark.timeout(1200)  # nine starts of a rank, most of whose time is imports
def test_every_preemption_and_a_killed_rank_leave_no_trace_in_the_weights(cluster, settings, tmp_path):
    def queue(name, nodes, *events):
        run_dir = tmp_path / name
        arguments = overrides(settings, train__run_dir=run_dir, **LENGTH)
        return Job(run_dir, ["--nodes", nodes, "--time", "30", "--name", name], arguments, events)

    jobs = [queue("two-nodes", 2, signals("USR2"), kill_rank_1), queue("one-node", 1, run_out_of_time, requeue)]
    straight = {ranks: BareRanks(*overrides(settings, train__run_dir=tmp_path / f"straight-{ranks}", **LENGTH), ranks=ranks, log=tmp_path / f"log-{ranks}")
                for ranks in (1, 2)}
    run_all(jobs, timeout=1000)
    for ranks, run in straight.items():
        assert run.wait() == [0] * ranks, run.output

    outcomes = {job.run_dir.name: [row["outcome"] for row in job.rows() if row["event"] == "end"] for job in jobs}
    assert outcomes == {"two-nodes": ["stopped", "failed", "finished"], "one-node": ["stopped", "stopped", "finished"]}
    by = {job.run_dir.name: [row["by"] for row in job.rows() if row["event"] == "requeued"] for job in jobs}
    assert by == {"two-nodes": ["launchers", "launchers"], "one-node": ["launchers", "Slurm"]}
    for job, ranks in zip(jobs, (2, 1)):
        starts = [row["images"] for row in job.rows() if row["event"] == "start"]
        assert starts[0] == 0 and sorted(starts) == starts and starts[1] > 0 and len(starts) == 3, job.everything()
        assert_same_checkpoint(tmp_path / f"straight-{ranks}" / "checkpoints" / "step-000003200", job.run_dir / "checkpoints" / "step-000003200", ranks)
        assert "train, finished" in job.status() and "3,200 images of 3,200 (100.0%)" in job.status()
    assert next(row["reason"] for row in jobs[1].rows() if row["event"] == "end") == "by SIGUSR2"  # Slurm's, before the time limit
    said = jobs[0].status_after_the_kill
    assert jobs[0].noticed_after < 30
    assert "failed: rank 1 ended first, by SIGKILL" in said and "died without a word" in said and "node[1-2]" in said


def test_an_array_names_its_poisoned_items(cluster, tmp_path):
    (tmp_path / "list").write_text("\n".join(f"item-{i}" for i in range(20)))
    command = ["bash", "-c", 'echo {item}; [ {index} != 7 ] && [ {index} != 16 ]']
    status, said, complaints = launched(launchers.array, "--jobs", 3, "--tries", 2, "--list", tmp_path / "list", "--run", tmp_path / "run", "--wait", "--", *command)
    assert status == 1 and "18 of 20 items done, 2 failed, 0 left" in said, said + complaints
    failed = json.loads((tmp_path / "run" / "summary.json").read_text())["failed"]
    assert [(item["index"], item["item"], item["tries"]) for item in failed] == [(7, "item-7", 2), (16, "item-16", 2)]
    assert Path(failed[0]["log"]).read_text() == "item-7\nitem-7\n"
    assert (tmp_path / "run" / "items" / "000003.log").read_text() == "item-3\n"


def test_a_curation_in_stages_names_a_bad_shard_and_goes_on_when_it_is_repaired(cluster, tmp_path):
    """Two jobs share the shards of each stage; the result has the bytes of one process's."""
    shards, out, run = tmp_path / "shards", tmp_path / "out", tmp_path / "run"
    write_faulty_shards(shards, 60, per_shard=15, short=64)
    settings = ["filter.min_short=64", "write.shard_size=20", "write.held_out=0.1", "run.workers=1"]

    def curate(out, *launcher):
        return launched(launchers.curate, *launcher, "--", shards, out, *settings)

    straight = subprocess.Popen([sys.executable, "-m", "proxt2i.curation", shards, tmp_path / "straight", *settings], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert straight.wait(timeout=300) == 0
    (shards / "00002.tar").rename(tmp_path / "good.tar")
    (shards / "00002.tar").symlink_to("/proc/self/mem")  # every read of it is an I/O error
    status, said, complaints = curate(out, "--jobs", 2, "--max-failures", 0, "--run", run, "--wait")
    assert status == 1 and "curate, failed in scan" in said and "failed: 00002 in scan: [Errno 5]" in said, said + complaints
    assert len(list((out / "work" / "scan").glob("*.npy"))) == 3 and not (out / "manifest.json").exists()
    (shards / "00002.tar").unlink()
    (tmp_path / "good.tar").rename(shards / "00002.tar")
    status, said, complaints = curate(out, "--jobs", 2, "--run", run, "--wait")
    assert status == 0 and "curate, finished" in said and "of 60 samples kept" in said and "4 of 4 shards" in said, said + complaints
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


def test_the_scripts_of_any_number_of_nodes_and_of_reward_workers(cluster, settings, tmp_path):
    def script(front_end, arguments, *options):
        status, said, complaints = launched(front_end, "--dry-run", "--no-check", *options, "--", *arguments)
        assert status == 0, complaints
        return said

    between = script(launchers.train, overrides(settings), "--nodes", "1-2", "--tasks-per-node", 2, "--cpus-per-task", 3)
    assert "--nodes=1-2\n" in between and "--cpus-per-task=6\n" in between and "ntasks" not in between
    beside = script(launchers.grpo, [f"train.run_dir={tmp_path / 'run'}"], "--reward-worker", "--reward hpsv2", "--reward-worker", "--reward pickscore", "--reward-gpus", 1, "--reward-partition", "one")
    ranks, *workers = beside.split("#SBATCH hetjob\n")
    assert "gpus" not in ranks and "--partition=tiny\n" in ranks and len(workers) == 2
    assert all("--partition=one\n" in worker and "--gpus-per-node=1\n" in worker and worker.startswith("#SBATCH") for worker in workers)
    assert "--reward-gpus 3: the nodes of partition tiny" in launched(launchers.grpo, "--no-check", "--reward-worker", "x", "--reward-gpus", 3, "--")[2]


@pytest.mark.skipif(not (shutil.which("modulecmd") and shutil.which("ch-run")), reason="no modulecmd or ch-run here: apt-get install environment-modules charliecloud")
def test_a_sites_modules_container_and_gpus_reach_the_command(cluster, tmp_path, monkeypatch):
    """The container is a real one, with a root folder of its own; nothing but what is named of this machine can be seen in it."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "weather").write_text('#%Module\nsetenv WEATHER sunny\n')
    monkeypatch.setenv("MODULEPATH", str(tmp_path / "modules"))
    image = tmp_path / "image"
    for name in ("dev", "etc", "proc", "sys", "tmp", "home", "root", "mnt", "usr", *(str(path).strip("/") for path in (ROOT, sys.prefix, sys.base_prefix, tmp_path))):
        (image / name).mkdir(parents=True, exist_ok=True)
    for name in ("passwd", "group", "hosts", "resolv.conf", "only-in-the-image"):
        (image / "etc" / name).touch()
    for name in ("bin", "lib", "lib64", "sbin"):
        (image / name).symlink_to(f"usr/{name}")
    binds = " ".join(f"--bind={path}:{path}" for path in dict.fromkeys(["/usr", str(ROOT), sys.prefix, sys.base_prefix, str(tmp_path)]))
    site = {"modules": ["weather"], "container": f"ch-run {binds} {image} --", "gpus_per_node": 1, "environment": {"USER": "nobody"}}
    (tmp_path / "site.yaml").write_text(json.dumps(site))

    def array(run, *options):
        return launched(launchers.array, "--site", tmp_path / "site.yaml", "--list", tmp_path / "list", "--run", tmp_path / run, "--wait", *options, "--", "bash", "-c",
                        'echo {item} $WEATHER, GPU $CUDA_VISIBLE_DEVICES; ls /etc')

    (tmp_path / "list").write_text("today\n")
    status, said, complaints = array("run")
    assert status == 0, said + complaints + launchers.status.show(launchers.status.status(tmp_path / "run"))
    assert (tmp_path / "run" / "items" / "000000.log").read_text().split("\n")[0] == "today sunny, GPU 0"
    assert "only-in-the-image" in (tmp_path / "run" / "items" / "000000.log").read_text() and not Path("/etc/only-in-the-image").exists()

    (tmp_path / "site.yaml").write_text(json.dumps(site | {"modules": ["wether"]}))
    status, said, _ = array("misspelt")
    assert status == 1 and "Unable to locate a modulefile for 'wether'" in said and "over: Slurm says FAILED" in said, said


def test_what_the_cluster_cannot_give_is_refused_with_what_it_has(cluster, settings, tmp_path):
    def refused(*launcher, **changes):
        status, said, complaints = launched(launchers.train, "--no-check", *launcher, "--", *overrides(settings, **changes))
        assert status == 2 and said == ""
        return complaints

    assert "no such partition. It has: tiny (2 nodes, 2 GPUs each), one (1 nodes" in refused("--partition", "nope")
    assert "--nodes 3: partition tiny has 2" in refused("--nodes", 3)
    assert "--nodes 2-1: give a number, or the fewest and the most" in refused("--nodes", "2-1")
    assert "which the nodes of partition away (far, ...) are not expected to see" in refused("--partition", "away")
    assert "--gpus-per-node 4: the nodes of partition tiny have 2" in refused("--gpus-per-node", 4)
    assert "--time 3:00:00: partition tiny allows 2:00:00" in refused("--time", "3:00:00")
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(train__run_dir=tmp_path / "file" / "run")
    (tmp_path / "run" / "checkpoints" / "step-000000064").mkdir(parents=True)
    assert "already holds checkpoints: add --resume" in refused()
    assert slurm("squeue", "-h") == ""
