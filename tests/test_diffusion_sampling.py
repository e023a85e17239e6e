"""The samplers on Gaussian data, where the network, the prox and the result are known exactly."""

import math

import pytest
import torch

from proxt2i import ops
from proxt2i.diffusion import (
    PLANS, SCORE_SAMPLERS, VPSchedule, ddim, ddpm, eps_from_prox, euler_maruyama, euler_ode, guided, make_plan, prox_from_eps,
    proximal, sample, sample_score, score, score_plan, trajectory,
)

SCHEDULE = VPSchedule()


def marginal(mean, std, t):
    """Mean and variance of x_t for N(mean, std^2) data."""
    alpha = SCHEDULE.alpha(t)
    return alpha.sqrt() * mean, alpha * std**2 + SCHEDULE.one_minus_alpha(t)


def column(v, like):
    return v.reshape(-1, *[1] * (like.dim() - 1))


def prox_network(mean, std):
    """eps_fn of the exact prox f = (v y + lam m) / (v + lam)."""
    def eps_fn(y, t, lam, guidance_scale=1):
        m, v = (column(q, y) for q in marginal(mean, std, t))
        return column(lam.sqrt(), y) * (y - m) / (v + column(lam, y)), None
    return eps_fn


def score_network(mean, std):
    """eps_fn of the exact E[e | x_t]."""
    def eps_fn(x, t, lam, guidance_scale=1):
        assert (lam == 0).all()
        m, v = (column(q, x) for q in marginal(mean, std, t))
        return column(SCHEDULE.one_minus_alpha(t).sqrt(), x) * (x - m) / v, None
    return eps_fn


# W2 to N(mean, std^2) for 4, 6 and 10 steps, from an independent float64 implementation with exact affine propagation
W2_TABLE = {
    (1.0, 0.1): """
        euler_maruyama       5.732  1.402  0.640
        euler_ode            0.371  0.137  0.054
        ddpm                 0.090  0.083  0.073
        ddim                 0.090  0.083  0.072
        backward             -      -      0.068
        hybrid               0.086  0.079  0.067
        variance_preserving  0.080  0.075  0.064
        ode                  0.075  0.068  0.057""",
    (1.0, 0.5): """
        euler_maruyama       3.823  0.463  0.111
        euler_ode            0.135  0.047  0.031
        ddpm                 0.290  0.225  0.167
        ddim                 0.282  0.204  0.130
        backward             -      -      0.101
        hybrid               0.227  0.170  0.115
        variance_preserving  0.124  0.093  0.063
        ode                  0.117  0.096  0.073""",
    (0.0, 1.0): """
        euler_maruyama       0.610  0.190  0.089
        euler_ode            0.000  0.000  0.000
        ddpm                 0.449  0.359  0.259
        ddim                 0.390  0.272  0.171
        backward             -      -      0.064
        hybrid               0.296  0.237  0.165
        variance_preserving  0.000  0.000  0.000
        ode                  0.000  0.000  0.000""",
    (1.0, 2.0): """
        euler_maruyama       2.465  0.201  0.096
        euler_ode            0.443  0.256  0.141
        ddpm                 0.842  0.654  0.453
        ddim                 0.639  0.448  0.281
        backward             -      -      0.263
        hybrid               0.575  0.493  0.363
        variance_preserving  0.288  0.224  0.155
        ode                  0.334  0.286  0.220""",
}
CASES = [
    (data, *line.split()[:1], num_steps, float(value))
    for data, table in W2_TABLE.items()
    for line in table.strip().splitlines()
    for num_steps, value in zip((4, 6, 10), line.split()[1:])
    if value != "-"
]


