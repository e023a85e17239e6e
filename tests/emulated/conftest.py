"""Tests that run the CUDA kernels through the emulator; tests/test_emulated.py runs them in a process that has the sanitizers.

A new kernel's tests are a new file here: call torch.ops.proxt2i_emulated.<op> on CPU tensors. Every test runs in both orders of
blocks, warps and lanes.
"""

import os
import sys

import pytest

if "PROXT2I_EMULATED" in os.environ:  # the folder of the built module
    import torch  # noqa: F401  (its libraries are what the module links against)

    sys.path.insert(0, os.environ["PROXT2I_EMULATED"])
    import _emulated

    @pytest.fixture(autouse=True, params=["forward", "reverse"])
    def order(request):
        _emulated.set_reverse_order(request.param == "reverse")
        return request.param

    @pytest.fixture
    def hopper():
        """The device has compute capability 9.0."""
        _emulated.set_hopper(True)
        yield
        _emulated.set_hopper(False)
else:
    collect_ignore_glob = ["*"]
