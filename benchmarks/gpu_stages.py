"""The stages of `make gpu-check`, each in a process of its own: gpu_stages.py STAGE REPORT.json [--device cuda] (gpu_check.py starts it).

A stage is a list of checks (gpu_report.Report.run). On the CPU, in a dry run, sizes are tiny and the CPU's operators stand in.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

from gpu_machine import find_tool
from gpu_report import Report, Skip, read_json

ROOT = Path(__file__).resolve().parents[1]
COPY_TARGET = 0.85  # of the copy bandwidth, which the fused step is to reach where the device's memory is what limits it
LARGE_SECONDS = 240  # for both, compilation included
PYTEST_SECONDS, SANITIZER_SECONDS, GRPO_SECONDS = 85, 75, 100
GRPO_TARGET = 1.5  # images/s against a plain loop
MFU_TARGET = 0.45  # of the dense bf16 peak, for U-ViT-H at 256 x 256
OP_TESTS = [f"tests/test_ops{suffix}.py" for suffix in ("", "_attention", "_matching", "_transition")]


class TookTooLong(Exception):
    """A command was ended by its time limit; `text` is what it had printed."""

    def __init__(self, message: str, text: str):
        super().__init__(message)
        self.text = text


def run_command(command: list, timeout: float, env: dict | None = None) -> str:
    """Runs it from the repository's root and returns its output, which the log has too. RuntimeError with the last lines if it fails."""
    print("+", *command, flush=True)
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # not a pipe, which a grandchild could hold open after the time limit
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=os.environ | (env or {}), stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    if status is None:
        raise TookTooLong(f"{Path(command[0]).name} was ended after {timeout:.0f} s: " + " | ".join(text.strip().splitlines()[-4:]), text)
    if status != 0:
        last = [line for line in text.strip().splitlines() if line.strip()][-6:]
        raise RuntimeError(f"{Path(command[0]).name} ended with {status}: " + " | ".join(last))
    return text


# ---- build -----------------------------------------------------------------------------------------------------------------

def build_environment(architecture: str) -> dict[str, str]:
    """For setup.py: this GPU's own architecture alone, object files apart from those of other builds."""
    return {"PROXT2I_CUDA": "ON", "PROXT2I_CUDA_ARCHITECTURES": architecture,
            "PROXT2I_BUILD_DIR": str(ROOT / "build" / f"gpu-check-{sys.implementation.cache_tag}-{architecture}")}


def stage_build(report, options):
    def compile_and_link():
        if options.device == "cpu":
            raise Skip("a dry run keeps the extension that is there")
        run_command([sys.executable, "setup.py", "build_ext", "--inplace"], 600, build_environment(options.architecture))
        return {"architecture": options.architecture}

    def load():
        import torch  # noqa: F401  (the extension finds its libraries loaded)

        from proxt2i import _C

        info = _C.build_info()
        if options.device != "cpu" and not info["cuda"]:
            raise RuntimeError(f"the extension that Python finds has no CUDA kernels: {info}")
        return {"compiler": info["compiler"], "cuda_archs": info["cuda_archs"]}

    report.run("extension", compile_and_link)
    report.run("loads", load)


# ---- checks ----------------------------------------------------------------------------------------------------------------

def stage_checks(report, options):
    sys.path.insert(0, str(ROOT / "tests"))
    from device_checks import CHECKS, CPU, NotHere, Target

    target = Target(CPU, options.device, small=options.device == "cpu")

    def run(check):
        try:
            check(target)
        except NotHere as reason:
            raise Skip(str(reason)) from None

    for name, check in CHECKS.items():
        report.run(name, run, check)


def stage_pytest(report, options):
    def run():
        missing = [name for name in ("pytest", "numpy", "scipy") if find_spec(name) is None]
        if missing:
            raise Skip(f"not installed: {', '.join(missing)}; the stage `checks` has covered every operator without them")
        chosen, files = "cuda or native_error", OP_TESTS
        if options.device == "cpu":
            chosen, files = "cpu and test_odd_sizes and shape0", OP_TESTS[-1:]
        with tempfile.TemporaryDirectory() as folder:
            xml = Path(folder) / "report.xml"
            try:
                options_of_pytest = ["-q", "-p", "no:cacheprovider", "--noconftest", f"--junitxml={xml}", "-k", chosen]  # conftest.py needs DeepSpeed
                run_command([sys.executable, "-m", "pytest", *options_of_pytest, *files], PYTEST_SECONDS)
            finally:
                suite = ElementTree.parse(xml).getroot().find("testsuite") if xml.is_file() else None
        numbers = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        if numbers["tests"] == numbers["skipped"]:
            raise RuntimeError(f"no test ran on {options.device}: {numbers}")
        return numbers

    report.run("tests/test_ops*.py", run)