@pytest.fixture
def unit_noises(monkeypatch):
    """Make draw number j of image j + 1 one and all others zero: a sampler affine in its noises then returns its own coefficients."""
    def basis(seeds, step, shape, **_):
        noise = torch.zeros(len(seeds), *shape)
        noise[step + 1] = 1
        return noise

    def step_with_basis(y, cond, uncond, row, *, seeds, want_next=True, **options):
        noise = basis(seeds, int(row[-1]), y.shape[1:]) if want_next else None
        return ops.prox_step(y, cond, uncond, row, noise=noise, want_next=want_next, **options)

    for module in (proximal, score):
        monkeypatch.setattr(module, "philox_normal", basis)
        monkeypatch.setattr(module, "prox_step", step_with_basis)


@pytest.mark.parametrize("data, name, num_steps, expected", CASES)
def test_w2_on_gaussians(unit_noises, data, name, num_steps, expected):
    seeds = range(num_steps + 2)  # image 0 without noise; then the start and one draw a step
    if name in PLANS:
        x = sample(prox_network(*data), make_plan(name, num_steps), (1,), seeds)
    else:
        x = sample_score(score_network(*data), score_plan(name, num_steps), (1,), seeds)
    mean = x[0].double()
    std = (x[1:].double() - mean).square().sum().sqrt()
    w2 = math.hypot(mean - data[0], std - data[1])
    assert w2 == pytest.approx(expected, abs=5.1e-4)
    if (data, name, num_steps) == ((0, 1), "hybrid", 4):
        assert std == pytest.approx(0.704, abs=5e-4)


@pytest.mark.parametrize("name, std", [("hybrid", 0.704), ("variance_preserving", 1.0), ("ode", 1.0)])
def test_standard_normal_in_four_steps(name, std):
    x = sample(prox_network(0, 1), make_plan(name, 4), (4, 128, 128), range(4))
    assert x.dtype == torch.float32 and x.shape == (4, 4, 128, 128)
    assert x.std().item() == pytest.approx(std, abs=0.006)  # 262,144 pixels: standard error 0.0014 at most
    assert x.mean().item() == pytest.approx(0, abs=0.01)


def test_variance_propagation_by_hand():
    variance = 1.0
    plan = make_plan("hybrid", 4)
    for lam, a, b in zip(plan.lam, plan.a, plan.b):
        variance = (a**2 * variance + b**2) / (1 + lam) ** 2
    assert math.sqrt(variance) == pytest.approx(0.704, abs=5e-4)


@pytest.mark.parametrize("name", SCORE_SAMPLERS)
def test_score_samplers_draw_real_noise(name):
    """With many steps every sampler reaches the data distribution."""
    function = {"euler_maruyama": euler_maruyama, "euler_ode": euler_ode, "ddim": ddim, "ddpm": ddpm}[name]
    x = function(score_network(1.0, 0.5), 100, (128, 128), [3, 4])
    assert x.mean().item() == pytest.approx(1, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.04)  # the exact bias at 100 steps is at most 11 percent of 0.5 (ddpm)


def nonlinear(y, t, lam, guidance_scale=1):
    """Any network whose images do not see each other."""
    return torch.sin(2 * y + column(t, y)) * column(lam, y).exp().rsqrt(), None


@pytest.mark.parametrize("name", PLANS)
def test_sample_is_the_written_recursion(name):
    plan, seeds, shape = make_plan(name, 11), torch.tensor([5, 2**40 + 1]), (3, 5)
    states = []
    result = sample(nonlinear, plan, shape, seeds, callback=lambda i, y, x: states.append((i, y.clone(), x.clone())))
    x, clean = ops.philox_normal(seeds, 0, shape), [0, 0]
    for i, (t, lam) in enumerate(zip(plan.t, plan.lam)):
        y = plan.a[i] * x + plan.b[i] * ops.philox_normal(seeds, i + 1, shape) + plan.m[i] * (clean[-1] - clean[-2])
        assert states[i][0] == i
        torch.testing.assert_close(states[i][1], y, rtol=1e-4, atol=1e-4)
        y = states[i][1]
        eps = nonlinear(y, torch.full((2,), t), torch.full((2,), lam))[0]
        torch.testing.assert_close(states[i][2], y + plan.rho[i] * (-(lam**0.5) * eps), rtol=1e-4, atol=1e-4)
        x = states[i][2]
        clean.append((y - (SCHEDULE.one_minus_alpha(t) + lam) / lam**0.5 * eps) / SCHEDULE.alpha(t) ** 0.5)
    assert torch.equal(result, states[-1][2]) and len(states) == 11


