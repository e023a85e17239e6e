"""The launchers without a cluster: what is refused, what an end of the ranks means, ranks from Slurm's environment, items, --local."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, overrides

import launchers.array
import launchers.curate
import launchers.evaluate
import launchers.latents
import launchers.status
import launchers.train
from launchers import items, job, progress, slurm, submit
from launchers.record import History, images_reached
from launchers.site import Site, load_site
from proxt2i.training.slurm import adopt_slurm_ranks

STEP = {"SLURM_STEP_ID": "1", "SLURM_JOB_ID": "4711", "SLURM_PROCID": "25", "SLURM_LOCALID": "1", "SLURM_NODEID": "3", "SLURM_STEP_NUM_TASKS": "28",
        "SLURM_STEP_TASKS_PER_NODE": "8(x3),4", "SLURM_STEP_NODELIST": "gpu[003-005,012]-ib,login1", "SLURM_NTASKS": "99"}  # fmt: skip


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_of_srun_get_torchs_names():
    environment = dict(STEP)
    adopt_slurm_ranks(environment)
    assert {key: environment[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "25", "LOCAL_RANK": "1", "WORLD_SIZE": "28", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu003-ib"}  # fmt: skip
    assert 15_000 <= int(environment["MASTER_PORT"]) < 30_000
    other = STEP | {"SLURM_STEP_ID": "2"}
    adopt_slurm_ranks(other)
    assert other["MASTER_PORT"] != environment["MASTER_PORT"]


@pytest.mark.parametrize("nodes, first", [("node7", "node7"), ("a1,a2", "a1"), ("n[1-2]", "n1"), ("r[1-2]n[03,05]", "r1n03"), ("x[9]-ib", "x9-ib")])
def test_the_first_node_is_where_the_ranks_meet(nodes, first):
    environment = STEP | {"SLURM_STEP_NODELIST": nodes}
    adopt_slurm_ranks(environment)
    assert environment["MASTER_ADDR"] == first


@pytest.mark.parametrize("changes", [{"RANK": "0"}, {"SLURM_STEP_ID": None}, {"SLURM_PROCID": None}])
def test_other_launchers_and_batch_scripts_are_left_alone(changes):
    environment = {key: value for key, value in (STEP | changes).items() if value is not None}
    before = dict(environment)
    adopt_slurm_ranks(environment)
    assert environment == before
    given = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    adopt_slurm_ranks(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "5")


# -- what an end means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, said, signals, outcome, reason", [
    (0, "", [], "finished", "status 0"),
    (140, "srun: error: n1: tasks 0-7: Exited with exit code 140\n", [], "stopped", "SIGUSR2"),
    (140, "srun: error: n2: task 1: User defined signal 2\nsrun: error: n1: task 0: Exited with exit code 140\n", [], "stopped", "SIGUSR2"),
    (137, "srun: error: n1: task 0: Exited with exit code 143\nsrun: error: n2: task 1: Killed\n", ["SIGTERM"], "stopped", "SIGTERM"),
    (137, "srun: error: n2: task 13: Killed\nsrun: error: n1: tasks 0-12: Exited with exit code 1\n", [], "failed", "rank 13 ended first, by SIGKILL"),
    (143, "srun: error: n2: task 3: Exited with exit code 1\nsrun: error: n1: task 0: Terminated\n", [], "failed", "rank 3 ended first, with exit status 1"),
    (139, "srun: error: n2: task 3: Segmentation fault (core dumped)\n", [], "failed", "rank 3 ended first, by SIGSEGV"),
    (2, "srun: error: n1: tasks 0-1: Exited with exit code 2\n", [], "input", "refused its input"),
    (130, "srun: error: n1: tasks 0-1: Exited with exit code 130\n", [], "by hand", "SIGINT"),
    (1, "srun: error: Unable to create step for job 3\n", [], "failed", "srun ended, with exit status 1"),
])  # fmt: skip
def test_what_the_end_of_the_ranks_means(status, said, signals, outcome, reason):
    end = job.judge(status, said, signals)
    assert end.outcome == outcome and reason in end.reason


def attempts(*ends):
    return [{"outcome": outcome, "images": images, "reason": f"because of {images}"} for outcome, images in ends]


def test_preemptions_are_endless_and_failures_are_not():
    assert job.refuses_another(attempts(*[("stopped", 0)] * 500), 0, True) is None
    assert job.refuses_another(attempts(*[("failed", 10 * i) for i in range(50)]), 50, True) is None
    assert "failed 51 times (--max-failures 50): because of 500" in job.refuses_another(attempts(*[("failed", 10 * i) for i in range(51)]), 50, True)
    assert "failed 1 times" in job.refuses_another(attempts(("failed", 7)), 0, True)


def test_a_step_that_always_fails_ends_the_job():
    twice, thrice = attempts(("failed", 640), ("stopped", 500), ("failed", 640)), attempts(("failed", 640), ("failed", 320), ("stopped", 500), ("failed", 640))
    assert job.refuses_another(twice, 50, True) is None
    assert "failed 3 times without getting further than 640 images" in job.refuses_another(thrice, 50, True)
    assert job.refuses_another(thrice, 50, counts_images=False) is None
    assert job.refuses_another(attempts(("failed", 640), ("failed", 640), ("failed", 960)), 50, True) is None  # further
    assert job.refuses_another([*thrice, *attempts(("stopped", 640))], 50, True) is None  # a preemption says nothing


def test_the_history_survives_torn_lines_and_tells_a_lost_node_from_a_preemption(tmp_path):
    history = History(tmp_path)
    history.add("start", job="9", restart=0, nodes="n[1-2]", logs="9-0", images=0)
    with open(history.path, "a") as file:
        file.write('{"event": "en\n')
    job._finish_the_last(history, tmp_path)
    history.add("start", job="9", restart=1, nodes="n[1-2]", logs="9-1", images=0)
    history.add("signal", signal="SIGTERM")
    job._finish_the_last(history, tmp_path)
    job._finish_the_last(history, tmp_path)
    lost, preempted = history.attempts("9")
    assert lost["outcome"] == "failed" and "a node failed (n[1-2])" in lost["reason"]
    assert preempted["outcome"] == "stopped" and "SIGTERM" in preempted["reason"]
    assert history.attempts("10") == [] and len(history.rows()) == 5


def test_images_reached_are_the_rows_or_the_checkpoint(tmp_path):
    assert images_reached(tmp_path) == 0
    (tmp_path / "stats.jsonl").write_text('{"images": 64}\n{"images": 96}\n{"ima')
    assert images_reached(tmp_path) == 96
    (tmp_path / "checkpoints" / "step-000000128").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000000256.tmp").mkdir()
    assert images_reached(tmp_path) == 128


def test_a_requeued_run_takes_its_own_newest_checkpoint(tmp_path):
    def command(*arguments):
        return job.rank_command({"command": ["python", "train.py", *arguments], "resumes": True, "run_dir": str(tmp_path), "site": {"container": "box run"}})

    first = command("a.b=1")
    assert first == ["box", "run", "python", "-m", "launchers.rank", "train.py", "a.b=1", "--resume"]
    assert command("--resume", "/old/step-000000010", "a.b=1")[6:] == ["--resume", "/old/step-000000010", "a.b=1"]
    inside = {"command": ["python", "train.py"], "resumes": False, "run_dir": str(tmp_path), "site": {"container": None, "container_python": "/opt/python"}}
    assert job.rank_command(inside)[0] == "/opt/python"  # srun's own options name the container, as with pyxis
    (tmp_path / "checkpoints" / "step-000000128").mkdir(parents=True)
    assert command("--resume", "/old/step-000000010", "a.b=1")[6:] == ["a.b=1", "--resume"]
    assert command("--resume", "a.b=1")[6:] == ["a.b=1", "--resume"]


def _unranked() -> dict[str, str]:
    """The environment without what other tests' ranks have put there."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}


