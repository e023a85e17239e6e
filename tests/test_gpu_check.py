"""`make gpu-check` without a GPU: its dry run from end to end, what it does when checks fail, crash or hang, and its messages."""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from proxt2i.ops import native_available

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import attention as attention_benchmark  # noqa: E402
import gpu_check  # noqa: E402
import gpu_machine  # noqa: E402
import gpu_report  # noqa: E402
import gpu_stages  # noqa: E402
import timing  # noqa: E402

if not native_available():
    pytest.skip("proxt2i._C is not built", allow_module_level=True)

H100 = {"torch": "2.13.0+cu130", "torch_cuda": "13.0", "devices": 1, "device": "NVIDIA H100 80GB HBM3", "capability": [9, 0],
        "nvcc": [13, 0], "cmake": [3, 31], "pybind11": True, "setuptools": True, "compiler": "c++",
        "tools": {"nvcc": "/kit/bin/nvcc", "cmake": "/bin/cmake", "ninja": "/bin/ninja", "compute-sanitizer": None}}


# ---- the whole -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Every stage but those of networks, which take too long here, the table asked for."""
    folder = tmp_path_factory.mktemp("dry")
    stages = [stage for stage in gpu_check.STAGES if stage not in ("large_sample", "large_model", "grpo", "trainer")]
    script = ROOT / "benchmarks" / "gpu_check.py"
    done = subprocess.run([sys.executable, script, "--dry-run", "--write-table", "--out", folder, "--stages", *stages], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    path, = folder.glob("*.json")
    return done, json.loads(path.read_text()), path


def test_a_dry_run_goes_through_every_stage(dry_run):
    done, result, path = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["finished"] and result["dry_run"] and "DRY RUN" in done.stdout and "dry_run" in path.name
    assert list(result["stages"]) == ["machine", *gpu_check.STAGES]
    statuses = {stage: record["status"] for stage, record in result["stages"].items()}
    assert statuses == dict.fromkeys(statuses, "PASS") | {"sanitizer": "SKIPPED", "large_sample": "SKIPPED", "large_model": "SKIPPED", "grpo": "SKIPPED", "trainer": "SKIPPED"}
    checks = {f"{stage}/{check['name']}": check for stage, record in result["stages"].items() for check in record["checks"]}
    assert checks["checks/prox_step"]["status"] == checks["checks/matching"]["status"] == "PASS"
    assert all(check["reason"] for check in checks.values() if check["status"] != "PASS")
    assert checks["prox_step/copy bandwidth"]["figures"]["copy_gb_per_s"] > 0
    assert checks["attention/N=9 D=8"]["figures"]["details"]["qk-norm"]["speedup"]["both"]["sdpa"] > 0
    assert checks["pytest/tests/test_ops*.py"]["figures"]["tests"] > 0
    assert "never writes the table" in checks["attention/table"]["reason"]
    assert str(ROOT) not in path.read_text()


def test_dry_runs_are_never_results(capsys):
    for folder in (gpu_check.RESULTS, gpu_check.RESULTS / "deeper"):
        with pytest.raises(SystemExit):
            gpu_check.parse_arguments(["--dry-run", "--out", str(folder)])
    assert "a dry run is no result" in capsys.readouterr().err
    assert gpu_check.parse_arguments(["--device", "cpu"]).out == ROOT / "benchmarks" / "out"
    assert gpu_check.parse_arguments([]).out == gpu_check.RESULTS


# ---- when things go wrong --------------------------------------------------------------------------------------------------

STAGE_THAT_FAILS = """if True:
    import os, signal, sys, time
    sys.path.insert(0, {benchmarks!r})
    import gpu_report
    from pathlib import Path
    report = gpu_report.Report(Path(sys.argv[1]))
    def wrong(): raise AssertionError("2 of 8 elements differ")
    def lose_the_device():
        gpu_report.device_is_lost = lambda: True
        raise RuntimeError("an illegal memory access")
    report.run("first", lambda: {{"figure": 1.5}})
    report.run("wrong", wrong)
    report.run("lost", lose_the_device)
    report.run("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    report.run("hang", lambda: time.sleep(60))
    report.run("below", lambda: {{"figure": 0.5, "failure": "below the target"}})
    report.run("last", lambda: None)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    return gpu_check.Run(tmp_path / "result.json", dict(H100), "cuda")


def stage(run, code, limit=60.0, check_limit=30.0):
    command = [sys.executable, "-c", code.format(benchmarks=str(ROOT / "benchmarks"))]
    gpu_check.run_stage(run, "checks", command, dict(os.environ), limit, check_limit)
    return {check["name"]: check for check in json.loads(run.path.read_text())["stages"]["checks"]["checks"]}


def test_checks_that_fail_crash_or_hang_do_not_stop_the_next_ones(run):
    checks = stage(run, STAGE_THAT_FAILS, check_limit=3)
    assert {name: check["status"] for name, check in checks.items()} == {
        "first": "PASS", "wrong": "FAIL", "lost": "FAIL", "crash": "FAIL", "hang": "FAIL", "below": "FAIL", "last": "PASS"}
    assert list(checks) == ["first", "wrong", "lost", "crash", "hang", "below", "last"]
    assert "2 of 8 elements differ" in checks["wrong"]["reason"] and "SIGSEGV" in checks["crash"]["reason"]
    assert "time limit of 3 s" in checks["hang"]["reason"] and checks["first"]["figures"] == {"figure": 1.5}
    assert checks["below"] | {"seconds": 0} == gpu_report.entry("below", "FAIL", "below the target", 0, {"figure": 0.5})
    assert run.failed() and "FAIL     checks / wrong: AssertionError" in gpu_report.summary(run.result)


def test_a_stage_that_does_not_start_or_takes_too_long_fails(run):
    assert "ModuleNotFoundError" in stage(run, "import nothing_of_that_name")["process"]["reason"]
    checks = stage(run, STAGE_THAT_FAILS, limit=5)
    assert checks["first"]["status"] == "PASS" and "the stage's time limit" in list(checks.values())[-1]["reason"]


def fake_machine(monkeypatch, tmp_path, stage_code):
    """gpu_check on what claims to be a machine with a GPU; `stage_code` is what its stages' processes run."""
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_machine, "gather", lambda: dict(H100))
    monkeypatch.setattr(gpu_check, "stage_command", lambda given, facts, stage: [
        sys.executable, "-c", stage_code.format(benchmarks=str(ROOT / "benchmarks"), stage=stage)])


