"""Likelihood ratios of Gaussian transitions: against densities, closed forms, and the plain-torch reference."""

import itertools
import math

import pytest
import torch
from op_cases import DEVICES, EPS_DTYPES, OPS, SHAPES, restore_cpu, same_numbers_in_every_run  # noqa: F401  (fixtures)

from proxt2i import _C
from proxt2i.ops import guided_eps, philox_normal, transition_log_ratio

W = 2.5


pytestmark = pytest.mark.usefixtures("same_numbers_in_every_run")


def inputs(*shape, dtype=torch.float32, eps_dtype=None, device="cpu", change=0.05, seed=0):
    """Keyword arguments of transition_log_ratio: networks that differ by `change`, noise from seeds."""
    generator = torch.Generator().manual_seed(seed)
    cond, uncond, old, ref = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4))
    eps = guided_eps(cond.to(eps_dtype or dtype), uncond.to(eps_dtype or dtype), W, impl="ref").to(dtype)
    seeds = torch.randint(-(2**62), 2**62, shape[:1], generator=generator)
    steps = torch.randint(0, 2**33, shape[:1], generator=generator)
    scale = torch.rand(shape[:1], generator=generator, dtype=dtype) + 0.5
    call = dict(eps_cond=cond.to(eps_dtype or dtype), eps_uncond=uncond.to(eps_dtype or dtype), eps_old=eps + change * old,
                eps_ref=eps + change * ref, seeds=seeds, steps=steps, scale=scale)
    return {name: value.to(device) for name, value in call.items()} | dict(guidance_scale=W)


def noise_of(call, impl=None):
    """The z that the seeds stand for."""
    shape = call["eps_cond"].shape
    return torch.stack([philox_normal(call["seeds"][b:b + 1], int(call["steps"][b]), shape[1:], impl)[0] for b in range(shape[0])])


def double(call):
    return {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value for name, value in call.items()}


def with_noise(call, noise):
    return call | dict(noise=noise, seeds=None, steps=None)


# ---- what it computes ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("impl", ["native", "ref"])
def test_is_the_ratio_of_normal_densities_and_their_divergence(impl):
    """The chain itself: y' = a f(y) + b z with f = y - rho sqrt(lam) eps, densities by torch.distributions."""
    call = inputs(4, 3, 5, dtype=torch.float64)
    a, b, rho, sqrt_lam = (torch.rand(4, dtype=torch.float64)[:, None, None] + 0.5 for _ in range(4))
    y = torch.randn(4, 3, 5, dtype=torch.float64)
    eps = call["eps_uncond"] + W * (call["eps_cond"] - call["eps_uncond"])
    new, old, ref = (torch.distributions.Normal(a * (y - rho * sqrt_lam * e), b) for e in (eps, call["eps_old"], call["eps_ref"]))
    next_y = old.mean + b * noise_of(call, impl).double()
    call["scale"] = (a * rho * sqrt_lam / b).flatten()
    log_ratio, kl = transition_log_ratio(**call, impl=impl)
    torch.testing.assert_close(log_ratio, (new.log_prob(next_y) - old.log_prob(next_y)).sum((1, 2)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(new, ref).sum((1, 2)), rtol=1e-10, atol=0)


def test_expected_ratio_is_one():
    count = 50_000
    call = inputs(count, 4, change=0.15)
    ratio = transition_log_ratio(**call)[0].double().exp()
    assert ratio.std() > 0.3
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(count)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["native", "ref"])
@pytest.mark.parametrize("eps_dtype", EPS_DTYPES)
@pytest.mark.parametrize("guided", [True, False])
def test_equal_networks_have_ratio_one_exactly_and_a_finite_gradient(eps_dtype, guided, impl, device):
    call = inputs(3, 2, 777, eps_dtype=eps_dtype, device=device)
    call["eps_uncond"] = call["eps_uncond"] if guided else None
    call["eps_old"] = call["eps_ref"] = guided_eps(call["eps_cond"], call["eps_uncond"], W, impl=impl)
    leaf = call["eps_cond"].requires_grad_()
    log_ratio, kl = transition_log_ratio(**call, impl=impl)
    assert log_ratio.tolist() == kl.tolist() == [0.0] * 3
    log_ratio.exp().sum().backward()  # the policy gradient: -c w z
    factor = call["scale"].double() * (W if guided else 1)
    expected = -factor[:, None, None] * noise_of(call).double()
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-2 if eps_dtype.itemsize == 2 else 1e-5, atol=1e-5)