def test_a_command_that_knows_nothing_of_slurm_gets_its_rank():
    code = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['LOCAL_WORLD_SIZE']); raise SystemExit(5)"
    done = subprocess.run([sys.executable, "-m", "launchers.rank", "-c", code], cwd=ROOT, env=_unranked() | STEP, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (5, "25 28 4\n"), done.stderr


def test_the_reason_is_what_rank_0_heard(tmp_path):
    (tmp_path / "rank-0.log").write_text("training\nerror: rank 1 (n2, process 7) died without a word (killed? out of memory?)\n")
    (tmp_path / "rank-1.log").write_text("training\n")
    assert job.what_ranks_said(tmp_path) == "rank 1 (n2, process 7) died without a word (killed? out of memory?)"
    (tmp_path / "rank-0.log").write_text("training\n")
    (tmp_path / "rank-1.log").write_text("Traceback ...\nModuleNotFoundError: No module named 'torch'\n")
    assert "No module named 'torch'" in job.what_ranks_said(tmp_path)


# -- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, minutes", [("30", 30), ("1:30:00", 90), ("90:30", 91), ("2-12", 3600), ("1-00:00:01", 1441), ("infinite", None)])
def test_slurms_times(text, minutes):
    assert slurm.minutes(text) == minutes


@pytest.mark.parametrize("text, words", [
    ("partitoin: gpu", "unknown key partitoin; did you mean partition?"), ("time: 24:00:00", "time must be a str"), ("modules: cuda", "modules must be a list"),
    ("setup: [\"a\\nb\"]", "single lines"), ("environment: {A-B: 1}", "'A-B' is no name"), ("- a", "key: value"), ("a: [", "--site"), ("gpus_per_node: true", "must be a int"),
])  # fmt: skip
def test_a_wrong_site_file_is_named(tmp_path, text, words):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ValueError, match="site.yaml") as caught:
        load_site(tmp_path / "site.yaml")
    assert words in str(caught.value)


