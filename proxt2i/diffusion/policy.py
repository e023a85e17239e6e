"""A sampler as a policy: the transitions of its chain as Gaussians with a density, for policy gradients such as GRPO.

In the chain of x the noise enters before the prox, x_{k-1} = f(a_k x_k + b_k z_k), and p(x_{k-1} | x_k) is the image of a Gaussian
under a network: no density that one could compute. The prox's *inputs* y are the auxiliary variable. With
f(y) = y - rho_k sqrt(lam_k) eps_theta(y, t_{k-1}, lam_k), guidance included,

    y_N                    ~  N(0, (a_N^2 + b_N^2) I)                    no theta
    y_{k-1} | y_k          ~  N(a_{k-1} f(y_k), b_{k-1}^2 I)             k = N, ..., 2: the noise of step k-1, the lam and rho of step k
    x_0                    =  f(y_1)                                     no density: the last call gets no policy gradient

The pictures are the same: y_{k-1} = a_{k-1} x_{k-1} + b_{k-1} z_{k-1} is what `proximal.sample` computes anyway, from the same draws,
and `rollout` runs that very code. Only the bookkeeping is another. Two networks on one transition compare in closed form
(`ops.transition_log_ratio`) through

    c = a_{k-1} rho_k sqrt(lam_k) / b_{k-1}            d = c (eps_new - eps_old)
    log ratio = -sum(d (z + d / 2))                    KL(new || ref) = |c (eps_new - eps_ref)|^2 / 2

Under the old policy the log ratio is exactly N(-K, 2K), K = |d|^2 / 2 the KL divergence of the two.

The score baseline is the same thing with x as the state: x' = a x - c' eps + b z, hence c = c' / b.

Transitions are counted in sampling order, i = 0, ..., N - 2: number i leads from the state that evaluation i of the network sees to
the one that evaluation i + 1 sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from ..ops import guided_eps, transition_log_ratio
from .plan import Plan
from .proximal import EpsFn, as_seeds, evaluate, per_step, trajectory
from .score import ScorePlan, score_trajectory


@dataclass(frozen=True)
class Policy:
    """A plan whose transitions have densities, and how each of its steps is guided.

    guidance: scale of every step.  scale: c of every transition.  first_draw: transition i adds draw first_draw + i of an image's seed.
    """

    plan: Plan | ScorePlan
    guidance: tuple[float, ...]
    scale: tuple[float, ...]
    first_draw: int

    @property
    def num_transitions(self) -> int:
        return len(self.scale)

    def query(self, i: int) -> tuple[float, float, float]:
        """(t, lam, guidance scale) of evaluation i of the network."""
        return self.plan.t[i], self.plan.lam[i] if isinstance(self.plan, Plan) else 0.0, self.guidance[i]

    def states(self, eps_fn: EpsFn, shape: Sequence[int], seeds: Tensor, impl: str | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(i, what evaluation i sees, the result of step i), the sampler's own; the last result is x_0."""
        if isinstance(self.plan, Plan):
            return trajectory(eps_fn, self.plan, shape, seeds, guidance_scale=self.guidance, impl=impl, want_x=False)
        return score_trajectory(eps_fn, self.plan, shape, seeds, guidance_scale=self.guidance, impl=impl)


def make_policy(plan: Plan | ScorePlan, guidance_scale: float | Sequence[float] = 1.0) -> Policy:
    """The policy that samples by `plan`, guided as `proximal.sample` would be. ValueError, with the fix, for a plan without densities:
    one step alone, steps without noise, or a memory (the next state then depends on more than this one)."""
    if plan.num_steps < 2:
        raise ValueError(f"num_steps={plan.num_steps} leaves no transition to train: the last step has no density, so use at least 2")
    if isinstance(plan, Plan):
        if any(plan.m):
            raise ValueError(f'plan "{plan.name}" with memory is no Markov chain: make_plan("{plan.name}", {plan.num_steps}, extrapolation=0) has none')
        std, first_draw = plan.b[1:], 2
        mean = [a * rho * math.sqrt(lam) for a, rho, lam in zip(plan.a[1:], plan.rho, plan.lam)]
    else:
        std, mean, first_draw = plan.b[:-1], list(plan.c[:-1]), 1
    if min(std) <= 0:
        stochastic = '"hybrid", "backward", "variance_preserving", or "relaxed" with eta > 0' if isinstance(plan, Plan) else '"ddpm" or "euler_maruyama"'
        raise ValueError(f'plan "{plan.name}" adds no noise, so its transitions have no density: use {stochastic}')
    return Policy(plan, tuple(per_step(guidance_scale, plan.num_steps)), tuple(m / s for m, s in zip(mean, std)), first_draw)


