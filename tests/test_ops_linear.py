"""Linear layers by oneDNN: the same values and gradients as torch's, and torch's own where they do not fit. Memory that a process keeps."""

import ctypes
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from proxt2i.ops.linear import AVAILABLE, MIN_ROWS, Linear, linear

needs_onednn = pytest.mark.skipif(not AVAILABLE, reason="needs a torch with oneDNN")


def case(shape=(32, 40), inputs=48, outputs=80):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=generator).requires_grad_() for size in ((*shape, inputs), (outputs, inputs), (outputs,))]


def calls_onednn(function) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return any("_linear_pointwise" in event.name for event in profile.events())


@needs_onednn
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_values_and_gradients_are_those_of_torch(with_bias, strided):
    """In float64, to the rounding of float32; `strided`: a part of the tokens and half of a weight, as the long skip and the last block have."""
    x, weight, bias = case(inputs=96 if strided else 48)
    grad = torch.randn(80, 31 if strided else 40, 32, generator=torch.Generator().manual_seed(1)).permute(2, 1, 0)  # not contiguous
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        leaves = [part.detach().to(dtype).requires_grad_() for part in (x, weight, bias)]
        cut = (leaves[0][:, -31:, :48], leaves[1][:, 48:]) if strided else leaves[:2]
        out = function(*cut, leaves[2] if with_bias else None)
        gradients = torch.autograd.grad(out, leaves if with_bias else leaves[:2], grad.to(dtype))
        results.append([part.float() for part in (out, *gradients)])
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-4)


@needs_onednn
def test_large_products_alone_are_onednns():
    x, weight, bias = case()
    assert x[..., 0].numel() >= MIN_ROWS and calls_onednn(lambda: linear(x, weight, bias)) and calls_onednn(lambda: Linear(48, 80)(x))
    assert not calls_onednn(lambda: linear(x[:8], weight, bias)) and not calls_onednn(lambda: linear(x.double(), weight.double(), bias.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x[:, :0], weight, bias).shape == (32, 0, 80)


@needs_onednn
def test_its_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        linear(*case()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 40 * 48 * 80 + 2 * 32 * 40 * 80  # the last: the bias' gradient


@needs_onednn
def test_a_second_derivative_is_refused():
    x, weight, bias = case()
    grad, = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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
    """64 MiB in every round: 16,384 pages of 4 KiB."""
    kept, default = (json.loads(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
                     for how in ("keep", "default"))
    assert kept[0] > 1000 and max(kept[2:]) < 100 < min(default[2:])