def test_the_example_site_has_every_key():
    site = load_site(ROOT / "configs" / "site_example.yaml")
    text = (ROOT / "configs" / "site_example.yaml").read_text()
    assert all(f"\n{name}:" in text for name in Site.__dataclass_fields__) and site.gpus_per_node == 8


def test_any_number_of_nodes_between_two_is_used_as_far_as_the_batch_divides(settings):
    work = launchers.train.trainer("train")
    assert submit.read_nodes("4") == (4, 4) and submit.read_nodes("2-16") == (2, 16)
    assert submit.usable_counts(work, overrides(settings), 1, 4, 1) == [1, 2, 4]  # of a batch of 16
    with pytest.raises(ValueError, match="--nodes 3-4: 3 will not do: .* must be divisible by the number of ranks"):
        submit.usable_counts(work, overrides(settings), 3, 4, 1)
    assert submit.usable_counts(launchers.latents.WORK, [], 2, 4, 1) == [2, 3, 4]
    assert job.usable_nodes({"node_counts": [1, 2, 4]}, ["n1", "n2", "n7"]) == ["n1", "n2"]


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "mounts").write_text("a / ext4 rw 0 0\nb /shared nfs4 rw 0 0\nc /shared/my\\040disk xfs rw 0 0\nd /sharedtoo tmpfs rw 0 0\n")

    def disk(path):
        return submit.filesystem(Path(path), tmp_path / "mounts")

    assert disk("/home/me/run") == ("ext4", "/") and disk("/shared/runs/a") == ("nfs4", "/shared") and disk("/shared/my disk/run") == ("xfs", "/shared/my disk")


def test_starts_that_bring_nothing_are_noted():
    ends = [{"outcome": "stopped", "from": 96, "images": images} for images in (96, 97, 96, 96)]
    assert launchers.status._idle_starts(ends) == 2 and launchers.status._idle_starts([*ends, {"from": 96}]) == 2
    assert launchers.status._idle_starts([{"outcome": "failed", "from": 0, "images": 0}]) == 0


