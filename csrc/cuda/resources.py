"""`resources.py COMMAND...` runs a build that has `ptxas -v` and prints one line per kernel and architecture; fails on spills
and where ptxas lets wgmma instructions wait for one another (C7510 and the like), which it calls information."""

import re
import shutil
import subprocess
import sys

SERIALISED = "wgmma.mma_async instructions are serialized"


def kernels(lines):
    """(rows of (kernel, arch, registers, shared, stack, spilled bytes), the lines that are not ptxas -v's)."""
    rows, other = [], []
    for line in lines:
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            rows.append([entry[1], entry[2], 0, 0, 0, 0])
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            rows[-1][4] = max(rows[-1][4], int(frame[1]))
            rows[-1][5] += int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows[-1][2:4] = int(used[1]), int(shared[1]) if shared else 0
        elif SERIALISED in line or not re.search(r"^ptxas info +: (Function properties|Compile time|\d+ bytes gmem|\(C)", line):
            other.append(line)
    return rows, other


def demangle(names):
    if not names or shutil.which("c++filt") is None:
        return names
    plain = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    return [name.replace("(anonymous namespace)::", "").replace("proxt2i::", "") for name in plain]


def main():
    build = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows, other = kernels(build.stdout.splitlines())
    print("\n".join(other))
    if build.returncode != 0:
        sys.exit(build.returncode)
    names = demangle([row[0] for row in rows])
    width = max(map(len, names), default=0)
    print(f"{'kernel':{width}}  arch    registers  shared  stack  spilled")
    for name, row in sorted(zip(names, rows)):
        print("{:{width}}  {:6}  {:9}  {:6}  {:5}  {:7}".format(name, *row[1:], width=width))
    if any(row[5] for row in rows):
        sys.exit("cuda-check: kernels spill registers")
    if any(SERIALISED in line for line in other):
        sys.exit("cuda-check: wgmma instructions wait for one another")
    if not rows:
        sys.exit("cuda-check: no kernel was compiled")


if __name__ == "__main__":
    main()
