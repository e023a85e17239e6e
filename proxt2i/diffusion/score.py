"""The score baseline: noise prediction with an mse loss, and its samplers, on the network and schedule of the prox.

The score network is the same one called with lam = 0; it predicts e in x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) e.
Every sampler here is a table of rows (t, a, c, b) for one loop

    x <- a x - c eps(x, t) + b z

with a draw z per row (none where b = 0), keyed like `proximal.sample`'s: one seed gives both samplers the same x_N.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import philox_normal, prox_step, step_row
from .matching import sample_mse
from .plan import Grid, check_name, time_grid
from .proximal import EpsFn, as_seeds, evaluate, per_step
from .schedule import VPSchedule

FIRST_TIME = 1e-3  # where ProxDM's Euler samplers stop before their last, noiseless step


# ---- training -----------------------------------------------------------------------------------


class TimeSampler:
    """t ~ U[0, 1] with PairSampler's interface: draw(u) -> t, lam = 0, bucket; buckets are equal slices of time."""

    def __init__(self, num_buckets: int = 10):
        self.num_buckets = num_buckets
        self.bucket_names = [f"t{i / num_buckets:.2f}-{(i + 1) / num_buckets:.2f}" for i in range(num_buckets)]

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u in [0, 1), [B] -> t = u, lam = 0 (float32) and bucket (int64), all [B]."""
        t = u.float()
        bucket = (t * self.num_buckets).long().clamp(max=self.num_buckets - 1)
        return t, torch.zeros_like(t), bucket


def score_loss(eps: Tensor, e: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, per sample: [B, ...], [B, ...] -> [B] float32.

    The network's input is matching.noised(x0, t, lam=0, e, n): n then has no weight.
    """
    return sample_mse(eps, e)


# ---- sampling -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScorePlan:
    """Rows of x <- a x - c eps(x, t) + b z in sampling order; t is the time of the x that the network sees."""

    name: str
    num_steps: int
    t: tuple[float, ...]
    a: tuple[float, ...]
    c: tuple[float, ...]
    b: tuple[float, ...]


def _euler(num_steps, schedule, stochastic):
    """ProxDM's *_eps: N - 1 Euler steps from t = 1 to FIRST_TIME with gamma = beta(t) dt, then a noiseless one."""
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}: the Euler samplers need at least 2 (the last only denoises)")
    dt = (1 - FIRST_TIME) / (num_steps - 1)
    for i in range(num_steps):
        last = i == num_steps - 1
        t = FIRST_TIME if last else 1 - i * dt
        gamma = schedule.beta(t) * (FIRST_TIME if last else dt)
        slope = gamma / math.sqrt(schedule.one_minus_alpha(t))  # score = -eps / sqrt(1 - alpha)
        # reverse SDE: x + gamma (x/2 + score) + sqrt(gamma) z ; probability flow: x + gamma/2 (x + score)
        b = math.sqrt(gamma) if stochastic and not last else 0.0
        yield t, 1 + gamma / 2, slope if stochastic else slope / 2, b


def _denoising(num_steps, schedule, stochastic, grid):
    """DDIM (Song et al. 2021, eq. 12 with eta = 0); eta = 1 is DDPM's ancestral sampling, posterior variance."""
    times = time_grid(num_steps, grid)
    for k in range(num_steps, 0, -1):
        alpha, alpha_next = schedule.alpha(times[k]), schedule.alpha(times[k - 1])
        noise, noise_next = schedule.one_minus_alpha(times[k]), schedule.one_minus_alpha(times[k - 1])
        variance = noise_next / noise * (1 - alpha / alpha_next) if stochastic else 0.0
        a = math.sqrt(alpha_next / alpha)
        # x_0 = (x - sqrt(noise) eps) / sqrt(alpha)
        # x'  = sqrt(alpha') x_0 + sqrt(noise' - variance) eps + sqrt(variance) z
        c = a * math.sqrt(noise) - math.sqrt(max(noise_next - variance, 0.0))
        yield times[k], a, c, math.sqrt(variance)


SCORE_SAMPLERS = ("euler_maruyama", "euler_ode", "ddim", "ddpm")


def score_plan(name: str, num_steps: int, schedule: VPSchedule = VPSchedule(), grid: Grid = "uniform") -> ScorePlan:
    """The rows of sampler `name`, one of SCORE_SAMPLERS. Only ddim and ddpm take a grid; Euler has ProxDM's own."""
    check_name("score sampler", name, SCORE_SAMPLERS)
    times = time_grid(num_steps, grid)
    if name.startswith("euler"):
        if grid != "uniform":
            raise ValueError(f"{name} has its own grid: leave grid at 'uniform'")
        rows = _euler(num_steps, schedule, stochastic=name == "euler_maruyama")
    else:
        rows = _denoising(num_steps, schedule, name == "ddpm", times)
    return ScorePlan(name, num_steps, *zip(*rows))