def test_everything_wrong_is_said_before_anything_is_queued(settings, tmp_path, monkeypatch, capsys):
    def refused(launcher, *arguments):
        assert launcher.main(list(map(str, arguments))) == 2
        said = capsys.readouterr()
        assert said.out == "" and not (tmp_path / "run").exists()
        return said.err

    assert "`--` is missing" in refused(launchers.train, "--nodes", 2, "train.images=5")
    assert "unknown option --node" in refused(launchers.train, "--node", 2, "--")
    assert "--local runs on this machine alone" in refused(launchers.train, "--local", "--nodes", 2, "--")
    assert "at least 1" in refused(launchers.train, "--local", "--tasks-per-node", 0, "--")
    wrong = refused(launchers.train, "--local", "--tasks-per-node", 3, "--", *overrides(settings))
    assert "train.py refuses its arguments, so nothing was queued" in wrong and "must be divisible by the number of ranks (3)" in wrong
    assert "unknown key train.image" in refused(launchers.train, "--local", "--", "train.image=5")
    assert "names neither {item} nor {index}" in refused(launchers.array, "--local", "--list", __file__, "--", "true")
    assert "one of them" in refused(launchers.array, "--local", "--", "true", "{item}")
    assert "holds none" in refused(launchers.array, "--local", "--items", tmp_path / "*.tar", "--", "true", "{item}")
    with pytest.raises(SystemExit):
        launchers.evaluate.main(["--local", "--", "--steps", "many"])
    assert "give int values" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch on PATH" in refused(launchers.latents, "--", "shards", "out") and "--local" in refused(launchers.latents, "--", "shards", "out")