def test_ode_plan_draws_only_the_start(monkeypatch):
    draws = []

    def counting(seeds, step, shape, **options):
        draws.append(step)
        return ops.philox_normal(seeds, step, shape, **options)

    def counting_step(y, cond, uncond, row, *, want_next, **options):
        b, draw = float(row[3]), int(row[-1])
        draws.extend([draw] * (want_next and b != 0))
        return ops.prox_step(y, cond, uncond, row, want_next=want_next, **options)

    monkeypatch.setattr(proximal, "philox_normal", counting)
    monkeypatch.setattr(proximal, "prox_step", counting_step)
    sample(nonlinear, make_plan("ode", 6), (4,), [1])
    assert draws == [0]
    sample(nonlinear, make_plan("hybrid", 6), (4,), [1])
    assert draws == [0, *range(7)]


@pytest.mark.parametrize("run", [
    lambda seeds: sample(nonlinear, make_plan("hybrid", 5), (2, 7), seeds),
    lambda seeds: ddpm(nonlinear, 5, (2, 7), seeds),
])
def test_an_image_does_not_depend_on_its_batch(run):
    together = run([11, 7, 2**62, 0])
    assert torch.equal(run([7]), together[1:2])
    assert torch.equal(run(torch.tensor([0, 2**62])), together[[3, 2]])
    assert not torch.equal(together[0], together[1])


def test_same_seed_starts_both_samplers_alike():
    starts = []
    sample_score(nonlinear, score_plan("ddim", 4), (6,), [9], callback=lambda i, x, _: starts.append(x))
    sample(nonlinear, make_plan("ode", 4), (6,), [9], callback=lambda i, y, _: starts.append(y / make_plan("ode", 4).a[0]))
    torch.testing.assert_close(starts[0], starts[4])


def test_seeds_and_guidance_mismatches_are_refused():
    plan = make_plan("hybrid", 4)
    for seeds in ([0.5], torch.zeros(2, 2, dtype=torch.int64), 3, [True]):
        with pytest.raises(ValueError, match="seeds"):
            sample(nonlinear, plan, (2,), seeds)
    with pytest.raises(ValueError, match="no unconditional eps for guidance_scale=3"):
        sample(nonlinear, plan, (2,), [1], guidance_scale=3)
    with pytest.raises(ValueError, match="an unconditional eps for guidance_scale=1"):
        sample(lambda y, t, lam, scale: (y, y), plan, (2,), [1])


def test_trajectory_keeps_gradients():
    gain = torch.tensor(0.3, requires_grad=True)
    for _, _, x in trajectory(lambda y, t, lam, scale: (gain * y, None), make_plan("hybrid", 4), (3,), [1, 2]):
        pass
    x.sum().backward()
    with torch.no_grad():
        values = []
        for nudged in (gain - 1e-2, gain + 1e-2):
            values.append(sample(lambda y, t, lam, scale: (nudged * y, None), make_plan("hybrid", 4), (3,), [1, 2]).sum())
    assert gain.grad == pytest.approx((values[1] - values[0]).item() / 2e-2, rel=2e-2)
    assert not sample(lambda y, t, lam, scale: (gain * y, None), make_plan("hybrid", 4), (3,), [1]).requires_grad


class TextModel:
    """A network whose eps depends on y, t, lam and both texts of its own image; records its calls."""

    def __init__(self):
        self.batches, self.texts = [], []

    def __call__(self, y, t, lam, text):
        self.batches.append(len(y))
        self.texts.append(text)
        condition = text[0].mean((1, 2)) + 2 * text[1].mean((1, 2))
        return torch.tanh(y * column(condition, y)) + column(t + lam, y)


