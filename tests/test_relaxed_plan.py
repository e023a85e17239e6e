"""The relaxed plan: what the network is shown, what it leaves invariant, and the schedulers of diffusers that it contains."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from proxt2i import ops
from proxt2i.diffusion import VPSchedule, guidance_scales, guided, make_plan, prox_from_eps, sample, trajectory

SCHEDULE = VPSchedule()


def levels(plan):
    """sqrt((1 - alpha) / alpha) at the times tau whose noise the plan shows the network."""
    alphas = [SCHEDULE.alpha(t) / (1 + lam) for t, lam in zip(plan.t, plan.lam)]
    return [math.sqrt(1 / alpha - 1) for alpha in alphas]


@pytest.mark.parametrize("num_steps", [1, 4, 7, 20])
@pytest.mark.parametrize("eta, extrapolation", [(0, 0), (0.6, 0), (1, 1), (1, 0.5)])
def test_a_point_mass_has_the_training_noise_at_every_step(num_steps, eta, extrapolation):
    """For x_0 = c the network's input of pair (t, lam) must be sqrt(alpha_t) c + noise of variance 1 - alpha_t + lam: its training input."""
    c, plan = 1.7, make_plan("relaxed", num_steps, eta=eta, extrapolation=extrapolation)

    def eps_fn(y, t, lam, guidance_scale):
        t, lam = t[:, None, None].double(), lam[:, None, None].double()
        return (lam.sqrt() / (SCHEDULE.one_minus_alpha(t) + lam) * (y - SCHEDULE.alpha(t).sqrt() * c)).float(), None

    for i, y, x in trajectory(eps_fn, plan, (128, 128), range(8)):
        signal, variance = math.sqrt(SCHEDULE.alpha(plan.t[i])), SCHEDULE.one_minus_alpha(plan.t[i]) + plan.lam[i]
        missing = math.sqrt((1 + plan.lam[i]) / (1 + levels(plan)[0] ** 2)) * c  # of signal: the start is pure noise
        assert y.mean().item() == pytest.approx(signal * c, abs=missing + 5 * math.sqrt(variance / y.numel()))
        assert y.std().item() == pytest.approx(math.sqrt(variance if i else 1 + plan.lam[0]), rel=0.01)
    torch.testing.assert_close(x, torch.full_like(x, c), rtol=0, atol=2e-3)


def test_the_queries_are_those_of_hybrid_and_the_last_prox_is_whole():
    for num_steps in (1, 4, 10):
        plan, hybrid = make_plan("relaxed", num_steps), make_plan("hybrid", num_steps)
        assert (plan.t, plan.lam) == (hybrid.t, hybrid.lam)
        assert plan.rho[-1] == pytest.approx(1) and plan.b[0] == 0 and plan.a[0] == math.sqrt(1 + plan.lam[0])


def test_without_noise_a_small_step_goes_half_of_the_way():
    """As for the probability flow against the reverse SDE; with fresh noise it goes farther, to make room for it."""
    assert make_plan("relaxed", 4000, eta=0, extrapolation=0).rho[1000] == pytest.approx(0.5, abs=2e-3)
    still, noisy = make_plan("relaxed", 8, eta=0), make_plan("relaxed", 8, eta=1)
    assert all(s < n for s, n in zip(still.rho[:-1], noisy.rho[:-1]))
    assert still.b == (0,) * 8 and min(noisy.b[1:]) > 0


def nonlinear_score(x, t, lam, guidance_scale):
    assert (lam == 0).all()
    return torch.sin(1.5 * x + 3 * t[:, None, None]) + 0.4 * x, None


@pytest.mark.parametrize("kind, eta", [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_steps", [4, 9])
def test_it_contains_dpm_solver(kind, eta, order, num_steps):
    """With a network that is a score network in disguise, eta 0 / 1 is DPM-Solver++ / SDE-DPM-Solver++ of first or second order
    through the noise levels of the pairs, computed by diffusers."""
    plan = make_plan("relaxed", num_steps, eta=eta, extrapolation=float(order == 2))
    scheduler = DPMSolverMultistepScheduler(algorithm_type=kind, solver_order=order, final_sigmas_type="zero")
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = torch.tensor([*levels(plan), 0.0])
    seeds, shape = torch.arange(3), (4, 5)
    x = ops.philox_normal(seeds, 0, shape)
    for i, (timestep, sigma) in enumerate(zip(scheduler.timesteps, levels(plan))):
        tau = torch.full((3,), SCHEDULE.t_of_alpha(1 / (1 + sigma**2)))
        eps, _ = nonlinear_score(x, tau, torch.zeros(3), 1)
        x = scheduler.step(eps, timestep, x, variance_noise=ops.philox_normal(seeds, i + 2, shape)).prev_sample
    ours = sample(prox_from_eps(nonlinear_score), plan, shape, seeds)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=2e-3)


def gaussian_prox(mean, std):
    def eps_fn(y, t, lam, guidance_scale):
        alpha, v = SCHEDULE.alpha(t), SCHEDULE.alpha(t) * std**2 + SCHEDULE.one_minus_alpha(t)
        m, v, lam = (q[:, None, None] for q in (alpha.sqrt() * mean, v, lam))
        return lam.sqrt() * (y - m) / (v + lam), None
    return eps_fn


def test_memory_helps_on_a_wide_gaussian():
    """W2 to N(1, 2^2) in six steps: 0.13 with extrapolation, 0.41 without (exact values; hybrid 0.493, ddim 0.448)."""
    def w2(**options):
        x = sample(gaussian_prox(1.0, 2.0), make_plan("relaxed", 6, eta=0, **options), (256, 256), range(8))
        return math.hypot(x.mean() - 1, x.std() - 2)
    assert w2(extrapolation=1) == pytest.approx(0.127, abs=0.015)
    assert w2(extrapolation=0) == pytest.approx(0.408, abs=0.015)


def test_guidance_on_the_last_steps_only():
    plan = make_plan("relaxed", 8)
    scales = guidance_scales(plan.tau, 2.0, below=0.3)
    assert scales == [1, 1, 1, 1, 1, 1, 2, 2]
    assert guidance_scales(plan.tau, 2.0) == [2] * 8
    assert guidance_scales(make_plan("hybrid", 1).tau, 2.0, below=0.01) == [2]  # the last step in any case
    assert guidance_scales(make_plan("backward", 10).tau, 2.0, below=1.0) == [2] * 10  # though its first tau is 1.08
    batches = []

    def model(y, t, lam, text):
        batches.append(len(y))
        return y * text[0].mean((1, 2))[:, None, None]

    text, null = [torch.rand(3, 2, 2)], [torch.zeros(1, 2, 2)]
    sample(guided(model, text, null), plan, (4, 4), range(3), guidance_scale=scales)
    assert batches == [3] * 6 + [6] * 2
    with pytest.raises(ValueError, match="2 guidance scales for 8 steps"):
        sample(guided(model, text, null), plan, (4, 4), range(3), guidance_scale=[1.0, 2.0])
