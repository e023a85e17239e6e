"""The sampler as a policy: the same pictures, and ratios, divergences and gradients that agree with the densities they stand for."""

import math

import pytest
import torch
from torch.distributions import Normal

from proxt2i.diffusion import (
    VPSchedule, compare, guided, guided_output, make_plan, make_policy, prox_from_eps, rollout, sample, sample_score, score_plan,
)
from proxt2i.models.uvit import build_uvit
from proxt2i.ops import philox_normal

SHAPE = (2, 8, 8)
PLANS = {
    "hybrid": lambda: make_plan("hybrid", 4),
    "backward": lambda: make_plan("backward", 10),
    "variance_preserving": lambda: make_plan("variance_preserving", 4),
    "relaxed": lambda: make_plan("relaxed", 4, extrapolation=0),
    "relaxed with less noise": lambda: make_plan("relaxed", 5, eta=0.5, extrapolation=0),
    "ddpm": lambda: score_plan("ddpm", 4),
    "euler_maruyama": lambda: score_plan("euler_maruyama", 6),
}
policies = pytest.mark.parametrize("policy", [pytest.param(make_policy(make(), 1.5), id=name) for name, make in PLANS.items()])


def network(shift=0.0):
    """An eps_fn with a parameter, nonlinear, one branch for each part of guidance; no batch effects."""
    def eps_fn(y, t, lam, guidance_scale):
        t, lam = (v.reshape(-1, *[1] * (y.dim() - 1)).to(y.dtype) for v in (t, lam))
        base = y / (1 + lam).sqrt()
        cond, uncond = torch.sin(base + t + shift) + 0.3 * shift * base, torch.cos(base) - 0.5 * shift
        return (cond, None) if guidance_scale == 1 else (cond, uncond)
    return eps_fn


def uvit(seed=0):
    torch.manual_seed(seed)
    return build_uvit("portraits", embed_dim=32, depth=3, num_heads=2, in_channels=2, text_dims=[16], text_lengths=[4], betas=[0.1, 20.0])


def transition(policy, i, state, eps):
    """Mean and std of transition i, written out from the plan's columns and f alone: float64."""
    plan, state, eps = policy.plan, state.double(), eps.double()
    if hasattr(plan, "lam"):
        x = state - plan.rho[i] * math.sqrt(plan.lam[i]) * eps
        return plan.a[i + 1] * x, plan.b[i + 1]
    return plan.a[i] * state - plan.c[i] * eps, plan.b[i]


@policies
def test_a_rollout_is_what_the_sampler_draws(policy):
    """Bit for bit, pictures and inputs of the network; so training on y-chains trains the sampler of x-chains."""
    seen = []
    sampler = sample if hasattr(policy.plan, "lam") else sample_score
    x0 = sampler(network(), policy.plan, SHAPE, range(5), guidance_scale=policy.guidance, callback=lambda i, y, x: seen.append(y))
    kept = rollout(network(), policy, SHAPE, range(5), keep_eps=True)
    assert torch.equal(kept.x0, x0) and sorted(kept.states) == list(range(policy.plan.num_steps - 1)) == sorted(kept.eps)
    for i, state in kept.states.items():
        assert torch.equal(state, seen[i])
        assert torch.equal(kept.eps[i], guided_output(network(), policy, i, state))
    part = rollout(network(), policy, SHAPE, range(5), steps=[1], keep_eps=True)
    assert list(part.states) == list(part.eps) == [1] and torch.equal(part.states[1], seen[1]) and torch.equal(part.eps[1], kept.eps[1])


@policies
def test_the_log_ratio_is_that_of_the_densities(policy):
    """Between the states that the sampler really visited: their Gaussians written out, with every index in its place."""
    kept = rollout(network(), policy, SHAPE, range(6), keep_eps=True)
    for i in range(policy.num_transitions - 1):  # the state after the last transition is not kept
        new = guided_output(network(0.05), policy, i, kept.states[i])
        logp = [Normal(*transition(policy, i, kept.states[i], eps)).log_prob(kept.states[i + 1].double()).flatten(1).sum(1) for eps in (new, kept.eps[i])]
        log_ratio, kl, _ = compare(network(0.05), policy, i, kept.states[i], kept.seeds, eps_old=kept.eps[i])
        assert logp[0].sub(logp[1]).abs().min() > 0.01
        torch.testing.assert_close(log_ratio.double(), logp[0] - logp[1], rtol=1e-3, atol=1e-3)
        assert torch.equal(kl, torch.zeros(6))


@policies
def test_the_divergence_is_that_of_the_gaussians(policy):
    kept = rollout(network(), policy, SHAPE, range(3))
    for i, state in kept.states.items():
        reference = guided_output(network(), policy, i, state)
        _, kl, eps = compare(network(0.1), policy, i, state, kept.seeds, eps_ref=reference)
        expected = torch.distributions.kl_divergence(Normal(*transition(policy, i, state, eps)), Normal(*transition(policy, i, state, reference)))
        torch.testing.assert_close(kl.double(), expected.flatten(1).sum(1), rtol=1e-4, atol=1e-6)


