"""What `make gpu-check` finds on the machine: tools, torch and the device, each problem with its fix. Standard library only.

torch is asked in a process of its own, so that the caller never holds a CUDA context.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TOOLKITS = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
MIN_TORCH, MIN_CMAKE, MIN_CAPABILITY = (2, 11), (3, 24), (8, 0)
ASK_TORCH = """
import importlib.util, json, sys
facts = {name: importlib.util.find_spec(name) is not None for name in ("pybind11", "setuptools", "pytest", "numpy", "scipy")}
try:
    import torch
    facts |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "devices": 0}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"devices": torch.cuda.device_count(), "device": torch.cuda.get_device_name(0),
                  "memory_gb": round(properties.total_memory / 1e9, 1), "capability": list(torch.cuda.get_device_capability(0)),
                  "multiprocessors": properties.multi_processor_count,
                  "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1)}
except ImportError as error:
    facts |= {"torch": None, "torch_problem": str(error)}
print("\\n" + json.dumps(facts))
"""


def find_tool(name: str) -> str | None:
    """Path of a tool: beside this Python, on PATH, or in a CUDA toolkit that is not on PATH."""
    places = [Path(sys.executable).parent, *(Path(kit) / "bin" for kit in TOOLKITS if kit)]
    beside = places[0] / name
    return str(beside) if beside.exists() else shutil.which(name) or next((str(p / name) for p in places[1:] if (p / name).exists()), None)


def run_text(*command: str, timeout: float = 120) -> str:
    """What a command prints, "" if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def version(text: str, pattern: str = r"(\d+)\.(\d+)") -> tuple[int, ...]:
    found = re.search(pattern, text or "")
    return tuple(int(part) for part in found.groups()) if found else ()


def gather() -> dict:
    """All facts, as JSON can hold them; a tool that is missing is None."""
    facts = {"python": sys.version.split()[0], "tools": {name: find_tool(name) for name in ("nvcc", "cmake", "ninja", "compute-sanitizer")}}
    answer = run_text(sys.executable, "-c", ASK_TORCH).strip().splitlines()
    facts |= json.loads(answer[-1]) if answer else {"torch": None, "torch_problem": "python could not import it"}
    facts["compiler"] = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    facts["nvcc"] = list(version(run_text(facts["tools"]["nvcc"] or "nvcc", "--version"), r"release (\d+)\.(\d+)")) or None
    facts["cmake"] = list(version(run_text(facts["tools"]["cmake"] or "cmake", "--version"))) or None
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,utilization.gpu,memory.used"
    answer = run_text("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split("\n")[0]
    facts["nvidia_smi"] = dict(zip(query.split(","), answer.split(", ")))
    root = Path(__file__).resolve().parents[1]
    facts["commit"] = run_text("git", "-C", str(root), "rev-parse", "HEAD").strip() or None
    facts["changed_files"] = len(run_text("git", "-C", str(root), "status", "--porcelain").splitlines())
    return facts


def problems(facts: dict, device: str) -> list[str]:
    """What makes the run pointless, each with its fix; a run on the CPU needs no GPU and no build tools."""
    found = []
    if not facts["torch"]:
        return [f"{sys.executable} has no torch ({facts.get('torch_problem')}): pip install torch (a CUDA build), "
                "or make gpu-check PYTHON=/path/to/python"]
    if version(facts["torch"]) < MIN_TORCH:
        found.append(f"torch is {facts['torch']}, and the extension needs {'.'.join(map(str, MIN_TORCH))} or newer: pip install -U torch")
    if device == "cpu":
        return found
    if not facts["torch_cuda"]:
        found.append(f"torch {facts['torch']} is a CPU build and sees no CUDA device: "
                     "install a CUDA build of torch (PyPI's for Linux is one)")
    elif not facts["devices"]:
        found.append(f"torch {facts['torch']} (CUDA {facts['torch_cuda']}) sees no CUDA device: run this on a machine with an NVIDIA GPU; "
                     "where it has one, `nvidia-smi` must list it, its driver must be new enough for that CUDA, "
                     "and CUDA_VISIBLE_DEVICES must not hide it")
    elif tuple(facts["capability"]) < MIN_CAPABILITY:
        found.append(f"{facts['device']} has compute capability {'.'.join(map(str, facts['capability']))}: "
                     "the kernels need 8.0 (Ampere) or newer")
    if not facts["nvcc"]:
        major = (facts["torch_cuda"] or "").split(".")[0]
        found.append(f"nvcc is missing: install the CUDA toolkit{f' {major}.x' if major else ''} and put nvcc on PATH, or set CUDA_HOME")
    if not facts["cmake"] or tuple(facts["cmake"]) < MIN_CMAKE:
        found.append(f"cmake {'.'.join(map(str, facts['cmake'] or [])) or 'is missing'}: "
                     f"pip install 'cmake>={'.'.join(map(str, MIN_CMAKE))}'")
    if not facts["tools"]["ninja"]:
        found.append("ninja is missing: pip install ninja (or apt-get install ninja-build)")
    found += [f"{module} is missing: pip install {module}" for module in ("pybind11", "setuptools") if not facts.get(module)]
    if not facts["compiler"]:
        found.append("no C++ compiler: apt-get install g++")
    return found


def mismatch(facts: dict) -> str | None:
    """torch and nvcc of different major versions of CUDA: it may still work, so that the run goes on, but it is not what we support."""
    theirs, ours = version(facts.get("torch_cuda") or "")[:1], tuple(facts["nvcc"] or ())[:1]
    if theirs and ours and theirs != ours:
        return f"torch is built for CUDA {facts['torch_cuda']}, nvcc is {'.'.join(map(str, facts['nvcc']))}: " \
               f"install the CUDA toolkit {theirs[0]}.x, or a torch built for CUDA {ours[0]}"
    return None


def architecture(capability: list[int]) -> str:
    """CMake's name of this GPU's own architecture: [9, 0] -> "90a-real"."""
    number = "".join(map(str, capability))
    return "90a-real" if number == "90" else f"{number}-real"


def environment(facts: dict) -> dict[str, str]:
    """For every process of the run: the tools found are on PATH, and the repository is what `import proxt2i` finds."""
    folders = dict.fromkeys(str(Path(tool).parent) for tool in facts["tools"].values() if tool)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    python_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PATH": path, "PYTHONPATH": python_path}