def random_texts(batch):
    g = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, length, dims, generator=g) for length, dims in ((5, 8), (3, 4))]


@pytest.mark.parametrize("null_batch", [1, 3])
def test_guided_batches_both_branches(null_batch):
    text, null = random_texts(3), [v[:1].expand(null_batch, -1, -1) for v in random_texts(7)]
    y, t, lam = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), torch.rand(3), torch.rand(3)
    model = TextModel()
    eps_cond, eps_uncond = guided(model, text, null)(y, t, lam, 2.5)
    assert model.batches == [6]
    assert torch.equal(eps_cond, model(y, t, lam, text))
    assert torch.equal(eps_uncond, model(y, t, lam, [v[:1].expand(3, -1, -1) for v in null]))


def test_guided_skips_the_branch_without_weight():
    text, null = random_texts(2), random_texts(1)
    model, plan = TextModel(), make_plan("hybrid", 4)
    conditional = sample(guided(model, text), plan, (3,), [1, 2])
    assert model.batches == [2] * 4 and all(t is text for t in model.texts)
    nothing = sample(guided(model, text, null), plan, (3,), [1, 2], guidance_scale=0)
    assert model.batches == [2] * 8
    torch.testing.assert_close(nothing, sample(lambda *v: (model(*v[:3], [n.expand(2, -1, -1) for n in null]), None), plan, (3,), [1, 2]))
    for scale, limit in ((1.0001, conditional), (0.0001, nothing)):
        near = sample(guided(model, text, null), plan, (3,), [1, 2], guidance_scale=scale)
        torch.testing.assert_close(near, limit, rtol=0, atol=0.02)
    assert (conditional - nothing).abs().max() > 0.1
    with pytest.raises(ValueError, match="null_text"):
        sample(guided(model, text), plan, (3,), [1, 2], guidance_scale=2)


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
def test_guidance_is_exact_for_gaussians_of_equal_variance(scale):
    """The prox of p_0^(1-w) p_c^w is the prox of the Gaussian with mean m_0 + w (m_c - m_0)."""
    cond, uncond = prox_network(1.0, 0.7), prox_network(-0.5, 0.7)
    plan = make_plan("hybrid", 6)
    x = sample(lambda *v: (cond(*v)[0], uncond(*v)[0]), plan, (8,), [1, 2], guidance_scale=scale)
    torch.testing.assert_close(x, sample(prox_network(-0.5 + scale * 1.5, 0.7), plan, (8,), [1, 2]), rtol=1e-4, atol=1e-4)


def test_score_networks_serve_the_proximal_sampler_and_back():
    plan = make_plan("hybrid", 6)
    x = sample(prox_from_eps(score_network(0.4, 0.8)), plan, (16,), [3])
    torch.testing.assert_close(x, sample(prox_network(0.4, 0.8), plan, (16,), [3]), rtol=1e-3, atol=1e-4)
    x = ddpm(eps_from_prox(prox_network(0.4, 0.8)), 8, (16,), [3])
    torch.testing.assert_close(x, ddpm(score_network(0.4, 0.8), 8, (16,), [3]), rtol=1e-3, atol=1e-4)


def test_noise_of_the_score_samplers():
    for name in ("euler_maruyama", "ddpm"):
        *noisy, last = score_plan(name, 6).b
        assert min(noisy) > 0 and last == 0
    for name in ("euler_ode", "ddim"):
        assert score_plan(name, 6).b == (0,) * 6


def test_score_plans_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="did you mean 'ddim'.*valid: euler_maruyama, euler_ode, ddim, ddpm"):
        score_plan("dim", 4)
    with pytest.raises(ValueError, match="at least 2"):
        score_plan("euler_ode", 1)
    with pytest.raises(ValueError, match="own grid"):
        score_plan("euler_maruyama", 4, grid=lambda u: u * u)
    with pytest.raises(ValueError, match="num_steps"):
        score_plan("ddim", 0)
