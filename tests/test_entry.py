"""What the entry points of training do to their process."""

import ctypes
import json
import subprocess
import sys

import pytest

FAULTS = """
import json, resource, sys
from proxt2i.entry import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * (4 << 20) for _ in range(16)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_used_again_without_a_page_fault():
    """64 MiB in every round: 16,384 pages of 4 KiB, or 32 of 2 MiB."""
    kept, default = (json.loads(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
                     for how in ("keep", "default"))
    assert max(kept[2:]) < 10 < min(default[2:])
