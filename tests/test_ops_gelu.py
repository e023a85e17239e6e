"""GELU's native CPU kernels against float64, and where `gelu` runs them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from op_cases import EPS_DTYPES, OPS, restore_cpu  # noqa: F401  (a fixture)

from proxt2i import _C
from proxt2i.models.uvit import Mlp
from proxt2i.ops import gelu

HALVES = [torch.bfloat16, torch.float16]
ATEN = torch.ops.aten


def both(x):
    """GELU and its derivative, natively."""
    return OPS.gelu(x), OPS.gelu_backward(torch.ones_like(x), x)


def exact(x):
    """The same in float64, without cancellation for negative x."""
    x = x.double()
    below = torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * below, below + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def every(dtype, bound=12.0):
    """The values of a dtype in [-bound, bound], all of a 16-bit one's, in order."""
    if dtype not in HALVES:
        return torch.linspace(-bound, bound, 600_001, dtype=dtype)
    x = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
    return x[x.abs() <= bound].sort().values


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_error_at_most_twice_that_of_torch(dtype):
    for x in (every(dtype), every(dtype, 3.0)):
        for ours, theirs, right in zip(both(x), (F.gelu(x), ATEN.gelu_backward(torch.ones_like(x), x)), exact(x)):
            error, allowed = (ours.double() - right).abs(), (theirs.double() - right).abs()
            assert ours.dtype == dtype
            assert error.max() <= 2 * allowed.max() and error.mean() <= 2 * allowed.mean()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_error_is_small_everywhere(dtype):
    """Half a last place and 3e-7 times x (of the derivative: times 1), for negative x too, where Phi is a small difference from 1/2."""
    x = every(dtype)
    for ours, right, size in zip(both(x), exact(x), (x.double().abs().clamp(min=1e-30), torch.ones(len(x)))):
        # half a last place is at most eps / 2 of the number; float16's smallest numbers lie 2^-24 apart
        places = torch.finfo(dtype).eps * right.abs() + (2**-24 if dtype == torch.float16 else 0)
        assert ((ours.double() - right).abs() <= places / 2 * 1.01 + 3e-7 * size).all()


def test_float64():
    x = every(torch.float64)
    for ours, right in zip(both(x), exact(x)):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", EPS_DTYPES)
def test_special_values(dtype):
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 6e-8, -6e-8, 3e4, -3e4, 1e38, -1e38, 7, -20], dtype=torch.float64).to(dtype)
    values, slopes = both(x)
    finite = x.isfinite()
    assert values[2] == math.inf and values[4].isnan() and slopes[4].isnan()
    assert values[0] == values[1] == 0 and not values[0].signbit() and values[1].signbit()
    right, right_slopes = (part.to(dtype)[finite] for part in exact(x))
    torch.testing.assert_close(values[finite], right, rtol=0 if dtype in HALVES else 1e-12 if dtype == torch.float64 else 1e-6, atol=1e-18)
    torch.testing.assert_close(slopes[finite], right_slopes, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", EPS_DTYPES)
def test_bits_do_not_depend_on_threads_or_instruction_set(dtype, restore_cpu):  # noqa: F811
    x = torch.cat([torch.linspace(-13, 13, 20_011).to(dtype), torch.tensor([math.inf, -1e30, 1e-40]).to(dtype)])
    results = []
    for isa, threads in itertools.product(_C.build_info()["cpu_isas"], (1, 2)):
        _C.use_cpu_isa(isa)
        torch.set_num_threads(threads)
        results.append(both(x))
    assert len(results) >= 2
    for other in results[1:]:
        for ours, first in zip(other, results[0]):
            torch.testing.assert_close(ours, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", EPS_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (511,), (512,), (513,), (3, 5, 171)])
def test_any_shape(shape, dtype):
    x = torch.linspace(-4, 4, max(1, math.prod(shape)), dtype=torch.float64).to(dtype)[: math.prod(shape)].reshape(shape)
    for ours, right in zip(both(x), exact(x)):
        assert ours.shape == shape and ours.dtype == dtype and ours.is_contiguous()
        torch.testing.assert_close(ours, right.to(dtype), rtol=1e-2 if dtype in HALVES else 1e-5, atol=1e-6)


def test_non_contiguous_and_misaligned_inputs_are_left_alone():
    x, grad = torch.randn(6, 40), torch.randn(6, 40)
    for strided in (x.T.contiguous().T, torch.empty(241)[1:].view(6, 40).copy_(x), x.repeat_interleave(2, 1)[:, ::2]):
        before = strided.clone()
        assert torch.equal(OPS.gelu(strided), OPS.gelu(x))
        assert torch.equal(OPS.gelu_backward(grad.T.contiguous().T, strided), OPS.gelu_backward(grad, x))
        assert torch.equal(strided, before)
    ones = torch.ones(()).expand(6, 40)  # the gradient of a sum
    assert torch.equal(OPS.gelu_backward(ones, x), OPS.gelu_backward(torch.ones(6, 40), x))


def test_wrong_inputs_are_refused():
    x = torch.randn(3)
    with pytest.raises(ValueError, match="impl must be"):
        gelu(x, impl="ref")
    for bad in (x.to("meta"), torch.arange(3)):
        with pytest.raises(ValueError, match="impl='native'"):
            gelu(bad, impl="native")
    for grad in (x[:2], x.double()):
        with pytest.raises(RuntimeError, match="proxt2i: grad"):
            OPS.gelu_backward(grad, x)
    with pytest.raises(RuntimeError, match="proxt2i: "):
        OPS.gelu(torch.arange(3))


# ---- torch integration -----------------------------------------------------------------------------------------------------

def test_opcheck_and_gradcheck():
    x = torch.randn(3, 5)
    torch.library.opcheck(OPS.gelu_backward.default, (torch.randn(3, 5), x))
    torch.library.opcheck(OPS.gelu.default, (x.T.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: gelu(x, impl="native"), [(3 * torch.randn(40, dtype=torch.float64)).requires_grad_()])


def test_second_derivative_is_an_error():
    x = torch.randn(4, requires_grad=True)
    gradient, = torch.autograd.grad(gelu(x, impl="native").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def called(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


@pytest.mark.skipif(_C.build_info()["cpu_isa"] == "baseline", reason="needs AVX2")
def test_an_mlp_runs_the_native_kernels_in_eager_mode_alone():
    mlp, x = Mlp(8, 16), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        names = called(lambda: mlp(x).float().sum().backward())
    assert {"proxt2i::gelu", "proxt2i::gelu_backward"} <= names and "aten::gelu" not in names
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(str(graph.code))
        return graph

    torch.testing.assert_close(torch.compile(mlp, backend=backend, fullgraph=True)(x), mlp(x))
    assert "gelu" in graphs[0] and "proxt2i" not in graphs[0]
    assert "proxt2i::gelu" not in called(lambda: gelu(x.double()))
