"""Training pairs, loss, and the equivalence with the score, against exact posteriors."""

import math

import pytest
import torch

from proxt2i.diffusion import (
    PairSampler, TimeSampler, VPSchedule, eps_from_prox, expected_noise, make_plan, noised, precondition, prox_from_eps,
    proximal_matching_loss, sample, sample_mse, score_loss,
)

SCHEDULE = VPSchedule()
STEP_COUNTS = (4, 5, 6, 8, 10, 20)


def normals(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- pairs ----------------------------------------------------------------------------------------


def grid_of_uniforms(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_every_pair_is_a_query_of_the_sampler_bit_for_bit():
    queries = {}

    def eps_fn(y, t, lam, guidance_scale):
        queries[t.item(), lam.item()] = f"N{num_steps}/k{num_steps - sum(name.startswith(f'N{num_steps}/') for name in queries.values())}"
        return torch.zeros_like(y), None

    for num_steps in STEP_COUNTS:
        sample(eps_fn, make_plan("hybrid", num_steps), (1,), [0])
    pairs = PairSampler()
    t, lam, bucket = pairs.draw(grid_of_uniforms(10_000))
    assert t.dtype == lam.dtype == torch.float32 and bucket.dtype == torch.int64
    drawn = {(a, b): pairs.bucket_names[i] for a, b, i in zip(t.tolist(), lam.tolist(), bucket.tolist())}
    assert drawn == queries and len(queries) == sum(STEP_COUNTS)


def test_table_and_names():
    pairs = PairSampler((4, 10))
    assert pairs.bucket_names[:4] == ["N4/k4", "N4/k3", "N4/k2", "N4/k1"] and pairs.bucket_names[-1] == "N10/k1"
    assert pairs.table[1] == (0.5, make_plan("hybrid", 4).lam[1], (4, 3))
    assert pairs.table[-1][:2] == pytest.approx((0, 0.1095), rel=1e-9)


@pytest.mark.parametrize("weights", [None, (1, 0, 3, 0.5)])
def test_frequencies(weights):
    counts = (4, 5, 8, 20)
    pairs, n = PairSampler(counts, weights=weights), 100_000
    frequency = torch.bincount(pairs.draw(grid_of_uniforms(n))[2], minlength=len(pairs.table)) / n
    share = dict(zip(counts, weights or (1, 1, 1, 1)))
    expected = [share[num_steps] / sum(share.values()) / num_steps for _, _, (num_steps, _) in pairs.table]
    torch.testing.assert_close(frequency.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2 / n)


def test_snr_power_prefers_pairs_that_show_x0():
    pairs = PairSampler((4, 10), snr_power=0.5)
    assert pairs.probabilities.sum() == pytest.approx(1)
    assert pairs.probabilities[:4].sum() == pytest.approx(0.5)  # step counts keep their share
    t, lam = (torch.tensor(column, dtype=torch.float64) for column in list(zip(*pairs.table))[:2])
    snr = SCHEDULE.alpha(t) / (1 - SCHEDULE.alpha(t) + lam)
    for rows in (slice(0, 4), slice(4, 14)):
        torch.testing.assert_close(pairs.probabilities[rows] / pairs.probabilities[rows][0], (snr[rows] / snr[rows][0]).sqrt())
    drawn = torch.bincount(pairs.draw(grid_of_uniforms(100_000))[2], minlength=14) / 100_000
    torch.testing.assert_close(drawn.double(), pairs.probabilities, atol=2e-5, rtol=0)


def test_draw_is_a_function_of_each_uniform_alone():
    pairs, u = PairSampler(), torch.rand(64, generator=torch.Generator().manual_seed(1))
    t, lam, bucket = pairs.draw(u)
    for i in (0, 13, 63):
        alone = pairs.draw(u[i:i + 1])
        assert (alone[0], alone[1], alone[2]) == (t[i], lam[i], bucket[i])
    assert pairs.draw(torch.tensor([0.0, 1 - 2**-24]))[2].tolist() == [0, len(pairs.table) - 1]
    assert PairSampler((4, 8), weights=(0, 1)).draw(torch.zeros(1))[2].item() == 4  # u = 0 skips rows without weight


def test_pairs_of_other_plans():
    pairs = PairSampler((10, 20), plan="backward")
    assert max(lam for _, lam, _ in pairs.table) == pytest.approx(38.2, abs=0.05)
    with pytest.raises(ValueError, match="smallest valid num_steps on this grid is 10"):
        PairSampler((4, 10), plan="backward")


@pytest.mark.parametrize("bad", [dict(step_counts=()), dict(step_counts=(4, 4)), dict(weights=(1, 2)), dict(weights=(0,) * 6),
                                 dict(weights=(1, 1, 1, 1, 1, -1)), dict(weights=(math.nan,) * 6)])
def test_bad_pair_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PairSampler(**bad)


def test_time_sampler():
    times = TimeSampler(10)
    t, lam, bucket = times.draw(torch.tensor([0.0, 0.0999, 0.1001, 0.55, 1 - 2**-24]))
    assert torch.equal(t, torch.tensor([0.0, 0.0999, 0.1001, 0.55, 1 - 2**-24])) and not lam.any()
    assert bucket.tolist() == [0, 0, 1, 5, 9]
    assert times.bucket_names[5] == "t0.50-0.60"


# ---- noising --------------------------------------------------------------------------------------


def test_noised_by_hand():
    x0, e, n = (normals(3, 2, 4, seed=s, dtype=torch.float64) for s in range(3))
    t, lam = torch.tensor([0.0, 0.3, 0.75], dtype=torch.float64), torch.tensor([0.647, 0.0, 4.378], dtype=torch.float64)
    y = noised(x0, t, lam, e, n)
    for i, (a, l) in enumerate([(1.0, 0.647), (math.exp(-0.03 - 9.95 * 0.09), 0.0), (math.exp(-0.075 - 9.95 * 0.5625), 4.378)]):
        torch.testing.assert_close(y[i], math.sqrt(a) * x0[i] + math.sqrt(1 - a) * e[i] + math.sqrt(l) * n[i])
    half = noised(x0.bfloat16(), t.float(), lam.float(), e.float(), n.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, y.float(), rtol=0, atol=0.02)


def test_irreducible_error_with_x0_known():
    """E[n | y, x0] leaves (1 - alpha) / (1 - alpha + lam): 0 at t = 0, .185, .227, .201 on the 4-step pairs."""
    t, lam, _ = PairSampler((4,)).draw(grid_of_uniforms(4))
    x0, e, n = (normals(4, 100_000, seed=s) for s in range(3))
    y = noised(x0, t, lam, e, n)
    alpha = SCHEDULE.alpha(t)
    best = (lam.sqrt() / (1 - alpha + lam))[:, None] * (y - alpha.sqrt()[:, None] * x0)
    floor = (1 - alpha) / (1 - alpha + lam)
    assert floor.tolist() == pytest.approx([0.185, 0.227, 0.201, 0], abs=6e-4)
    torch.testing.assert_close(sample_mse(best, n), floor, rtol=0.02, atol=1e-6)
    for other in (0.95, 1.05):
        assert (sample_mse(best * other, n) > sample_mse(best, n)).all()


# ---- the expected-noise target --------------------------------------------------------------------


@pytest.mark.parametrize("num_steps, k", [(4, 3), (8, 5), (20, 18)])
def test_expected_noise_is_the_regression_of_n_on_y_given_x0(num_steps, k):
    plan = make_plan("hybrid", num_steps)
    t, lam = (torch.full((400_000,), v[num_steps - k], dtype=torch.float64) for v in (plan.t, plan.lam))
    x0, e, n = (normals(400_000, seed=s, dtype=torch.float64) for s in (1, 2, 3))
    x0 = 0.5 + 2 * x0
    y = noised(x0, t, lam, e, n, SCHEDULE)
    target = expected_noise(x0, y, t, lam, SCHEDULE)
    floor = ((1 - SCHEDULE.alpha(t[0])) / (1 - SCHEDULE.alpha(t[0]) + lam[0])).item()
    assert (n - target).mean().abs() < 0.01  # unbiased,
    for known in (x0, y, y * x0, target):  # with nothing left that x0 and y explain
        assert ((n - target) * known).mean().abs() < 0.02 * known.std()
    assert (n - target).square().mean() == pytest.approx(floor, rel=0.01)  # what it removes is the floor


def test_expected_noise_at_t_zero_is_the_noise():
    x0, n = normals(8, 3, 4, 4, seed=1), normals(8, 3, 4, 4, seed=2)
    t, lam = torch.zeros(8), torch.linspace(0.1, 4, 8)
    y = noised(x0, t, lam, normals(8, 3, 4, 4, seed=3), n, SCHEDULE)
    torch.testing.assert_close(expected_noise(x0, y, t, lam, SCHEDULE), n, rtol=1e-4, atol=1e-5)


def test_both_targets_have_the_same_best_answer():
    """Gaussian data: the linear predictor of either target from y has the exact prox's slope, and the second less scatter."""
    plan, mean, var = make_plan("hybrid", 6), 0.7, 0.3
    t, lam = (torch.full((400_000,), v[3], dtype=torch.float64) for v in (plan.t, plan.lam))
    x0, e, n = (normals(400_000, seed=s, dtype=torch.float64) for s in (4, 5, 6))
    y = noised(mean + math.sqrt(var) * x0, t, lam, e, n, SCHEDULE)
    target = expected_noise(mean + math.sqrt(var) * x0, y, t, lam, SCHEDULE)
    alpha = SCHEDULE.alpha(t[0]).item()
    exact = math.sqrt(lam[0]) / (alpha * var + 1 - alpha + lam[0].item())

    def slope(z):
        return (((z - z.mean()) * (y - y.mean())).mean() / y.var()).item()

    assert slope(n) == pytest.approx(exact, rel=0.02) and slope(target) == pytest.approx(exact, rel=0.005)
    assert (target - exact * (y - y.mean())).var() < 0.2 * (n - exact * (y - y.mean())).var()


def test_exact_prox_of_a_gaussian_is_the_best_predictor_of_n():
    """Data N(m, s^2): eps = (y - f) / sqrt(lam) with f = (v y + lam m) / (v + lam) leaves mse v / (v + lam)."""
    mean, std = 0.7, 0.6
    pairs = PairSampler((4, 10))
    t, lam, _ = pairs.draw(grid_of_uniforms(28))
    x0 = mean + std * normals(28, 40_000, seed=5)
    e, n = normals(28, 40_000, seed=6), normals(28, 40_000, seed=7)
    y = noised(x0, t, lam, e, n)
    alpha = SCHEDULE.alpha(t)
    v, m = (alpha * std**2 + 1 - alpha)[:, None], (alpha.sqrt() * mean)[:, None]
    f = (v * y + lam[:, None] * m) / (v + lam[:, None])
    eps = (y - f) / lam.sqrt()[:, None]
    torch.testing.assert_close(sample_mse(eps, n), (v / (v + lam[:, None]))[:, 0], rtol=0.04, atol=0)
    assert ((n - eps) * (y - m)).mean(1).abs().max() < 0.04  # the residual is uncorrelated with the input


# ---- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeta", [0.5, 1.0, 2.0])
def test_loss_is_proximal_matching(zeta):
    eps, n = normals(6, 3, 8, 8, seed=1, dtype=torch.float64).requires_grad_(), normals(6, 3, 8, 8, seed=2, dtype=torch.float64)
    with torch.no_grad():
        eps.copy_(n + eps * torch.linspace(0.1, 1.5, 6, dtype=torch.float64)[:, None, None, None])
    mse = (eps - n).square().mean((1, 2, 3))
    loss = proximal_matching_loss(eps, n, zeta)
    torch.testing.assert_close(loss, 1 - torch.exp(-mse / zeta**2), rtol=1e-12, atol=0)
    gradient, = torch.autograd.grad(loss.sum(), eps)
    mse_gradient, = torch.autograd.grad(mse.sum(), eps)
    weight = torch.exp(-mse.detach() / zeta**2) / zeta**2
    torch.testing.assert_close(gradient, mse_gradient * weight[:, None, None, None], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, 2 / 192 * (eps - n).detach() * weight[:, None, None, None], rtol=1e-12, atol=0)


def test_zeta_moves_the_minimiser_from_mean_to_mode():
    """Two-point posterior +-1 with p = .7: mean .4, mode 1; d zeta^2 = 1 -> .98, 4 -> .63, 256 -> .403."""
    f = torch.linspace(-1.5, 1.5, 30_001, dtype=torch.float64)[:, None]
    for zeta, minimiser in ((1, 0.98), (2, 0.63), (16, 0.403)):
        right, left = (proximal_matching_loss(f, torch.full_like(f, v), zeta) for v in (1.0, -1.0))
        assert f[(0.7 * right + 0.3 * left).argmin()].item() == pytest.approx(minimiser, abs=0.005)


def test_other_losses():
    eps, n = normals(4, 2, 5, seed=1), normals(4, 2, 5, seed=2)
    torch.testing.assert_close(proximal_matching_loss(eps, n, kind="l1"), (eps - n).abs().mean((1, 2)))
    for loss in (proximal_matching_loss(eps, n, kind="l2"), sample_mse(eps, n), score_loss(eps, n)):
        torch.testing.assert_close(loss, (eps - n).square().mean((1, 2)))


def test_loss_computes_in_float32():
    eps, n = normals(2, 4096, seed=1), normals(2, 4096, seed=2)
    for kind in ("prox", "l1", "l2"):
        loss = proximal_matching_loss(eps.bfloat16(), n, kind=kind)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, proximal_matching_loss(eps.bfloat16().float(), n, kind=kind), rtol=0, atol=0)
    tiny = proximal_matching_loss(n + 1e-5, n)  # 1 - exp(-1e-10) would be 0 in float32
    assert tiny.tolist() == pytest.approx([1e-10] * 2, rel=0.05)


def test_bad_loss_settings_are_refused():
    eps = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="unknown loss kind 'huber'; valid: prox, l1, l2"):
        proximal_matching_loss(eps, eps, kind="huber")
    for zeta in (0, -1, math.nan):
        with pytest.raises(ValueError, match="zeta"):
            proximal_matching_loss(eps, eps, zeta)