def test_a_wrong_curation_is_refused_before_anything_is_queued(tmp_path, monkeypatch, capsys):
    shards, out = tmp_path / "shards", tmp_path / "out"
    shards.mkdir()

    def refused(*arguments):
        assert launchers.curate.main(["--run", str(tmp_path / "run"), *map(str, arguments)]) == 2
        assert not (tmp_path / "run").exists() and not out.exists()
        return capsys.readouterr().err

    assert "neither .tar shards nor" in refused("--", shards, out)
    (shards / "00000.tar").touch()
    assert "are the launcher's to give" in refused("--", shards, out, "--stage", "scan")
    assert "did you mean filter.min_short?" in refused("--", shards, out, "filter.min_shrt=3")
    assert "hf download Qwen/Qwen2.5-VL-7B-Instruct" in refused("--", shards, out, "caption.model=/no/such")
    assert "is not empty and holds no curation" in refused("--", shards, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch on PATH" in refused("--", shards, out)
    assert "at least 1" in refused("--jobs", "0", "--", shards, out)


# -- how far data jobs are --


def test_progress_is_counted_in_finished_files(tmp_path, monkeypatch):
    def finished(path, at, **values):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
        os.utime(path, (1000 + at, 1000 + at))

    for number in range(3):
        finished(tmp_path / "work" / "scan" / f"{number:05d}.json", 10 * number, samples=100)
    (tmp_path / "work" / "scan" / "00003.json").write_text("{")
    found = progress.curation(tmp_path, 5, 20)
    assert found["scan"] == {"done": 3, "total": 5, "images": 300, "images_per_s": 10.0, "seconds_left": 20.0}
    assert found["write"]["total"] is None and found["caption"]["done"] == 0 and not found["merge"]["done"]
    for number in range(5):
        finished(tmp_path / "work" / "caption" / f"{number:05d}.json", number, splits={"train": 9, "held_out": 1})
    assert progress.curation(tmp_path, 5, 20)["write"]["total"] == 3 + 1
    finished(tmp_path / "latents" / "about.json", 0, source={"shards": 4, "samples": 400})
    finished(tmp_path / "latents" / "00002.json", 0, counts=[60, 39])
    assert progress.latents(tmp_path / "latents") == {"done": 1, "total": 4, "images": 99, "images_per_s": None, "seconds_left": None}

    run = tmp_path / "run"
    (run / "launch").mkdir(parents=True)
    parts = {"kind": "latents", "run_dir": str(run), "code": {"commit": None, "dirty": None}, "nodes": 1, "tasks_per_node": 2, "resumes": False}
    (run / "launch" / "job.json").write_text(json.dumps({**parts, "output": str(tmp_path / "latents")}))
    assert "1 of 4 shards, 99 images" in launchers.status.show(launchers.status.status(run))
    (tmp_path / "work" / "failed").mkdir()
    finished(tmp_path / "work" / "failed" / "scan-00004.json", 0, stage="scan", shard="00004", reason="[Errno 5] Input/output error")
    (run / "launch" / "job.json").write_text(json.dumps({"kind": "curate", "stages": ["scan"], "data": "in", "out": str(tmp_path), "shards": 5, "shard_size": 20}))
    (run / "scan" / "launch").mkdir(parents=True)
    (run / "scan" / "launch" / "job.json").write_text(json.dumps({**parts, "kind": "curate", "workers": 2, "run_dir": str(run / "scan")}))
    for worker, outcome in enumerate(("finished", "input")):
        history = History(run / "scan" / "launch", worker)
        history.add("submitted", job=f"7_{worker}")
        history.add("start", job=f"{8 + worker}", restart=0, nodes="n1", logs=f"{8 + worker}-0", images=0)
        history.add("end", outcome=outcome, reason="because", images=0)
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm to ask
    said = launchers.status.show(launchers.status.status(run))
    assert "curate, failed in scan" in said and "3 of 5 shards, 300 images, 10 images/s, 20 s left" in said and "failed: 00004 in scan: [Errno 5]" in said, said


# -- here, without Slurm ----------------------------------------------------------------------------------------------


def test_local_runs_the_same_command_and_its_status_comes_back(capfd):
    assert launchers.evaluate.main(["--local", "--no-check", "--", "--help"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("+ ") and said.splitlines()[0].endswith("-m proxt2i.evaluate --help") and "--num-prompts" in said
    assert launchers.evaluate.main(["--local", "--no-check", "--", "--steps", "many"]) == 2


def array_of(tmp_path, command, count=4, tries=2):
    (tmp_path / "launch").mkdir()
    job = {"kind": "array", "items": {"items": [f"i{n}" for n in range(count)], "command": command, "tries": tries, "workers": 1}}
    (tmp_path / "launch" / "job.json").write_text(json.dumps(job))
    return tmp_path


def test_a_local_array_is_summed_up(tmp_path, capfd):
    (tmp_path / "list").write_text("a\nb\n")
    assert launchers.array.main(["--local", "--tries", "2", "--list", str(tmp_path / "list"), "--run", str(tmp_path / "run"), "--", "bash", "-c", "[ {item} = a ]"]) == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (found["done"], found["left"], [failure["item"] for failure in found["failed"]]) == (1, 0, ["b"])
    assert "failed: item 1 (b) after 2 tries: exit status 1" in launchers.status.show(launchers.status.status(tmp_path / "run"))


def test_a_stopped_worker_takes_up_its_item_again_and_an_item_that_kills_its_worker_is_given_up(tmp_path):
    run = array_of(tmp_path, ["bash", "-c", f"echo {{item}} >> {tmp_path}/trace; [ -e {tmp_path}/go ] || sleep 60; [ {{index}} = 2 ] && kill -9 $PPID; true"], tries=2)

    def worker():
        return subprocess.Popen([sys.executable, "-m", "launchers.items", str(run), "--worker", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                env=os.environ | {"PYTHONPATH": str(ROOT)})

    first = worker()
    while not (tmp_path / "trace").exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR2)
    assert first.communicate(timeout=30)[0].endswith("stopped by SIGUSR2\n") and first.returncode == 128 + signal.SIGUSR2
    assert json.loads((run / "items" / "000000.json").read_text()) == {"item": "i0", "outcome": "stopped", "tries": 0}
    (tmp_path / "go").touch()
    statuses = []
    for _ in range(3):
        process = worker()
        process.communicate(timeout=30)
        statuses.append(process.returncode)
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert (tmp_path / "trace").read_text().split() == ["i0", "i0", "i1", "i2", "i2", "i3"]
    found = items.summary(run / "launch")
    assert found["done"] == 3 and [(f["index"], f["tries"], f["reason"]) for f in found["failed"]] == [(2, 2, "it took its worker with it")]
