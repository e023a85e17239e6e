"""tests/device_checks.py, which `make gpu-check` runs on a GPU, on the emulated kernels: the checks themselves are right."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from device_checks import CHECKS, SANITIZED, NotHere, Target  # noqa: E402


@pytest.mark.parametrize("name", SANITIZED["memcheck"])
def test_check(name, order):
    if order == "reverse" and name.startswith("attention"):
        pytest.skip("test_attention.py runs these cases in both orders")
    try:
        CHECKS[name](Target(torch.ops.proxt2i_emulated, "cpu", small=True))
    except NotHere as reason:
        pytest.fail(f"not run: {reason}")


def test_attention_of_devices_with_wgmma(hopper):
    CHECKS["attention"](Target(torch.ops.proxt2i_emulated, "cpu", small=True))