def test_guided_eps():
    call = inputs(2, 3, 9)
    eps = guided_eps(call["eps_cond"], call["eps_uncond"], W)
    torch.testing.assert_close(eps, call["eps_uncond"] + W * (call["eps_cond"] - call["eps_uncond"]))
    half = guided_eps(call["eps_cond"].bfloat16(), None, W)
    assert half.dtype == torch.float32 and torch.equal(half, call["eps_cond"].bfloat16().float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps_dtype", EPS_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_sizes_equal_reference(shape, eps_dtype, device):
    call = inputs(*shape, eps_dtype=eps_dtype, dtype=torch.float64 if eps_dtype == torch.float64 else torch.float32, device=device)
    ours = transition_log_ratio(**call, impl="native")
    exact = transition_log_ratio(**double(with_noise(call, noise_of(call))), impl="ref")
    for result, reference in zip(ours, exact):
        assert result.dtype == call["eps_old"].dtype and result.shape == shape[:1]
        torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_twice_that_of_plain_torch(eps_dtype):
    """Of the two results and of the gradients, over images, and of the gradients over elements."""
    call = inputs(64, 4, 33, 31, eps_dtype=eps_dtype)
    call = with_noise(call, noise_of(call))
    results = {}
    for name, arguments, impl in (("ours", call, "native"), ("plain", call, "ref"), ("exact", double(call), "ref")):
        leaves = [arguments[key].detach().clone().requires_grad_() for key in ("eps_cond", "eps_uncond")]
        log_ratio, kl = transition_log_ratio(**arguments | dict(eps_cond=leaves[0], eps_uncond=leaves[1]), impl=impl)
        (log_ratio - 0.3 * kl).sum().backward()
        results[name] = [t.detach().double() for t in (log_ratio, kl, *(leaf.grad for leaf in leaves))]
    for ours, plain, exact in zip(*(results[name] for name in ("ours", "plain", "exact"))):
        error, allowed = (ours - exact).abs(), (plain - exact).abs()
        assert error.max() <= 2 * allowed.max() and error.mean() <= 2 * allowed.mean()


# ---- the same bits everywhere ----------------------------------------------------------------------------------------------

def results_and_gradients(call):
    leaves = [call[name].detach().clone().requires_grad_() for name in ("eps_cond", "eps_uncond")]
    results = transition_log_ratio(**call | dict(eps_cond=leaves[0], eps_uncond=leaves[1]), impl="native")
    (results[0] * 0.7 + results[1]).sum().backward()
    return [t.detach() for t in (*results, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps_dtype", [torch.float32, torch.bfloat16])
def test_images_do_not_depend_on_their_batch(eps_dtype, device):
    call = inputs(7, 3, 1001, eps_dtype=eps_dtype, device=device)
    whole = results_and_gradients(call)

    def pick(index):
        return {name: value[index] if torch.is_tensor(value) else value for name, value in call.items()}

    permutation = torch.tensor([4, 2, 6, 0, 1, 5, 3], device=device)
    for index in ([i] for i in range(7)), [permutation], [slice(2, 5)]:
        for chosen in index:
            for part, all_of_them in zip(results_and_gradients(pick(chosen)), whole):
                assert torch.equal(part, all_of_them[chosen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 13, 1003), (40, 17)])
def test_bits_do_not_depend_on_threads_or_instruction_set(shape, dtype, restore_cpu):
    call, results = inputs(*shape, dtype=dtype), []
    for isa, threads in itertools.product(_C.build_info()["cpu_isas"], (1, 2)):
        _C.use_cpu_isa(isa)
        torch.set_num_threads(threads)
        results.append(results_and_gradients(call))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


def test_gradients_are_rounded_to_nearest_even():
    """Every rounding that the kernels do of their own, on values of all sizes, infinities and NaN among them."""
    bits = torch.cat([torch.arange(-(2**31), 2**31 - 1, 4099), torch.tensor([0x7F800000, -0x800000, 0x477FF000, 0x477FEFFF, 0x33000000])])
    values = bits.to(torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        grad = torch.ops.proxt2i.transition_log_ratio_backward(  # d log_ratio / d eps = -z here
            torch.ones(1), torch.zeros(1), torch.zeros(1, len(values), dtype=dtype), None, torch.zeros(1, len(values)), None,
            -values[None], None, None, torch.ones(1), 1.0)[0][0]
        torch.testing.assert_close(grad, values.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- arguments -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("impl", ["native", "ref"])
def test_empty_shapes(shape, impl):
    call = inputs(*shape)
    leaf = call["eps_cond"].requires_grad_()
    log_ratio, kl = transition_log_ratio(**call, impl=impl)
    assert log_ratio.tolist() == kl.tolist() == [0.0] * shape[0]
    log_ratio.sum().backward()
    assert leaf.grad.shape == guided_eps(call["eps_cond"], call["eps_uncond"], W, impl=impl).shape == shape


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_and_misaligned_inputs_are_left_alone(device):
    call = inputs(4, 6, 8, 10, device=device)
    expected = results_and_gradients(call)
    strided = call | dict(
        eps_cond=torch.empty(4 * 480 + 1, device=device)[1:].view(4, 6, 8, 10).copy_(call["eps_cond"]),
        eps_uncond=call["eps_uncond"].to(memory_format=torch.channels_last),
        eps_old=call["eps_old"].transpose(1, 3).contiguous().transpose(1, 3), eps_ref=call["eps_ref"].flip(0).contiguous().flip(0),
        seeds=call["seeds"].repeat_interleave(2)[::2], steps=call["steps"].repeat_interleave(3)[::3],
        scale=call["scale"].repeat_interleave(2)[::2])
    before = {name: value.clone() for name, value in strided.items() if torch.is_tensor(value)}
    for ours, theirs in zip(results_and_gradients(strided), expected):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(strided[name], value) for name, value in before.items())


def test_dtypes_that_kernels_do_not_take_are_widened():
    call = inputs(2, 3, 8)
    wide = transition_log_ratio(**call | dict(eps_old=call["eps_old"].double()))
    assert wide[0].dtype == torch.float64
    mixed = transition_log_ratio(**call | dict(eps_uncond=call["eps_uncond"].bfloat16(), scale=call["scale"].double()))
    assert mixed[0].dtype == torch.float32
    half = call["eps_old"].half()
    assert torch.equal(transition_log_ratio(**call | dict(eps_old=half))[0],
                       transition_log_ratio(**call | dict(eps_old=half.float()))[0])


def test_without_reference_network_kl_is_zero():
    call = inputs(2, 3, 8)
    log_ratio, kl = transition_log_ratio(**call | dict(eps_ref=None))
    assert torch.equal(log_ratio, transition_log_ratio(**call)[0]) and kl.tolist() == [0.0, 0.0]


def test_wrong_inputs_are_refused_before_work():
    call = inputs(2, 3, 4)
    cases = [
        (dict(eps_cond=call["eps_cond"].long()), "eps_cond must be float32"),
        (dict(eps_cond=torch.tensor(1.0)), "shape"),
        (dict(eps_uncond=call["eps_uncond"][:1]), "eps_uncond must have the shape of eps_cond"),
        (dict(eps_old=call["eps_old"][..., :2]), "eps_old must have the shape of eps_cond"),
        (dict(eps_ref=call["eps_ref"].to("meta")), "eps_ref is on meta"),
        (dict(noise=call["eps_old"][0]), "noise must have the shape"),
        (dict(seeds=None), "noise, or both seeds and steps"),
        (dict(steps=None), "noise, or both seeds and steps"),
        (dict(seeds=call["seeds"].int()), "seeds must be int64"),
        (dict(steps=call["steps"][:1]), "steps must be int64"),
        (dict(scale=call["scale"][:1]), "scale must be float32 or float64"),
        (dict(scale=call["scale"].half()), "scale must be float32 or float64"),
        (dict(impl="fast"), "impl must be"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            transition_log_ratio(**call | change)
    with pytest.raises(ValueError, match="eps_uncond must have the shape"):
        guided_eps(call["eps_cond"], call["eps_uncond"][:1], W)
    raw = tuple(call[n] for n in ("eps_cond", "eps_uncond", "eps_old", "eps_ref")) + (None,) + tuple(
        call[n] for n in ("seeds", "steps", "scale", "guidance_scale"))
    for position, bad in ((1, call["eps_uncond"].half()), (2, call["eps_old"][:1]), (3, call["eps_ref"].double()), (5, None),
                          (6, call["steps"].int()), (7, call["scale"][:1])):  # the op itself, called past the Python face
        with pytest.raises(RuntimeError, match="proxt2i: "):
            OPS.transition_log_ratio(*raw[:position], bad, *raw[position + 1:])


# ---- torch integration -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guided, source", [(True, "seeds"), (True, "noise"), (False, "seeds")])
def test_opcheck(guided, source, device):
    call = inputs(3, 2, 5, device=device)
    cond, uncond = call["eps_cond"], call["eps_uncond"] if guided else None
    drawn = (None, call["seeds"], call["steps"]) if source == "seeds" else (torch.randn(3, 2, 5, device=device), None, None)
    rest = (call["eps_old"], call["eps_ref"] if guided else None, *drawn, call["scale"], W)
    grads = torch.ones(3, device=device), torch.ones(3, device=device)
    torch.library.opcheck(OPS.transition_log_ratio_backward.default, (*grads, cond, uncond, *rest))
    cond.requires_grad_()
    if guided:
        uncond.requires_grad_()
        torch.library.opcheck(OPS.guided_eps.default, (cond, uncond, W))
    torch.library.opcheck(OPS.transition_log_ratio.default, (cond, uncond, *rest))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("impl", ["native", "ref"])
def test_gradcheck(guided, impl):
    call = inputs(2, 3, 2, dtype=torch.float64, change=0.5)
    leaves = [call[name].requires_grad_() for name in ("eps_cond", "eps_uncond")[:1 + guided]]
    for change in (dict(), dict(eps_ref=None), with_noise(dict(), noise_of(call).double())):
        def results(cond, uncond=None):
            return transition_log_ratio(**call | dict(eps_cond=cond, eps_uncond=uncond) | change, impl=impl)
        assert torch.autograd.gradcheck(results, leaves)
    if guided:
        assert torch.autograd.gradcheck(lambda cond, uncond: guided_eps(cond, uncond, W, impl=impl), leaves)


@pytest.mark.parametrize("impl", ["native", "ref"])
def test_gradient_flows_to_the_network_alone(impl):
    call = inputs(2, 3, 8)
    for name in ("eps_cond", "eps_old", "eps_ref", "scale"):
        call[name].requires_grad_()
    sum(transition_log_ratio(**call, impl=impl)).sum().backward()
    assert call["eps_cond"].grad is not None
    assert all(call[name].grad is None for name in ("eps_old", "eps_ref", "scale"))


def test_second_derivative_is_an_error():
    call = inputs(2, 3, dtype=torch.float64)
    leaf = call["eps_cond"].requires_grad_()
    gradient, = torch.autograd.grad(transition_log_ratio(**call)[0].sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_compiles_into_one_graph():
    call = inputs(2, 3, 8)
    tensors = [call.pop(name) for name in ("eps_cond", "eps_uncond", "eps_old")]

    def ratio(cond, uncond, old):
        return transition_log_ratio(cond * 2, uncond, old, **call)[0].exp()

    compiled = torch.compile(ratio, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), ratio(*tensors))
