"""The native linear layers against float64, and where `linear` runs them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from op_cases import EPS_DTYPES, OPS, restore_cpu, same_numbers_in_every_run  # noqa: F401  (fixtures)
from torch.utils.flop_counter import FlopCounterMode

from proxt2i import _C
from proxt2i.models.uvit import Linear, LongSkip
from proxt2i.ops import linear

pytestmark = pytest.mark.usefixtures("same_numbers_in_every_run")
# rows, inputs, more inputs, outputs: tails of tiles (12), blocks (48) and slices of rows (192 words), odd numbers of rows
SIZES = [(1, 32, 0, 32), (11, 32, 32, 64), (12, 64, 0, 32), (49, 96, 0, 160), (107, 32, 64, 96), (383, 64, 0, 32), (389, 32, 32, 64), (771, 160, 0, 32)]


def case(rows, inputs, more, outputs, dtype):
    """x, skip, weight, bias, grad, all requiring gradients but the last."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    skip = torch.randn(rows, more).to(dtype).requires_grad_() if more else None
    weight, bias = torch.randn(outputs, inputs + more).to(state) / (inputs + more) ** 0.5, torch.randn(outputs).to(state)
    return x.requires_grad_(), skip, weight.requires_grad_(), bias.requires_grad_(), grad


def all_of(function, x, skip, weight, bias, grad):
    """y and the gradients of all there is."""
    given = [tensor for tensor in (x, skip, weight, bias) if tensor is not None]
    y = function(x, skip, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, given, grad)]


def native(x, skip, weight, bias):
    return linear(x, weight, bias, skip, impl="native")


