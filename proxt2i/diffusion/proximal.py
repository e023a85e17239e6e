"""Sampling by proximal steps (ProxDM's PDA and PDA-hybrid, ProxT2I, and our variants: see plan.py).

The network predicts the noise in y: with eps = eps_theta(y, t, lam), prox_{-lam ln p_t}(y) = y - sqrt(lam) eps.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops import philox_normal, prox, prox_step
from .plan import Plan
from .schedule import VPSchedule

# eps_fn(y, t, lam, guidance_scale) -> (eps_cond, eps_uncond, or None where guidance_scale is 1)
EpsFn = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor | None]]


@torch.no_grad()
def sample(
    eps_fn: EpsFn,
    plan: Plan,
    shape: Sequence[int],
    seeds: Tensor | Sequence[int],
    *,
    guidance_scale: float | Sequence[float] = 1.0,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    impl: str | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one image (or latent) per seed by `plan`; returns x_0, float32 [B, *shape].

    eps_fn(y, t, lam, guidance_scale): float32 [B, *shape], [B], [B], float -> (eps_cond, eps_uncond), each [B, *shape];
        eps_uncond is None exactly when guidance_scale is 1 (see `guided`), else ValueError.
    shape: of one sample, without the batch.  seeds: int64 [B]; an image's noise is a function of its seed alone.
    guidance_scale: of every step, or one a step in sampling order (see `guidance_scales`).
    callback(i, y, x): called after step i = 0, ..., N-1 with the prox's input y_{N-i} and its result x_{N-i-1}.
    impl, device: passed to the ops; the device of the state (default: that of seeds).
    """
    for i, y, x in trajectory(eps_fn, plan, shape, seeds, guidance_scale=guidance_scale, impl=impl, device=device):
        if callback is not None:
            callback(i, y, x)
    return x


def trajectory(eps_fn: EpsFn, plan: Plan, shape: Sequence[int], seeds: Tensor | Sequence[int], *,
               guidance_scale: float | Sequence[float] = 1.0, impl: str | None = None,
               device=None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`sample`, step by step and with gradients: yields (i, y_{N-i}, x_{N-i-1}) for i = 0, ..., N-1."""
    seeds = as_seeds(seeds, device)
    shape = tuple(shape)
    y = plan.a[0] * philox_normal(seeds, 0, shape, impl=impl)
    if plan.b[0] != 0:
        y = y + plan.b[0] * philox_normal(seeds, 1, shape, impl=impl)
    clean = None
    for i, (t, lam, scale) in enumerate(zip(plan.t, plan.lam, per_step(guidance_scale, plan.num_steps))):
        eps = evaluate(eps_fn, y, t, lam, scale)
        combine = dict(guidance_scale=scale, impl=impl)
        reach = plan.rho[i] * math.sqrt(lam)
        if i + 1 == plan.num_steps:
            yield i, y, prox(y, *eps, sqrt_lam=reach, **combine)
        else:
            a, b = plan.a[i + 1], plan.b[i + 1]
            x, y_next = prox_step(y, *eps, sqrt_lam=reach, a=a, b=b, seeds=seeds, step=i + 2, **combine)
            yield i, y, x
            if any(plan.m[i + 1 :]):
                clean, previous = clean_image(y, eps, t, lam, plan.schedule, **combine), clean
                if plan.m[i + 1] != 0:
                    y_next = y_next + plan.m[i + 1] * (clean - previous)
            y = y_next


def guided(model: Callable, text: list[Tensor], null_text: list[Tensor] | None = None) -> EpsFn:
    """The eps_fn of a conditional network, with both branches of guidance in one batch.

    model(y, t, lam, text) -> eps.  text: list of [B, L_i, D_i]; null_text: the empty caption's, batch B or 1.
    guidance_scale 1 evaluates the conditional branch alone, 0 the null branch alone, any other value both.
    """
    if null_text is not None:
        null_text = [null.expand_as(cond) for cond, null in zip(text, null_text, strict=True)]
        both = [torch.cat(pair) for pair in zip(text, null_text)]

    def eps_fn(y, t, lam, guidance_scale):
        if guidance_scale == 1:
            return model(y, t, lam, text), None
        if null_text is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs null_text, the embedding of the empty caption")
        if guidance_scale == 0:
            return (model(y, t, lam, null_text),) * 2
        eps_cond, eps_uncond = model(*(torch.cat([v, v]) for v in (y, t, lam)), both).chunk(2)
        return eps_cond, eps_uncond

    return eps_fn


def guidance_scales(times: Sequence[float], scale: float, below: float = 1.0) -> list[float]:
    """One guidance scale a step: `scale` where the network's input has the noise of a time <= below, 1 elsewhere.

    times: of each step in sampling order, Plan.tau or ScorePlan.t. Early steps decide what kind of picture it becomes, and
    guidance there costs diversity; a step with scale 1 costs one network evaluation an image instead of two. The last step is
    guided in any case.
    """
    # "backward" asks beyond time 1 in its first steps: below = 1 still means all of them
    return [scale if min(t, 1.0) <= below or i + 1 == len(times) else 1.0 for i, t in enumerate(times)]


def evaluate(eps_fn: EpsFn, y: Tensor, t: float, lam: float, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
    """eps_fn at one (t, lam) for the whole batch; ValueError when its branches do not fit guidance_scale."""
    eps_cond, eps_uncond = eps_fn(y, *(y.new_full(y.shape[:1], v) for v in (t, lam)), guidance_scale)
    if (eps_uncond is None) != (guidance_scale == 1):
        given = "no unconditional eps" if eps_uncond is None else "an unconditional eps"
        raise ValueError(f"eps_fn returned {given} for guidance_scale={guidance_scale}")
    return eps_cond, eps_uncond


def per_step(guidance_scale: float | Sequence[float], num_steps: int) -> list[float]:
    """One guidance scale a step; ValueError unless it is one number or num_steps of them."""
    if not isinstance(guidance_scale, Sequence):
        return [guidance_scale] * num_steps
    if len(guidance_scale) != num_steps:
        raise ValueError(f"{len(guidance_scale)} guidance scales for {num_steps} steps: give one number, or one a step")
    return list(guidance_scale)


def clean_image(y: Tensor, eps: tuple[Tensor, Tensor | None], t: float, lam: float, schedule: VPSchedule, **options) -> Tensor:
    """The x_0 that the prox at (t, lam) implies: E[x_0 | y] when eps is E[n | y] (`matching.expected_noise`, solved for x_0)."""
    variance = schedule.one_minus_alpha(t) + lam
    return prox(y, *eps, sqrt_lam=variance / math.sqrt(lam), **options) / math.sqrt(schedule.alpha(t))


def as_seeds(seeds: Tensor | Sequence[int], device=None) -> Tensor:
    """int64 [B] on `device` (default: where they are)."""
    seeds = torch.as_tensor(seeds, device=device)
    if seeds.dim() != 1 or seeds.is_floating_point() or seeds.dtype == torch.bool:
        raise ValueError(f"seeds must be integers, one per image, got {seeds.dtype} of shape {tuple(seeds.shape)}")
    return seeds.to(torch.int64)