def stage_sanitizer(report, options):
    """The checks under compute-sanitizer, which watches our kernels alone where it can tell them apart; first of all it has to find a planted error."""
    tool = find_tool("compute-sanitizer")
    ours: list[str] = []

    def under(kind, arguments):
        """The output. RuntimeError when something was found or could not start; TookTooLong."""
        # the caching allocator hands out pieces of large blocks, past whose ends the tool would see nothing
        quiet = ["--report-api-errors", "no"] if kind == "memcheck" else []  # torch asks CUDA things that may fail
        return run_command([tool, "--tool", kind, *quiet, *ours, "--error-exitcode", 99, sys.executable, "tests/device_checks.py", "cuda", *arguments],
                           SANITIZER_SECONDS, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    def require_tool():
        if options.device == "cpu":
            raise Skip("a sanitizer of CUDA kernels has nothing to do on the CPU")
        if tool is None:
            raise Skip("compute-sanitizer is not on PATH (the CUDA toolkit has it)")

    def planted():
        require_tool()
        for only in (["--kernel-name", "kns=proxt2i"], ["--kernel-regex", "kns=proxt2i"], []):  # the namespace, in every mangled name; by version
            ours[:] = only
            try:
                under("memcheck", ["--plant"])
            except RuntimeError as error:
                if "ended with 99" in str(error):
                    return {"kernels": "ours" if ours else "all"}
        raise RuntimeError("memcheck did not notice that a kernel read behind the end of its memory")

    def run(kind):
        require_tool()
        sys.path.insert(0, str(ROOT / "tests"))
        from device_checks import SANITIZED

        try:
            under(kind, ["--tiny", "--only", *SANITIZED[kind]])
        except TookTooLong as late:
            if re.search(r"========= (Invalid|Error|Warning|Potential|Program hit)", late.text):
                raise
            done = ", ".join(re.findall(r"^(\w+): passed", late.text, re.MULTILINE))
            raise Skip(f"not done after {SANITIZER_SECONDS} s; nothing was reported until then; passed: {done or 'none'}") from None

    report.run("a planted error is found", planted)
    for kind in ("memcheck", "racecheck"):
        report.run(kind, run, kind)


# ---- benchmarks ------------------------------------------------------------------------------------------------------------

def stage_prox_step(report, options):
    """GB/s on the device alone, cold caches: tensors of several times the L2 cache take turns in a CUDA graph."""
    import torch
    from prox_step import ddim_step, make_steps
    from timing import copy_bandwidth, graph_medians, medians

    cpu = options.device == "cpu"

    def bandwidth():
        return {"copy_gb_per_s": copy_bandwidth(options.device, 1 << 22 if cpu else 1 << 30) / 1e9}

    def step(shape, copied, must_reach_target):
        footprint = 1 << 16 if cpu else 10 * max(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0), 40 << 20)
        tensor_bytes = 4 * shape.numel()
        sets = [make_steps(shape, options.device) for _ in range(max(2, footprint // (3 * tensor_bytes)))]
        pairs = [[make(2 * shape.numel(), device=options.device) for make in (torch.zeros, torch.empty)] for _ in sets]
        calls = {name: [steps[name] for steps in sets] for name in ("fused", "eager")}
        calls["copy"] = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]
        with torch.no_grad():
            alone = graph_medians(calls, options.device, repeats=3 if cpu else 20)
            once = {name: sets[0][name] for name in ("fused", "eager")} | ({} if cpu else ddim_step(shape, options.device))
            called = medians(once, options.device, repeats=3 if cpu else 100)
        rate = 4 * tensor_bytes / alone["fused"] / 1e9
        figures = {"gb_per_s": rate, "of_large_copy": rate / copied if copied else None,
                   "of_copy_of_as_many_bytes": alone["copy"] / alone["fused"], "device_us": 1e6 * alone["fused"],
                   "eager_device_us": 1e6 * alone["eager"],
                   **{f"{name}_as_called_us": 1e6 * seconds for name, seconds in called.items()}}
        if must_reach_target and not cpu and (copied is None or rate < COPY_TARGET * copied):
            figures["failure"] = f"below the target of {COPY_TARGET:.0%} of the copy bandwidth"
        return figures

    copied = (report.run("copy bandwidth", bandwidth) or {}).get("copy_gb_per_s")
    for batch in (64, 8):  # 8: 8 MB in all, so that the launch itself counts; no target there
        shape = torch.Size((2, 4, 8, 8) if cpu else (batch, 16, 64, 64))
        report.run("x".join(map(str, shape)) + (f" for {batch}" if cpu else ""), step, shape, copied, batch == 64)


def stage_ops(report, options):
    """Training operators, forward and backward, against eager torch and torch.compile."""
    import ops
    import torch
    from timing import graph_medians, medians

    cpu = options.device == "cpu"
    cases = {"matching": lambda shape, **more: ops.matching(shape, options.device, **more),
             "log-ratio": lambda shape, **more: ops.log_ratio(shape, options.device, True, **more),
             "log-ratio without kl": lambda shape, **more: ops.log_ratio(shape, options.device, False, **more)}

    def against_eager(make, shape):
        called = medians(make(shape), options.device, 3 if cpu else 50)
        return {"speedup": called["eager"] / called["fused"], **{f"{name}_us": 1e6 * seconds for name, seconds in called.items()}}

    def on_device(make, shape):
        try:
            alone = graph_medians({name: [function] for name, function in make(shape).items()}, options.device, 3 if cpu else 20)
        except RuntimeError as error:
            raise Skip(f"forward and backward could not be captured in a graph: {str(error).strip().splitlines()[0][:200]}") from error
        return {"speedup": alone["eager"] / alone["fused"], **{f"{name}_us": 1e6 * seconds for name, seconds in alone.items()}}

    def against_compiled(make, shape):
        if cpu:
            raise Skip("not in a dry run")
        functions = make(shape, compiled=True)
        try:
            functions["compiled"]()
        except Exception as error:
            raise Skip(f"torch.compile does not work here: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
        called = medians({name: functions[name] for name in ("fused", "compiled")}, options.device, 50)
        return {"speedup": called["compiled"] / called["fused"], **{f"{name}_us": 1e6 * seconds for name, seconds in called.items()}}

    torch.manual_seed(0)
    for batch in (64, 8):
        shape = (2, 4, 8, 8) if cpu else (batch, 16, 64, 64)
        for name, make in cases.items():
            report.run(f"{name} B={batch}, eager / fused", against_eager, make, shape)
    for name, make in cases.items():
        report.run(f"{name} B=64, torch.compile / fused", against_compiled, make, (64, 16, 64, 64))
    for name, make in cases.items():
        report.run(f"{name} B=8 on the device alone, eager / fused", on_device, make, (2, 4, 8, 8) if cpu else (8, 16, 64, 64))


def stage_attention(report, options):
    import attention

    cpu = options.device == "cpu"
    results = []

    def shape(tokens, dim):
        result = attention.measure(tokens, dim, options.device, repeats=2 if cpu else 15, heads=2 if cpu else attention.HEADS)
        worst = max(result[norm]["error"] for norm in ("plain", "qk-norm"))
        figures = {"batch": result["batch"], "error": worst, "figures": attention.describe(result), "details": result}
        if worst > attention.MAX_ERROR:
            figures["failure"] = f"relative error {worst:.3g}, more than {attention.MAX_ERROR}"
        return figures

    def table():
        if not options.write_table:
            raise Skip("--write-table was not given")
        if cpu:
            raise Skip("a dry run never writes the table")
        import torch

        if not results:
            raise RuntimeError("there are no measurements to write")
        attention.merge_table(attention.TABLE, torch.cuda.get_device_name(), results)
        return {"written": str(attention.TABLE.relative_to(ROOT))}

    for tokens, dim in [(9, 8), (12, 8)] if cpu else attention.SHAPES:
        figures = report.run(f"N={tokens} D={dim}", shape, tokens, dim)
        if figures:
            results.append(figures["details"])
    report.run("table", table)


# ---- training --------------------------------------------------------------------------------------------------------------

TRAINING_NEEDS = ("deepspeed", "diffusers", "transformers", "webdataset", "safetensors", "omegaconf", "scipy", "PIL", "tensorboard",
                  "matplotlib")


def require_training():
    missing = [name for name in TRAINING_NEEDS if find_spec(name) is None]
    if missing:
        raise Skip(f"not installed: {', '.join(missing)}, which training needs; without diffusers there is no U-ViT at all")


def stage_trainer(report, options):
    """A short portraits run on the GPU, and pictures of its model: whether it runs, and how fast; not how well it learns."""
    cpu = options.device == "cpu"
    folder = ROOT / "build" / "gpu-check" / ("trainer-dry" if cpu else "trainer")

    def train():
        require_training()
        shutil.rmtree(folder, ignore_errors=True)
        launcher = [find_tool("deepspeed") or "deepspeed", "--num_gpus", "1"]
        images, drawn = (256, 128) if cpu else (16000, 4000)
        out = run_command([*([sys.executable] if cpu else launcher), "proxt2i/train.py", "--deepspeed", "configs/zero2.json",
                           f"train.run_dir={folder}", f"train.images={images}", f"optim.warmup_images={images // 4}",
                           f"data.num_images={drawn}", f"train.log_every={images // 4}", f"sample.every={10 * images}",
                           f"train.checkpoint_every={10 * images}"], 400)
        rates = re.findall(r"([\d.]+) (?:images|img)/s", out)
        return {"images": images, **({"images_per_s": float(rates[-1])} if rates else {})}

    def sample():
        if not (folder / "model").is_dir():
            raise Skip("there is no trained model")
        pictures = folder / "pictures"
        run_command([sys.executable, "-m", "proxt2i.sample", "a smiling woman with long red hair", "--model", folder / "model",
                     "--num-images", 2, "--steps", 4, "--device", options.device, "--out", pictures], 120)
        return {"pictures": len([path for path in pictures.glob("**/*.png") if path.name != "grid.png"])}

    report.run("train portraits", train)
    report.run("sample", sample)


def stage_large_model(report, options):
    """U-ViT-H at 256 x 256 by the trainer: MFU, compiled and eager; tables of the kernels are left beside the logs."""
    cpu = options.device == "cpu"
    folder = ROOT / "build" / "gpu-check" / ("large-dry" if cpu else "large")
    result = folder / "result.json"

    def compiled():
        require_training()
        sizes = ["--micro-batch", 2, "--accumulate", 1, "--steps", 1, "--warmup", 1, "--images", 16, "--kinds", "eager"] if cpu else [
            "--steps", 4, "--profile", folder / "kernels.txt"]
        result.unlink(missing_ok=True)
        run_command([sys.executable, "benchmarks/large_model.py", "--device", options.device, "--folder", folder, "--out", result, *sizes], LARGE_SECONDS)
        row = figures("compiled")
        return row | ({"failure": f"below the target of {MFU_TARGET:.0%} MFU"} if row.get("mfu", 1) < MFU_TARGET else {})

    def figures(kind):
        row = read_json(result).get(kind)
        if row is None:
            raise Skip("not measured")
        names = ("images_per_s", "tflops_per_s", "mfu", "memory_gib", "data_wait", "loss", "first_step_s", "split_ms", "kernels_ms")
        return {key: row[key] for key in names if key in row}

    report.run("compiled", compiled)
    report.run("eager", figures, "eager")


def stage_grpo(report, options):
    """Our GRPO trainer against a published one's loop in plain torch, turn by turn."""
    cpu = options.device == "cpu"

    def grpo():
        require_training()
        result = ROOT / "build" / "gpu-check" / "grpo.json"
        sizes = ["--rounds", 2, "--contestants", "ours", "plain"] if cpu else ["--rounds", 8]
        run_command([sys.executable, "benchmarks/grpo.py", "--device", options.device, "--out", result, *sizes], GRPO_SECONDS)
        row = read_json(result)
        ratios = {name: spread["median"] for name, spread in row["ratio"].items()}
        figures = {"network": row["network"], "images_per_s": {name: spread["median"] for name, spread in row["images_per_s"].items()}, "ratio": ratios}
        below = not cpu and ratios["ours / plain"] < GRPO_TARGET
        return figures | ({"failure": f"below the target of {GRPO_TARGET} times the plain loop's images/s"} if below else {})

    report.run("images/s", grpo)


def stage_large_sample(report, options):
    """U-ViT-H at 512 x 512 in 10 steps, against Stable Diffusion 3.5 Medium's network at 28 and 40."""
    cpu = options.device == "cpu"

    def sample():
        require_training()
        result = ROOT / "build" / "gpu-check" / "large_sample.json"
        run_command([sys.executable, "benchmarks/large_sample.py", "--device", options.device, "--out", result, *(["--batches", 1, "--repeats", 1] if cpu else [])], 110)
        row = read_json(result)
        rates = {f"{kind}: {name}": line["images_per_s"] for kind in ("ours", "sd3.5-medium") for name, line in row[kind].items()}
        return rates | {f"overhead: {name}": line["overhead"] for name, line in row["ours"].items() if "overhead" in line} | row["ratio"]

    report.run("U-ViT-H against SD3.5 Medium", sample)


STAGES = {name.removeprefix("stage_"): stage for name, stage in list(globals().items()) if name.startswith("stage_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("report", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--architecture", default="")
    parser.add_argument("--write-table", action="store_true")
    options = parser.parse_args()
    STAGES[options.stage](Report(options.report), options)


if __name__ == "__main__":
    main()