def test_under_the_old_policy_ratios_average_to_one_and_log_ratios_to_minus_the_divergence():
    """E[r] = 1, E[-log r] = KL(old || new): over many draws of the noise of the same transition."""
    count, policy = 40_000, make_policy(make_plan("hybrid", 4), 2.0)
    state = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(0)).expand(count, 2, 2).contiguous()
    old = guided_output(network(), policy, 1, state)
    log_ratio, _, _ = compare(network(0.08), policy, 1, state, torch.arange(count), eps_old=old)
    kl = compare(network(), policy, 1, state[:1], torch.zeros(1, dtype=torch.int64), eps_ref=guided_output(network(0.08), policy, 1, state[:1]))[1].item()
    assert 0.02 < kl < 0.5
    assert log_ratio.exp().mean().item() == pytest.approx(1, abs=4 * math.sqrt(math.expm1(2 * kl) / count))
    assert -log_ratio.mean().item() == pytest.approx(kl, abs=4 * math.sqrt(2 * kl / count))
    assert log_ratio.var().item() == pytest.approx(2 * kl, rel=0.05)


@policies
def test_gradients_against_finite_differences(policy):
    """Of the log ratio and the divergence in a parameter of the network, through both branches of guidance: float64."""
    kept = rollout(network(), policy, (3,), range(4), keep_eps=True)

    def both(shift):
        i = policy.num_transitions - 1
        state, old = kept.states[i].double(), kept.eps[i].double()
        log_ratio, kl, _ = compare(network(shift), policy, i, state, kept.seeds, eps_old=old, eps_ref=0.9 * old)
        return log_ratio, kl

    torch.autograd.gradcheck(both, torch.tensor(0.03, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("plan", ["hybrid", "relaxed"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_the_first_update_has_ratio_one_for_any_micro_batch(plan, micro_batch):
    """Exactly: on a real network, rolled out in one batch and trained in others, where its outputs differ by rounding."""
    policy = make_policy(PLANS[plan](), 1.5)
    net, text, null = uvit(), [torch.randn(8, 4, 16)], [torch.randn(1, 4, 16)]
    kept = rollout(guided(net, text, null), policy, SHAPE, range(8), keep_eps=True)
    for start in range(0, 8, micro_batch):
        part = slice(start, start + micro_batch)
        eps_fn = guided(net, [text[0][part]], null)
        for i in kept.states:
            state, seeds = kept.states[i][part], kept.seeds[part]
            again = guided_output(eps_fn, policy, i, state)
            for old in (None, again):
                log_ratio, kl, eps = compare(eps_fn, policy, i, state, seeds, eps_old=old, eps_ref=again)
                assert torch.equal(log_ratio, torch.zeros(len(seeds))) and torch.equal(kl, torch.zeros(len(seeds)))
                assert torch.equal(eps, again)
    gradient, = torch.autograd.grad(log_ratio.sum(), net.out.weight)  # though the ratio is one, the policy gradient is there
    assert gradient.abs().sum() > 0


def test_the_policy_gradient_is_the_score_of_the_density():
    """d log r / d eps at ratio one is -c z: towards pictures that the noise made, away from the mean."""
    policy = make_policy(make_plan("variance_preserving", 4))
    kept = rollout(network(), policy, SHAPE, range(3))
    eps = guided_output(network(), policy, 2, kept.states[2]).requires_grad_()
    log_ratio, _, _ = compare(lambda *_: (eps, None), policy, 2, kept.states[2], kept.seeds)
    gradient, = torch.autograd.grad(log_ratio.sum(), eps)
    torch.testing.assert_close(gradient, -policy.scale[2] * philox_normal(kept.seeds, policy.first_draw + 2, SHAPE))


def test_a_score_network_behind_proxes_is_a_policy_too():
    schedule = VPSchedule()
    policy = make_policy(make_plan("hybrid", 4, schedule))
    eps_fn = prox_from_eps(lambda x, t, lam, w: (torch.tanh(x), None), schedule)
    kept = rollout(eps_fn, policy, SHAPE, range(3), keep_eps=True)
    assert torch.equal(kept.x0, sample(eps_fn, policy.plan, SHAPE, range(3)))
    assert torch.equal(compare(eps_fn, policy, 2, kept.states[2], kept.seeds, eps_old=kept.eps[2])[0], torch.zeros(3))


@pytest.mark.parametrize("plan, fix", [
    (make_plan("relaxed", 4), 'make_plan("relaxed", 4, extrapolation=0)'),
    (make_plan("ode", 4), '"hybrid"'),
    (make_plan("relaxed", 4, eta=0, extrapolation=0), "eta > 0"),
    (make_plan("hybrid", 1), "at least 2"),
    (score_plan("ddim", 4), '"ddpm"'),
    (score_plan("euler_ode", 4), '"euler_maruyama"'),
])
def test_plans_without_densities_are_refused_with_the_fix(plan, fix):
    with pytest.raises(ValueError, match=fix.replace("(", r"\(").replace(")", r"\)")):
        make_policy(plan)


@pytest.mark.parametrize("steps", [[], [3], [-1], [1, 1]])
def test_transitions_that_do_not_exist_are_refused(steps):
    with pytest.raises(ValueError, match="transitions 0 to 2"):
        rollout(network(), make_policy(make_plan("hybrid", 4)), SHAPE, range(2), steps=steps)
