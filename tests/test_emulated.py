"""Runs the CUDA kernels without a GPU: builds the emulated module and runs tests/emulated in a process that has the sanitizers.

`python tests/test_emulated.py -k name` (or `make emulate ARGS='-k name'`) does the same from the shell, the arguments going to pytest.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxt2i.ops import native_available

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
WERROR = "ON" if os.environ.get("PROXT2I_WERROR") == "1" else "OFF"


def find_tool(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def library(name: str) -> str | None:
    """The compiler's own copy of a library, which it names without a folder where it has none."""
    if COMPILER is None:
        return None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def missing() -> list[str]:
    """What this machine lacks for the emulated module."""
    problems = [f"no {name}.so of {COMPILER or 'a C++ compiler'}: apt-get install g++" for name in ("libasan", "libubsan")
                if library(f"{name}.so") is None]
    problems += [f"no {tool}: pip install {tool}" for tool in ("cmake", "ninja") if find_tool(tool) is None]
    if not native_available():
        problems.append("proxt2i._C is not built, and the CUDA kernels are compared with its CPU kernels")
    return problems


def build() -> Path:
    """Builds the module _emulated, or what of it has changed, and returns its folder."""
    key = hashlib.sha256(f"{sys.executable} {sys.version} {COMPILER} {WERROR}".encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"emulated-{sys.implementation.cache_tag}-{key}"
    commands = [[find_tool("cmake"), "--build", folder, "--target", "_emulated"]]
    if not (folder / "build.ninja").exists():
        commands.insert(0, [find_tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", "-DPROXT2I_CUDA=EMULATE",
                            f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
                            f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
                            f"-DCMAKE_COMPILE_WARNING_AS_ERROR={WERROR}"])
    for command in commands:
        done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the emulated module does not build:\n{done.stdout}")
    return folder


def run(folder: Path, arguments: list[str], **options) -> subprocess.CompletedProcess:
    """pytest on tests/emulated. libstdc++ goes before the program so that ASan finds the functions that throw exceptions."""
    environment = os.environ | {
        "PROXT2I_EMULATED": str(folder), "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}", "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", "tests/emulated", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, **options)  # capture=sys leaves the sanitizers their stderr


@pytest.mark.timeout(3600)
def test_emulated_kernels():
    if missing():
        say = pytest.fail if os.environ.get("PROXT2I_REQUIRE_NATIVE") == "1" else pytest.skip
        say("the CUDA kernels cannot be emulated here: " + "; ".join(missing()))
    done = run(build(), ["-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    passed = re.search(r"=.* (\d+) passed.* in .*=$", done.stdout.strip())
    if done.returncode != 0 or passed is None or int(passed[1]) == 0:
        report = [line for line in done.stdout.splitlines() if not re.search(r" (PASSED|SKIPPED)\b", line)]
        pytest.fail("\n".join([f"tests/emulated ended with {done.returncode}:", *report]), pytrace=False)


if __name__ == "__main__":
    if missing():
        sys.exit("\n".join(["the CUDA kernels cannot be emulated here:", *(f"  - {problem}" for problem in missing())]))
    sys.exit(run(build(), sys.argv[1:] or ["-q"]).returncode)
