"""Training pairs and the proximal matching loss: the fused operators against proxt2i.diffusion.matching and their own reference."""

import itertools
import math

import pytest
import torch
from op_cases import DEVICES, EPS_DTYPES, OPS, SHAPES, restore_cpu, same_numbers_in_every_run  # noqa: F401  (fixtures)

from proxt2i import _C
from proxt2i.diffusion import VPSchedule, expected_noise, noised, pair_coefficients, proximal_matching_loss, sample_mse
from proxt2i.ops import noised_pair, philox_normal, prox_matching_loss

TARGETS, KINDS = ("expected", "noise", "diffusion_noise"), ("prox", "l1", "l2")


pytestmark = pytest.mark.usefixtures("same_numbers_in_every_run")


def pair(*shape, dtype=torch.float32, device="cpu", seed=0):
    """x0, seeds, t, lam; t = 0 and lam = 0 (a score network's) among them where there is room."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=generator, dtype=dtype)
    seeds = torch.randint(-(2**62), 2**62, shape[:1], generator=generator)
    t, lam = (torch.rand(shape[:1], generator=generator, dtype=dtype) for _ in range(2))
    t[1:2], lam[2:3] = 0, 0
    return tuple(value.to(device) for value in (x0, seeds, t, lam))


def loss_inputs(*shape, dtype=torch.float32, eps_dtype=None, device="cpu", seed=0):
    """Positional arguments of prox_matching_loss."""
    x0, seeds, t, lam = pair(*shape, dtype=dtype, device=device, seed=seed)
    coefficients = pair_coefficients(t, lam)
    y = noised_pair(x0, seeds, coefficients, impl="ref")
    generator = torch.Generator().manual_seed(seed + 1)
    eps = 0.7 * torch.randn(shape, generator=generator, dtype=dtype).to(device)
    return eps.to(eps_dtype or dtype), x0, y, seeds, coefficients


def plain_target(x0, y, seeds, t, lam, target, impl):
    if target == "expected":
        return expected_noise(x0, y, t, lam)
    return philox_normal(seeds, ("diffusion_noise", "noise").index(target), x0.shape[1:], impl).to(x0.dtype)


# ---- what they compute -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("impl", ["native", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_are_those_of_the_plain_functions(dtype, impl):
    x0, seeds, t, lam = pair(6, 3, 4, 5, dtype=dtype)
    schedule = VPSchedule(0.2, 15.0)
    e, n = (philox_normal(seeds, draw, x0.shape[1:], impl).to(dtype) for draw in (0, 1))
    y = noised_pair(x0, seeds, pair_coefficients(t, lam, schedule), impl=impl)
    torch.testing.assert_close(y, noised(x0, t, lam, e, n, schedule))


@pytest.mark.parametrize("impl", ["native", "ref"])
@pytest.mark.parametrize("target, kind", itertools.product(TARGETS, KINDS))
def test_losses_are_those_of_the_plain_functions(target, kind, impl):
    x0, seeds, t, lam = pair(5, 3, 4, 5, dtype=torch.float64)
    lam = lam + 0.1
    coefficients = pair_coefficients(t, lam)
    y = noised_pair(x0, seeds, coefficients)
    eps, weight = torch.randn_like(x0).requires_grad_(), torch.rand(5, dtype=torch.float64)
    n = plain_target(x0, y, seeds, t, lam, target, impl)
    plain = weight * proximal_matching_loss(eps, n, 0.8, kind)
    loss, mse = prox_matching_loss(eps, x0, y, seeds, coefficients, target=target, zeta=0.8, kind=kind, weight=weight, impl=impl)
    torch.testing.assert_close(loss, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mse, sample_mse(eps, n), rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value.sum(), eps)[0] for value in (loss, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["native", "ref"])
def test_score_training_is_a_pair_without_prox_noise(impl):
    x0, seeds, t, _ = pair(4, 2, 6)
    coefficients = pair_coefficients(t, torch.zeros_like(t))
    y = noised_pair(x0, seeds, coefficients, impl=impl)
    e = philox_normal(seeds, 0, (2, 6))
    torch.testing.assert_close(y, coefficients[:, 0, None, None] * x0 + coefficients[:, 1, None, None] * e)
    loss, mse = prox_matching_loss(e, None, None, seeds, coefficients, target="diffusion_noise", kind="l2", impl=impl)
    torch.testing.assert_close(loss, torch.zeros(4), atol=1e-12, rtol=0)
    assert torch.equal(loss, mse)


def test_small_losses_keep_their_digits():
    x0, seeds, t, lam = pair(2, 4096)
    n = philox_normal(seeds, 1, (4096,))
    loss, _ = prox_matching_loss(n + 1e-5, None, None, seeds, pair_coefficients(t, lam), target="noise")
    assert loss.tolist() == pytest.approx([1e-10] * 2, rel=0.05)  # 1 - exp(-1e-10) would be 0 in float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps_dtype", EPS_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_sizes_equal_reference(shape, eps_dtype, device):
    dtype = torch.float64 if eps_dtype == torch.float64 else torch.float32
    args = loss_inputs(*shape, dtype=dtype, eps_dtype=eps_dtype, device=device)
    eps, x0, y, seeds, coefficients = args
    torch.testing.assert_close(noised_pair(x0, seeds, coefficients, impl="native"), y, rtol=2e-6, atol=2e-6)
    for target in TARGETS:
        keep = coefficients[:, 1:].square().sum(1) > 0  # with neither noise, as nothing draws it, 0 / 0
        ours, reference = (prox_matching_loss(*args, target=target, kind="l1", impl=impl) for impl in ("native", "ref"))
        for result, exact in zip(ours, reference):
            assert result.dtype == dtype and result.shape == shape[:1]
            torch.testing.assert_close(result[keep], exact[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_error_at_most_twice_that_of_plain_torch(target, eps_dtype):
    x0, seeds, t, lam = pair(64, 4, 33, 31)
    lam = lam + 0.1
    coefficients = pair_coefficients(t, lam)
    e, n = (philox_normal(seeds, draw, x0.shape[1:]) for draw in (0, 1))
    wide = [v.double() for v in (x0, *coefficients.T)]
    columns = [c[:, None, None, None] for c in wide[1:]]
    exact_y = columns[0] * wide[0] + columns[1] * e.double() + columns[2] * n.double()
    plain_y = noised(x0, t, lam, e, n)
    y = noised_pair(x0, seeds, coefficients, impl="native")
    check_errors(y, plain_y, exact_y)
    exact_target = {"expected": columns[2] / (columns[1]**2 + columns[2]**2) * (y.double() - columns[0] * wide[0]),
                    "noise": n.double(), "diffusion_noise": e.double()}[target]
    plain_target = expected_noise(x0, y, t, lam) if target == "expected" else exact_target.float()
    base = (exact_target + 0.5 * torch.randn(x0.shape)).to(eps_dtype)
    results = []
    for which in ("ours", "plain", "exact"):
        eps = base.detach().clone().requires_grad_()
        if which == "ours":
            loss, mse = prox_matching_loss(eps, x0, y, seeds, coefficients, target=target, zeta=0.8, impl="native")
        else:
            wanted = plain_target if which == "plain" else exact_target
            answer = eps if which == "plain" else eps.double()
            loss, mse = proximal_matching_loss(answer, wanted, 0.8), sample_mse(answer, wanted)
        loss.sum().backward()
        results.append((loss.detach(), mse.detach(), eps.grad if which != "exact" else None))
    exact_loss, exact_mse, _ = results[2]
    factor = 2 / base[0].numel() * torch.exp(-exact_mse / 0.8**2) / 0.8**2
    exact_grad = factor[:, None, None, None] * (base.double() - exact_target)
    for ours, plain, exact in zip(results[0], results[1], (exact_loss, exact_mse, exact_grad)):
        check_errors(ours, plain, exact)


def check_errors(ours, plain, exact):
    error, allowed = (ours.double() - exact).abs(), (plain.double() - exact).abs()
    assert error.max() <= 2 * allowed.max() and error.mean() <= 2 * allowed.mean()


# ---- the same bits everywhere ----------------------------------------------------------------------------------------------

def results_and_gradient(args, target):
    eps = args[0].detach().clone().requires_grad_()
    loss, mse = prox_matching_loss(eps, *args[1:], target=target, zeta=0.9, impl="native")
    loss.sum().backward()
    return [noised_pair(args[1], args[3], args[4], impl="native"), loss.detach(), mse.detach(), eps.grad]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_images_do_not_depend_on_their_batch(target, eps_dtype, device):
    args = loss_inputs(7, 3, 1001, eps_dtype=eps_dtype, device=device)
    whole = results_and_gradient(args, target)
    for chosen in ([0], [1], [6], [4, 2, 6, 0, 1, 5, 3], [2, 3, 4]):
        part = results_and_gradient([value[chosen] for value in args], target)
        assert all(torch.equal(a, b[chosen]) for a, b in zip(part, whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 13, 1003), (40, 17)])
def test_bits_do_not_depend_on_threads_or_instruction_set(shape, dtype, restore_cpu):
    args = loss_inputs(*shape, dtype=dtype)
    for target in TARGETS:
        results = []
        for isa, threads in itertools.product(_C.build_info()["cpu_isas"], (1, 2)):
            _C.use_cpu_isa(isa)
            torch.set_num_threads(threads)
            results.append(results_and_gradient(args, target))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


# ---- arguments -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("impl", ["native", "ref"])
def test_empty_shapes(shape, impl):
    x0, seeds, t, lam = pair(*shape)
    coefficients = pair_coefficients(t, lam)
    y = noised_pair(x0, seeds, coefficients, impl=impl)
    eps = torch.zeros_like(x0, requires_grad=True)
    loss, mse = prox_matching_loss(eps, x0, y, seeds, coefficients, target="expected", impl=impl)
    assert y.shape == shape and loss.shape == mse.shape == shape[:1]
    assert torch.isnan(mse).all()  # a mean of nothing, if there are images at all
    loss.sum().backward()
    assert eps.grad.shape == shape


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_and_misaligned_inputs_are_left_alone(device):
    eps, x0, y, seeds, coefficients = loss_inputs(4, 6, 8, 10, device=device)
    expected = results_and_gradient((eps, x0, y, seeds, coefficients), "expected")
    strided = (eps.to(memory_format=torch.channels_last), x0.transpose(1, 3).contiguous().transpose(1, 3),
               torch.empty(4 * 480 + 1, device=device)[1:].view(4, 6, 8, 10).copy_(y), seeds.repeat_interleave(2)[::2],
               coefficients.T.contiguous().T)
    before = [value.clone() for value in strided]
    for ours, theirs in zip(results_and_gradient(strided, "expected"), expected):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(strided, before))


def test_dtypes_that_kernels_do_not_take_are_widened():
    eps, x0, y, seeds, coefficients = loss_inputs(3, 4, 5)
    loss, _ = prox_matching_loss(eps.bfloat16(), x0, y.double(), seeds, coefficients, target="expected")
    assert loss.dtype == torch.float64
    assert noised_pair(x0.half(), seeds, coefficients.double()).dtype == torch.float32


def test_wrong_inputs_are_refused_before_work():
    eps, x0, y, seeds, coefficients = loss_inputs(2, 3, 4)
    call = dict(eps=eps, x0=x0, y=y, seeds=seeds, coefficients=coefficients, target="expected")
    cases = [
        (dict(eps=eps.long()), "eps must be float32"),
        (dict(eps=torch.tensor(1.0)), "shape"),
        (dict(x0=x0[:1]), "x0 must have the shape of eps"),
        (dict(y=y.to("meta")), "y is on meta"),
        (dict(y=None), "needs x0 and y"),
        (dict(seeds=seeds.int()), "seeds must be int64"),
        (dict(coefficients=coefficients[:, :2]), "coefficients must be float32 or float64 with shape"),
        (dict(weight=torch.ones(3)), "weight must be"),
        (dict(target="score"), "unknown target 'score'"),
        (dict(kind="huber"), "unknown loss kind 'huber'"),
        (dict(zeta=0), "zeta"),
        (dict(zeta=math.nan), "zeta"),
        (dict(impl="fast"), "impl must be"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            prox_matching_loss(**call | change)
    for bad, message in ((dict(x0=x0.long()), "x0 must be"), (dict(seeds=seeds[:1]), "seeds must"),
                         (dict(coefficients=coefficients.T), "coefficients must")):
        with pytest.raises(ValueError, match=message):
            noised_pair(**dict(x0=x0, seeds=seeds, coefficients=coefficients) | bad)
    raw = eps, x0, y, seeds, coefficients
    for position, bad in ((0, eps.double()), (1, x0[:1]), (2, None), (3, seeds[:1]), (4, coefficients.double())):
        with pytest.raises(RuntimeError, match="proxt2i: "):  # the op itself, called past the Python face
            OPS.matching_errors(*raw[:position], bad, *raw[position + 1:], None)
    with pytest.raises(RuntimeError, match="proxt2i: "):
        OPS.noised_pair(x0.half(), seeds, coefficients)


# ---- torch integration -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draw", [None, 1])
def test_opcheck(draw, device):
    eps, x0, y, seeds, coefficients = loss_inputs(3, 2, 5, device=device)
    x0, y = (x0, y) if draw is None else (None, None)
    grads = torch.ones(3, device=device), torch.ones(3, device=device)
    torch.library.opcheck(OPS.matching_errors_backward.default, (*grads, eps, x0, y, seeds, coefficients, draw))
    torch.library.opcheck(OPS.matching_errors.default, (eps.requires_grad_(), x0, y, seeds, coefficients, draw))
    if x0 is not None:
        torch.library.opcheck(OPS.noised_pair.default, (x0.requires_grad_(), seeds, coefficients))


@pytest.mark.parametrize("target, kind", itertools.product(TARGETS, KINDS))
@pytest.mark.parametrize("impl", ["native", "ref"])
def test_gradcheck(target, kind, impl):
    eps, *rest = loss_inputs(2, 3, 2, dtype=torch.float64)

    def results(eps, weight):
        return prox_matching_loss(eps, *rest, target=target, kind=kind, zeta=0.8, weight=weight, impl=impl)

    assert torch.autograd.gradcheck(results, [eps.requires_grad_(), torch.rand(2, dtype=torch.float64, requires_grad=True)])
    x0, _, seeds, coefficients = rest
    assert torch.autograd.gradcheck(lambda x0: noised_pair(x0, seeds, coefficients, impl=impl), [x0.requires_grad_()])


def test_second_derivative_is_an_error():
    eps, *rest = loss_inputs(2, 3, dtype=torch.float64)
    loss, _ = prox_matching_loss(eps.requires_grad_(), *rest, target="noise")
    gradient, = torch.autograd.grad(loss.sum(), eps, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_compiles_into_one_graph():
    eps, x0, _, seeds, coefficients = loss_inputs(2, 3, 8)

    def loss(eps, x0):
        y = noised_pair(x0, seeds, coefficients)
        return prox_matching_loss(eps * 2, x0, y, seeds, coefficients, target="expected")[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(eps, x0), loss(eps, x0))