# ---- equivalence with the score ---------------------------------------------------------------------

WEIGHTS, MEANS, VARIANCES = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.2, 0.7], [0.15**2, 0.25**2]))


def posterior_mean_noise(y, noise_variance, signal, extra):
    """Exact E[z | y] for y = signal * x + sqrt(extra) e + sqrt(noise_variance) z, x from the mixture, e and z standard normal."""
    variance = signal**2 * VARIANCES + extra + noise_variance
    offset = y[..., None] - signal * MEANS
    responsibility = torch.softmax(WEIGHTS.log() - 0.5 * offset**2 / variance - 0.5 * variance.log(), -1)
    return (responsibility * offset * noise_variance.sqrt() / variance).sum(-1)


def mixture_score(x, t, lam, guidance_scale=1):
    assert (lam == 0).all()
    t = t[:, None, None]
    return posterior_mean_noise(x, SCHEDULE.one_minus_alpha(t), SCHEDULE.alpha(t).sqrt(), torch.zeros_like(t)), None


def mixture_prox(y, t, lam, guidance_scale=2):
    t, lam = t[:, None, None], lam[:, None, None]
    eps = posterior_mean_noise(y, lam, SCHEDULE.alpha(t).sqrt(), SCHEDULE.one_minus_alpha(t))
    return eps, eps + 1  # a second branch, to see that both are converted


