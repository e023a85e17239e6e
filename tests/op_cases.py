"""What the tests of the native operators share. Importing it skips a module where the extension is not built, unless it is required."""

import os

import pytest
import torch

from proxt2i.ops import native_available

if not native_available() and os.environ.get("PROXT2I_REQUIRE_NATIVE") != "1":
    pytest.skip("proxt2i._C is not built", allow_module_level=True)
from proxt2i import _C  # noqa: E402

OPS = torch.ops.proxt2i
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not (torch.cuda.is_available() and native_available("cuda")), reason="needs a GPU and an extension with CUDA kernels"))]
SHAPES = [(3, 5, 7), (2, 1), (5,), (1, 2, 3), (2, 511), (2, 512), (3, 513), (2, 4, 700)]
EPS_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def same_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture
def restore_cpu():
    """Instruction set and threads as they were."""
    isa, threads = _C.build_info()["cpu_isa"], torch.get_num_threads()
    yield
    _C.use_cpu_isa(isa)
    torch.set_num_threads(threads)