def plain(x, skip, weight, bias):
    """As torch's autocast computes: factors in x's dtype."""
    joined = x if skip is None else torch.cat([x, skip], dim=-1)
    return F.linear(joined, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
@pytest.mark.parametrize("dtype", EPS_DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_error_at_most_twice_that_of_torch(sizes, dtype, isa, restore_cpu):  # noqa: F811
    _C.use_cpu_isa(isa)
    inputs = case(*sizes, dtype)
    exact = all_of(plain, *(None if t is None else t.detach().double().requires_grad_() for t in inputs))
    for ours, theirs, right in zip(all_of(native, *inputs), all_of(plain, *inputs), exact):
        assert ours.dtype == theirs.dtype and ours.shape == right.shape
        error, allowed = (ours.double() - right).norm(), (theirs.double() - right).norm()
        assert error <= 2 * allowed + 1e-7 * right.norm() * (dtype != torch.float64) + 1e-14 * right.norm()


@pytest.mark.parametrize("dtype", EPS_DTYPES)
def test_bits_do_not_depend_on_threads_or_instruction_set(dtype, restore_cpu):  # noqa: F811
    inputs, results = case(1000, 64, 32, 416, dtype), {}
    for isa, threads in itertools.product(_C.build_info()["cpu_isas"], (1, 2, 3)):
        _C.use_cpu_isa(isa)
        torch.set_num_threads(threads)
        pairs = isa == "avx512_bf16" and dtype == torch.bfloat16  # these have products of their own
        results.setdefault(pairs, []).append(all_of(native, *inputs))
    for alike in results.values():
        assert len(alike) >= 3
        for other in alike[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, alike[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    x, _, weight, bias, grad = case(200, 64, 0, 64, dtype)
    y, grad_x, *_ = all_of(native, x, None, weight, bias, grad)
    for rows in (slice(0, 1), slice(5, 96), slice(77, 200)):
        part, grad_part, *_ = all_of(native, x.detach()[rows].requires_grad_(), None, weight, bias, grad[rows])
        assert torch.equal(part, y[rows]) and torch.equal(grad_part, grad_x[rows])


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (7,), (2, 3, 5), ()])
def test_any_number_of_rows_in_any_shape(shape):
    x, weight, bias = torch.randn(*shape, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True), torch.randn(64, requires_grad=True)
    y = linear(x, weight, bias, impl="native")
    right = F.linear(x, weight, bias)
    torch.testing.assert_close(y, right)
    for ours, theirs in zip(*(torch.autograd.grad(z.square().sum(), [x, weight, bias]) for z in (y, right))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_strided_and_misaligned_inputs():
    x, weight, grad = torch.randn(50, 32), torch.randn(32, 32), torch.randn(50, 32)
    right = OPS.linear(x, None, weight, None), OPS.linear_backward(grad, x, None, weight, False, True, True)
    for change in (lambda t: t.T.contiguous().T, lambda t: torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t), lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(OPS.linear(change(x), None, change(weight), None), right[0])
        for ours, theirs in zip(OPS.linear_backward(change(grad), change(x), None, change(weight), False, True, True), right[1]):
            assert torch.equal(ours, theirs)


def test_what_is_not_asked_for_is_not_made():
    x, skip, weight, bias, grad = case(50, 32, 32, 64, torch.float32)
    everything = OPS.linear_backward(grad, x.detach(), skip.detach(), weight.detach(), True, True, True)
    for wants_x, wants_weight in itertools.product((False, True), repeat=2):
        some = OPS.linear_backward(grad, x.detach(), skip.detach(), weight.detach(), True, wants_x, wants_weight)
        for made, whole, wanted in zip(some, everything, (wants_x, wants_x, wants_weight, wants_weight)):
            assert torch.equal(made, whole) if wanted else made.numel() == 0
    frozen = native(x, skip.detach(), weight.detach(), bias.detach())  # as beside a LoRA
    assert torch.equal(torch.autograd.grad(frozen, x, grad)[0], everything[0])
    weight.grad = None
    native(x.detach(), skip.detach(), weight, None).backward(grad)  # as of a first layer
    assert torch.equal(weight.grad, everything[2])


def test_wrong_inputs_are_refused():
    x, weight = torch.randn(3, 32), torch.randn(64, 32)
    with pytest.raises(ValueError, match="impl must be"):
        linear(x, weight, impl="ref")
    for bad, its_weight, reason in ((x.to("meta"), weight, "on meta"), (x[:, :31], weight[:, :31], "multiples of 32"), (x, weight.bfloat16(), "weight must be float32"),
                                    (x.double(), weight, "weight must be float32"), (torch.ones(3, 32, dtype=torch.int64), weight, "int64")):
        with pytest.raises(ValueError, match=reason):
            linear(bad, its_weight, impl="native")
    for arguments in ((x, None, weight[:, :31], None), (x, None, weight[:40], None), (x, x[:2], torch.randn(64, 64), None), (x, x.double(), torch.randn(64, 64), None),
                      (x.view(3, 1, 32), x, torch.randn(64, 64), None), (x, None, weight, torch.randn(63)), (x, None, weight, torch.randn(64).double()), (x, torch.empty(3, 0), weight, None)):
        with pytest.raises(RuntimeError, match="proxt2i: "):
            OPS.linear(*arguments)
    for grad in (torch.randn(2, 64), torch.randn(3, 64).double(), torch.randn(64, 3)):
        with pytest.raises(RuntimeError, match="proxt2i: grad"):
            OPS.linear_backward(grad, x, None, weight, False, True, True)


# ---- torch integration -----------------------------------------------------------------------------------------------------

def test_opcheck_and_gradcheck():
    x, skip, weight, bias, grad = case(5, 32, 32, 32, torch.float32)
    torch.library.opcheck(OPS.linear.default, (x, skip, weight, bias))
    torch.library.opcheck(OPS.linear.default, (x, None, weight.detach()[:, :32].clone(), None))
    for wants in itertools.product((False, True), repeat=3):
        torch.library.opcheck(OPS.linear_backward.default, (grad, x.detach(), skip.detach(), weight.detach(), *wants))
    inputs = case(5, 32, 32, 32, torch.float64)[:4]
    assert torch.autograd.gradcheck(native, inputs, fast_mode=True)


def test_second_derivative_is_an_error():
    x, _, weight, bias, _ = case(5, 32, 0, 32, torch.float32)
    gradient, = torch.autograd.grad(native(x, None, weight, bias).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def called(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages() if event.key.startswith(("proxt2i::linear", "aten::linear"))}


@pytest.mark.parametrize("products", [(), (torch.float32,), (torch.float32, torch.bfloat16)])
def test_layers_run_the_native_kernels_where_these_are_faster(products, monkeypatch):
    monkeypatch.setitem(linear.__globals__, "PRODUCTS", frozenset(products))
    layer, skip, x, few = Linear(32, 64), LongSkip(32), torch.randn(2, 128, 32), torch.randn(2, 127, 32)
    ours, theirs = {"proxt2i::linear", "proxt2i::linear_backward"}, {"aten::linear"}

    def run(autocast, x=x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, joined = layer(x), skip(x, x)
        (y.float().sum() + joined.float().sum()).backward()
        assert y.dtype == joined.dtype == (torch.bfloat16 if autocast else x.dtype) and layer.weight.grad.dtype == torch.float32

    assert called(lambda: run(False)) == (ours if torch.float32 in products else theirs)
    assert called(lambda: run(True)) == (ours if torch.bfloat16 in products else theirs)
    assert called(lambda: run(False, few)) == theirs  # packing would not pay
    torch.testing.assert_close(skip(x, 2 * x), F.linear(torch.cat([x, 2 * x], -1), skip.weight, skip.bias), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(skip, backend="eager", fullgraph=True)
    assert called(lambda: compiled(x, x)) == theirs


def test_floating_point_operations_are_counted(monkeypatch):
    layer, x = LongSkip(32), torch.randn(2, 128, 32, requires_grad=True)
    counts = []
    for products in ((), (torch.float32,)):
        monkeypatch.setitem(linear.__globals__, "PRODUCTS", frozenset(products))
        with FlopCounterMode(display=False) as counter:
            layer(x, x.detach().clone().requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 256 * 64 * 32