def points(batch):
    return torch.linspace(-4, 4, 101, dtype=torch.float64).repeat(batch, 1)


def test_prox_from_eps_on_a_mixture():
    table = PairSampler().table + [(0.3, 0.8, None)]
    t, lam = (torch.tensor([row[i] for row in table], dtype=torch.float64) for i in (0, 1))
    y = points(len(table))
    eps, none = prox_from_eps(mixture_score)(y, t, lam, 1)
    torch.testing.assert_close(eps, mixture_prox(y, t, lam)[0], rtol=0, atol=1e-6)
    assert none is None
    # the formula as published in terms of f
    alpha, tot = SCHEDULE.alpha(0.3), SCHEDULE.one_minus_alpha(0.3) + 0.8
    prime = torch.tensor([SCHEDULE.t_of_alpha(alpha / (alpha + tot))], dtype=torch.float64)
    score_eps = mixture_score(y[-1:] / math.sqrt(alpha + tot), prime, torch.zeros(1, dtype=torch.float64))[0]
    torch.testing.assert_close(y[-1:] - math.sqrt(0.8) * eps[-1:], y[-1:] - 0.8 / math.sqrt(tot) * score_eps, rtol=0, atol=1e-12)
    assert (prime <= 1).all() and max(SCHEDULE.t_of_alpha(SCHEDULE.alpha(a) / (1 + b)) for a, b, _ in table) < 1