@dataclass(frozen=True)
class Rollout:
    """What one batch of sampled images leaves for the update. The noise is not kept: it is drawn again from the seeds.

    seeds: int64 [B].  states[i]: the state that transition i starts from, float32 [B, *shape], for the transitions kept.
    eps[i]: the guided network output there (empty unless asked for).  x0: the result, float32 [B, *shape].
    """

    seeds: Tensor
    states: dict[int, Tensor]
    eps: dict[int, Tensor]
    x0: Tensor


@torch.no_grad()
def rollout(eps_fn: EpsFn, policy: Policy, shape: Sequence[int], seeds: Tensor | Sequence[int], *, steps: Iterable[int] | None = None,
            keep_eps: bool = False, keep_last: bool = False, store: torch.device | str | None = None, impl: str | None = None, device=None) -> Rollout:
    """Sample one image a seed, bit for bit as `proximal.sample` (or `sample_score`) does, and keep the chain's states.

    steps: transitions to keep (default: all).  keep_eps: also keep the network's outputs, in float32.  keep_last: keep the
    state that the last evaluation sees besides, as states[N - 1], for `last_call`.  store: device of what is kept
    (default: where it was made).  Other arguments as in `proximal.sample`. ValueError for a transition that does not exist.
    """
    kept, seeds = check_steps(policy, steps), as_seeds(seeds, device)
    states, eps, calls = {}, {}, count()

    def recording(y, t, lam, guidance_scale):
        outputs, i = eps_fn(y, t, lam, guidance_scale), next(calls)
        if keep_eps and i in kept:
            eps[i] = guided_eps(*outputs, guidance_scale, impl).to(store or y.device)
        return outputs

    for i, state, result in policy.states(recording, shape, seeds, impl):
        if i in kept or (keep_last and i == policy.num_transitions):
            states[i] = state.to(store or state.device)
    return Rollout(seeds, states, eps, result)


def check_steps(policy: Policy, steps: Iterable[int] | None) -> tuple[int, ...]:
    """The transitions named (None: all), in order; ValueError unless they are some of the policy's, each once."""
    chosen = tuple(range(policy.num_transitions)) if steps is None else tuple(sorted(steps))
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < policy.num_transitions for i in chosen):
        raise ValueError(f"steps={list(chosen)}: {policy.plan.num_steps} steps have the transitions 0 to {policy.num_transitions - 1}; "
                         "name at least one, each once")
    return chosen


def compare(eps_fn: EpsFn, policy: Policy, i: int, state: Tensor, seeds: Tensor, *, eps_old: Tensor | None = None,
            eps_ref: Tensor | None = None, impl: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Transition i of a rollout under the network of eps_fn: (log ratio to the old policy [B], KL to the reference [B], eps [B, ...]).

    eps_fn: as in `proximal.sample`; the first two results are differentiable through it, in float32 (float64 if its results are).
    state, seeds: of the rollout.  eps_old: the guided output of the network that made it (`guided_output`, in the shapes of this call:
    a network's output for one image depends on the batch by rounding). None: the network has not changed since, the ratio is
    exactly 1, and its gradient is the policy gradient.  eps_ref: the reference's guided output; None: KL is 0.
    eps: this network's guided output, detached: eps_old of later calls in the same shapes.
    """
    t, lam, guidance = policy.query(i)
    eps_cond, eps_uncond = evaluate(eps_fn, state, t, lam, guidance)
    with torch.no_grad():
        eps = guided_eps(eps_cond.detach(), None if eps_uncond is None else eps_uncond.detach(), guidance, impl)
    log_ratio, kl = transition_log_ratio(
        eps_cond, eps_uncond, eps if eps_old is None else eps_old, eps_ref, guidance_scale=guidance, impl=impl, seeds=seeds,
        steps=torch.full_like(seeds, policy.first_draw + i), scale=torch.full((len(state),), policy.scale[i], dtype=torch.float64, device=state.device))
    return log_ratio, kl, eps


def last_call(eps_fn: EpsFn, policy: Policy, state: Tensor, impl: str | None = None) -> Tensor:
    """x_0 = f(y_1), [B, ...], of the state that the last evaluation sees; differentiable through eps_fn. It has no density, but a gradient."""
    plan, (t, lam, guidance) = policy.plan, policy.query(policy.num_transitions)
    eps = guided_eps(*evaluate(eps_fn, state, t, lam, guidance), guidance, impl)
    if isinstance(plan, Plan):
        return state - plan.rho[-1] * math.sqrt(lam) * eps
    return plan.a[-1] * state - plan.c[-1] * eps


@torch.no_grad()
def guided_output(eps_fn: EpsFn, policy: Policy, i: int, state: Tensor, impl: str | None = None) -> Tensor:
    """The network's guided output at transition i, float32 [B, ...]: eps_old or eps_ref of `compare`."""
    t, lam, guidance = policy.query(i)
    return guided_eps(*evaluate(eps_fn, state, t, lam, guidance), guidance, impl)