@torch.no_grad()
def sample_score(
    eps_fn: EpsFn,
    plan: ScorePlan,
    shape: Sequence[int],
    seeds: Tensor | Sequence[int],
    *,
    guidance_scale: float | Sequence[float] = 1.0,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    impl: str | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """`proximal.sample` for a score network; returns float32 [B, *shape].

    eps_fn(x, t, lam, guidance_scale) -> (eps_cond, eps_uncond or None), called with lam = 0: `proximal.guided` serves unchanged.
    callback(i, x, x_next) after step i.  The prediction of x_0 is not clipped.
    """
    for i, x, x_next in score_trajectory(eps_fn, plan, shape, seeds, guidance_scale=guidance_scale, impl=impl, device=device):
        if callback is not None:
            callback(i, x, x_next)
    return x_next


def score_trajectory(eps_fn: EpsFn, plan: ScorePlan, shape: Sequence[int], seeds: Tensor | Sequence[int], *,
                     guidance_scale: float | Sequence[float] = 1.0, impl: str | None = None, device=None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`sample_score`, step by step and with gradients: yields (i, x, x_next) for i = 0, ..., N-1."""
    seeds = as_seeds(seeds, device)
    x = philox_normal(seeds, 0, tuple(shape), impl=impl)
    for i, (t, a, c, b, scale) in enumerate(zip(plan.t, plan.a, plan.c, plan.b, per_step(guidance_scale, plan.num_steps))):
        eps_cond, eps_uncond = evaluate(eps_fn, x, t, 0.0, scale)
        # the fused step computes a (x - sqrt_lam eps) + b z
        row = step_row(c / a, guidance_scale=scale, a=a, b=b, draw=i + 1)
        _, x_next, _ = prox_step(x, eps_cond, eps_uncond, row, seeds=seeds, impl=impl, want_x=False)
        yield i, x, x_next
        x = x_next


def euler_maruyama(eps_fn, num_steps, shape, seeds, *, schedule=VPSchedule(), **options) -> Tensor:
    """Reverse SDE as in ProxDM: N - 1 Euler-Maruyama steps, then a noiseless one. Options: as sample_score."""
    return sample_score(eps_fn, score_plan("euler_maruyama", num_steps, schedule), shape, seeds, **options)


def euler_ode(eps_fn, num_steps, shape, seeds, *, schedule=VPSchedule(), **options) -> Tensor:
    """Probability-flow ODE by Euler steps on the times of euler_maruyama. Options: as sample_score."""
    return sample_score(eps_fn, score_plan("euler_ode", num_steps, schedule), shape, seeds, **options)


def ddim(eps_fn, num_steps, shape, seeds, *, schedule=VPSchedule(), grid="uniform", **options) -> Tensor:
    """DDIM, eta = 0, on `grid` (see plan.time_grid). Options: as sample_score."""
    return sample_score(eps_fn, score_plan("ddim", num_steps, schedule, grid), shape, seeds, **options)


def ddpm(eps_fn, num_steps, shape, seeds, *, schedule=VPSchedule(), grid="uniform", **options) -> Tensor:
    """DDPM ancestral sampling on `grid` (see plan.time_grid). Options: as sample_score."""
    return sample_score(eps_fn, score_plan("ddpm", num_steps, schedule, grid), shape, seeds, **options)


# ---- equivalence --------------------------------------------------------------------------------
# With tot = 1 - alpha_t + lam, E[n|y] = sqrt(lam / tot) E[total noise|y], and y / sqrt(1 + lam) is a sample of the
# same diffusion at the time t' with alpha_t' = alpha_t / (1 + lam) (as alpha_t + tot = 1 + lam). So the posterior-mean
# prox is a score network:    f = y - lam / sqrt(tot) eps_score(y / sqrt(1 + lam), t')


def prox_from_eps(score_fn: EpsFn, schedule: VPSchedule = VPSchedule()) -> EpsFn:
    """The eps_fn, for `proximal.sample`, of the posterior-mean prox of a score network's density (ours).

    score_fn(x, t, lam=0, guidance_scale) -> (eps_cond, eps_uncond or None), and so the result. It is asked at t' > t: below 1 on every
    plan but "backward", whose first steps ask beyond the diffusion's end (t' = 1.08 with 10 steps, 1.005 with 20).
    """

    def eps_fn(y, t, lam, guidance_scale):
        prime = schedule.tau(t, lam)
        ratio = lam / (schedule.one_minus_alpha(t) + lam)
        eps = score_fn(y * _column((1 + lam).rsqrt(), y), prime, torch.zeros_like(prime), guidance_scale)
        return _scaled(eps, _column(ratio.sqrt(), y))

    return eps_fn


def eps_from_prox(eps_fn: EpsFn, schedule: VPSchedule = VPSchedule(), t: float = 0.0) -> EpsFn:
    """The inverse: a score_fn(x, s, lam=0, guidance_scale) for `sample_score` from a posterior-mean prox.

    eps_fn is asked at (t, lam = alpha_t / alpha_s - 1), which is exact for every t < min(s); the default, the
    clean-image prox, serves all s > 0.
    """

    def score_fn(x, s, _, guidance_scale):
        lam = torch.expm1(schedule.beta_integral(t, s))
        ratio = 1 + schedule.one_minus_alpha(t) / lam
        eps = eps_fn(x * _column((1 + lam).sqrt(), x), torch.full_like(s, t), lam, guidance_scale)
        return _scaled(eps, _column(ratio.sqrt(), x))

    return score_fn


def _column(v: Tensor, like: Tensor) -> Tensor:
    return v.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _scaled(eps, factor):
    eps_cond, eps_uncond = eps
    return eps_cond * factor, None if eps_uncond is None else eps_uncond * factor