@pytest.mark.parametrize("t", [0.0, 0.05])
def test_eps_from_prox_on_a_mixture(t):
    s = torch.tensor([0.1, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    x = points(5)
    eps, other = eps_from_prox(mixture_prox, t=t)(x, s, torch.zeros_like(s), 2)
    torch.testing.assert_close(eps, mixture_score(x, s, torch.zeros_like(s))[0], rtol=0, atol=1e-6)
    assert (other > eps).all()


def test_equivalence_round_trip():
    s = torch.tensor([0.1, 0.6], dtype=torch.float64)
    there_and_back = eps_from_prox(prox_from_eps(mixture_score), t=0.02)
    eps, _ = there_and_back(points(2), s, torch.zeros_like(s), 1)
    torch.testing.assert_close(eps, mixture_score(points(2), s, torch.zeros_like(s))[0], rtol=0, atol=1e-9)


# -- preconditioning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps, k", [(4, 0), (4, 2), (8, 4), (10, 9)])
def test_preconditioning_splits_the_target_into_what_y_tells_and_a_unit_remainder(num_steps, k):
    """For unit-variance data: the remainder of E[n | x0, y] has the variance c_out^2 and is uncorrelated with y."""
    plan = make_plan("hybrid", num_steps)
    t, lam = (torch.full((200_000,), v, dtype=torch.float64) for v in (plan.t[k], plan.lam[k]))
    x0, e, n = (normals(200_000, seed=seed, dtype=torch.float64) for seed in (1, 2, 3))
    y = noised(x0, t, lam, e, n)
    c_skip, c_out = precondition(t, lam)
    remainder = (expected_noise(x0, y, t, lam) - c_skip * y) / c_out
    assert remainder.square().mean().item() == pytest.approx(1, abs=0.02)
    assert (remainder * y).mean().item() / y.std().item() == pytest.approx(0, abs=0.02)


def test_preconditioning_of_a_score_network_is_v_prediction():
    """At lam = 0: eps = c_skip x + c_out F with F = sqrt(alpha) e - sqrt(1 - alpha) x_0, of unit variance and uncorrelated with x."""
    t = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)[:, None]
    x0, e = normals(4, 100_000, seed=1).double(), normals(4, 100_000, seed=2).double()
    alpha = SCHEDULE.alpha(t)
    c_skip, c_out = precondition(t, torch.zeros_like(t))
    x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * e
    v = alpha.sqrt() * e - (1 - alpha).sqrt() * x0
    torch.testing.assert_close(c_skip * x + c_out * v, e, rtol=1e-9, atol=1e-9)
    # the prox network at t = 0 and the same noise has the same c_out, for y = x / sqrt(alpha)
    at_zero = precondition(torch.zeros_like(t), (1 - alpha) / alpha)
    torch.testing.assert_close(at_zero[0] / alpha.sqrt(), c_skip)
    torch.testing.assert_close(at_zero[1], c_out)


def test_preconditioned_prox_of_a_standard_normal_is_exact_without_a_network():
    """prox(y) = y - sqrt(lam) c_skip y = y / (1 + lam), the prox of -lam ln N(0, 1)."""
    lam = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
    c_skip, _ = precondition(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), lam)
    torch.testing.assert_close(1 - lam.sqrt() * c_skip, 1 / (1 + lam))