ONE_CHECK = """if True:
    import sys, time
    sys.path.insert(0, {benchmarks!r})
    from pathlib import Path
    from gpu_report import Report
    Report(Path(sys.argv[1])).run("check", lambda: {check})
"""


def test_a_failing_check_is_the_exit_status_and_later_stages_still_run(monkeypatch, tmp_path, capsys):
    fake_machine(monkeypatch, tmp_path, ONE_CHECK.replace("{check}", "{{'a': 1}} if {stage!r} != 'checks' else 1 / 0"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    path, = tmp_path.glob("*.json")
    stages = json.loads(path.read_text())["stages"]
    assert path.name.startswith("gpu_check-NVIDIA_H100_80GB_HBM3-")
    expected = dict.fromkeys(["machine", *gpu_check.STAGES], "PASS") | {"checks": "FAIL"}
    assert {name: record["status"] for name, record in stages.items()} == expected
    assert "FAIL     checks / check: ZeroDivisionError" in capsys.readouterr().out
    assert gpu_check.main(["--out", str(tmp_path), "--stages", "ops"]) == 0  # a second result of the day, beside the first
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_without_an_extension_only_the_rest_is_skipped(monkeypatch, tmp_path):
    fake_machine(monkeypatch, tmp_path, ONE_CHECK.replace("{check}", "{{'a': 1}} if {stage!r} != 'build' else 1 / 0"))
    assert gpu_check.main(["--out", str(tmp_path), "--stages", "build", "checks"]) == 1
    stages = json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]
    assert stages["checks"]["status"] == "SKIPPED" and "the build failed" in stages["checks"]["reason"]


def test_what_was_found_survives_an_interrupt(tmp_path):
    """SIGTERM in the second stage: the result has the first one, says that it is not finished, and no process is left."""
    code = ONE_CHECK.replace("{check}", "time.sleep(60) if {stage!r} == 'checks' else None")
    script = "\n".join([
        "import sys; sys.path[:0] = sys.argv[1:3]", "import test_gpu_check as t, pytest, pathlib",
        f"t.fake_machine(pytest.MonkeyPatch(), pathlib.Path(sys.argv[3]), {code!r})", "sys.exit(t.gpu_check.main(['--out', sys.argv[3]]))"])
    process = subprocess.Popen([sys.executable, "-c", script, str(ROOT), str(ROOT / "tests"), str(tmp_path)], stdout=subprocess.PIPE,
                               text=True)
    report = tmp_path / "work" / "checks.json"
    deadline = time.monotonic() + 60
    while not gpu_report.read_json(report).get("current") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    result = json.loads(next(tmp_path.glob("gpu_check*.json")).read_text())
    assert process.returncode == 130 and not result["finished"] and "NOT FINISHED" in out
    assert result["stages"]["build"]["status"] == "PASS" and "interrupted" in result["stages"]["checks"]["checks"][0]["reason"]
    assert "attention" not in result["stages"]


# ---- the machine -----------------------------------------------------------------------------------------------------------

def test_everything_that_is_missing_is_named_with_its_fix():
    assert gpu_machine.problems(H100, "cuda") == [] and gpu_machine.mismatch(H100) is None
    cases = [
        (dict(torch=None, torch_problem="No module"), "has no torch"), (dict(torch="2.6.0+cu124"), "2.11 or newer"),
        (dict(torch_cuda=None), "is a CPU build"), (dict(devices=0), "sees no CUDA device"),
        (dict(capability=[7, 5]), "compute capability 7.5"),
        (dict(nvcc=None), "install the CUDA toolkit 13.x and put nvcc on PATH"), (dict(cmake=None), "cmake is missing: pip install"),
        (dict(cmake=[3, 18]), "cmake 3.18: pip install 'cmake>=3.24'"), (dict(tools=H100["tools"] | {"ninja": None}), "pip install ninja"),
        (dict(pybind11=False), "pip install pybind11"), (dict(compiler=None), "g++"),
    ]
    for change, message in cases:
        found = gpu_machine.problems(H100 | change, "cuda")
        assert len(found) == 1 and message in found[0], (change, found)
    assert len(gpu_machine.problems(H100 | dict(nvcc=None, pybind11=False), "cuda")) == 2
    assert "CUDA toolkit 13.x" in gpu_machine.mismatch(H100 | dict(nvcc=[12, 8]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_before_any_work(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "gpu-check cannot run on this machine" in said and "sees no CUDA device" in said
    assert not list(tmp_path.iterdir())


def test_the_build_is_for_this_gpu_alone():
    assert [gpu_machine.architecture(c) for c in ([9, 0], [8, 0], [10, 0])] == ["90a-real", "80-real", "100-real"]
    assert gpu_stages.build_environment("80-real")["PROXT2I_CUDA"] == "ON"
    command = gpu_check.stage_command(argparse.Namespace(device="cuda", write_table=True), H100, "build")
    assert Path(command[1]).name == "gpu_stages.py"
    assert command[2:] == ["--device", "cuda", "--architecture=90a-real", "--write-table", "build"]


# ---- what a GPU alone would run --------------------------------------------------------------------------------------------

class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {key: "cpu" if value == "cuda" else value for key, value in (kwargs or {}).items()}
        return function(*("cpu" if isinstance(a, str) and a == "cuda" else a for a in args), **kwargs)


@pytest.fixture
def pretended_cuda(monkeypatch):
    """torch.cuda's events, streams and graphs as far as benchmarks/timing.py uses them, a graph doing its work while captured."""
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    for name, value in dict(Event=Event, Stream=stream, CUDAGraph=type("Graph", (), {"replay": lambda self: time.sleep(0.004)}),
                            graph=lambda graph: contextlib.nullcontext(), stream=lambda s: contextlib.nullcontext(), current_stream=stream,
                            synchronize=lambda: None, mem_get_info=lambda: (1 << 24, 1 << 24)).items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    with OnCpu():
        yield


def test_times_on_a_gpu(pretended_cuda):
    seconds = timing.medians({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, "cuda", repeats=3)
    assert 0.001 <= seconds["short"] < 0.008 < seconds["long"]
    calls = []
    alone = timing.graph_medians({"one": [lambda: calls.append(1), lambda: calls.append(2)]}, "cuda", repeats=3)
    assert calls == [1, 2] * 5 and 0.004 / 8 <= alone["one"] < 0.002  # warmed up once, captured four times; a replay is eight calls
    assert timing.copy_bandwidth("cuda", 1 << 12) > 0


def test_the_attention_benchmark_on_a_gpu(pretended_cuda, monkeypatch):
    """With plain torch in the place of the native kernels: backends that refuse are named, and the choice is made on the rest."""
    real = attention_benchmark.attention
    monkeypatch.setattr(attention_benchmark, "attention", lambda qkv, impl, **more: real(qkv, impl="ref", **more))
    result = attention_benchmark.measure(20, 64, "cuda", repeats=1, heads=2)
    for norm in ("plain", "qk-norm"):
        assert {"native", "flash", "flash, separate"} <= set(result[norm]["ms"]["both"]) and result[norm]["best"]["both"] == "flash"
        assert result[norm]["refused"]["cudnn"] and result[norm]["error"] < attention_benchmark.MAX_ERROR
        assert result[norm]["tflops"]["both"]["native"] > 0
    assert result["choice"] in ("native", "sdpa") and attention_benchmark.describe(result).endswith(f"-> {result['choice']}")


def test_native_is_chosen_only_where_it_is_right_and_faster_both_ways():
    def made(speedups, errors):
        return {norm: {"error": e, "ms": {"both": {"native": 1 / s, "sdpa": 1.0}}} for norm, e, s in zip(("plain", "qk-norm"), errors, speedups)}

    cases = [((1.2, 1.1), (1e-3, 1e-3), "native"), ((1.2, 0.9), (1e-3, 1e-3), "sdpa"), ((0.9, 1.2), (1e-3, 1e-3), "sdpa"),
             ((1.2, 1.1), (1e-3, 0.5), "sdpa"), ((1.2, 1.1), (float("nan"), 1e-3), "sdpa")]
    for speedups, errors, expected in cases:
        assert attention_benchmark.choice(made(speedups, errors)) == expected


def test_the_table_keeps_what_was_not_measured(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    old = {"Other": {"72": {"463": "native"}}, "Card": {"72": {"463": "sdpa", "256": "native"}, "64": {"463": "sdpa"}}}
    path.write_text(json.dumps(old))
    attention_benchmark.merge_table(path, "Card", [dict(dim=72, tokens=463, choice="native"), dict(dim=128, tokens=1231, choice="sdpa")])
    expected = {"Other": {"72": {"463": "native"}},
                "Card": {"72": {"463": "native", "256": "native"}, "64": {"463": "sdpa"}, "128": {"1231": "sdpa"}}}
    assert json.loads(path.read_text()) == expected
    module = importlib.import_module("proxt2i.ops.attention")  # and `attention` reads it so
    monkeypatch.setattr(module, "TABLE", path)
    monkeypatch.setattr(module, "why_not_native", lambda qkv: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    module._table.cache_clear()
    fake = type("", (), {"device": torch.device("cuda"), "shape": (1, 450, 3, 16, 72), "dtype": torch.bfloat16})()
    try:
        assert module.preferred(fake) == "native"
    finally:
        module._table.cache_clear()
