"""Builds proxt2i._C by driving CMakeLists.txt; everything else about the package is in pyproject.toml.

Environment: PROXT2I_NO_NATIVE=1 installs without the extension (the plain-torch reference runs instead);
PROXT2I_CUDA=AUTO|ON|OFF says whether the CUDA kernels are linked (AUTO: where torch has CUDA and nvcc is found);
PROXT2I_CUDA_ARCHITECTURES is CMake's list of the GPUs they are compiled for (default: CMakeLists.txt's), e.g. 90a-real;
PROXT2I_BUILD_DIR is the folder of object files (default: one under build/ for this Python);
PROXT2I_WERROR=1 makes compiler warnings errors.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SKIP_HINT = "(or set PROXT2I_NO_NATIVE=1 to install without it and run the slower plain-torch reference)"


def find_tool(name):
    """Path of a build tool, looked for beside this Python first and then on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def missing_requirements():
    """What the native build lacks on this machine, each with its fix."""
    problems = []
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        problems.append("no C++ compiler: apt-get install g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        problems.append(f"no Python headers ({header}): apt-get install python3-dev")
    problems += [f"no {tool}: pip install {tool} (or apt-get install {apt})"
                 for tool, apt in (("cmake", "cmake"), ("ninja", "ninja-build")) if find_tool(tool) is None]
    for module in ("torch", "pybind11"):
        try:
            __import__(module)
        except ImportError:
            problems.append(f"no {module} in the build environment: pip install {module}, then install with --no-build-isolation")
    return problems


class CMakeBuild(build_ext):
    """build_ext that configures and builds CMakeLists.txt with Ninja, in build/native-* so that rebuilds are incremental."""

    def build_extension(self, ext):
        problems = missing_requirements()
        if problems:
            raise SystemExit("\n".join(["proxt2i: cannot build the native extension", *(f"  - {p}" for p in problems), SKIP_HINT]))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        key = hashlib.sha256(f"{sys.executable} {sys.version}".encode()).hexdigest()[:8]
        build = Path(os.environ.get("PROXT2I_BUILD_DIR") or ROOT / "build" / f"native-{sys.implementation.cache_tag}-{key}").resolve()
        cmake = find_tool("cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
                     f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", f"-DPROXT2I_CUDA={os.environ.get('PROXT2I_CUDA', 'AUTO')}",
                     f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
                     f"-DCMAKE_COMPILE_WARNING_AS_ERROR={'ON' if os.environ.get('PROXT2I_WERROR') == '1' else 'OFF'}"]
        archs = os.environ.get("PROXT2I_CUDA_ARCHITECTURES")
        configure.append(f"-DPROXT2I_CUDA_ARCHITECTURES={archs}" if archs else "-UPROXT2I_CUDA_ARCHITECTURES")  # not an earlier build's
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--target", "_C"], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"proxt2i: the native build failed at `{' '.join(error.cmd)}`; its messages are above {SKIP_HINT}") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(".tmp")
        shutil.copy2(build / target.name, staged)
        os.replace(staged, target)  # a running process keeps the old file


setup(
    ext_modules=[] if os.environ.get("PROXT2I_NO_NATIVE") == "1" else [Extension("proxt2i._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
