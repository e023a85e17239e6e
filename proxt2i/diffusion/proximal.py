"""Sampling by proximal steps (ProxDM's PDA and PDA-hybrid, ProxT2I, and our variants: see plan.py).

The network predicts the noise in y: with eps = eps_theta(y, t, lam), prox_{-lam ln p_t}(y) = y - sqrt(lam) eps.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops import philox_normal, prox_step, step_row
from .plan import Plan

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
    steps = trajectory(eps_fn, plan, shape, seeds, guidance_scale=guidance_scale, impl=impl, device=device, want_x=callback is not None)
    for i, y, x in steps:
        if callback is not None:
            callback(i, y, x)
    return x


def trajectory(eps_fn: EpsFn, plan: Plan, shape: Sequence[int], seeds: Tensor | Sequence[int], *,
               guidance_scale: float | Sequence[float] = 1.0, impl: str | None = None, device=None,
               want_x: bool = True, rows: Tensor | None = None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """`sample`, step by step and with gradients: yields (i, y_{N-i}, x_{N-i-1}) for i = 0, ..., N-1.

    want_x False: the x but the last, which the next step does not need, are None.  rows: `step_rows`, float64 [N, 8] on the device, for
    who has them there already.
    """
    seeds = as_seeds(seeds, device)
    shape = tuple(shape)
    y = plan.a[0] * philox_normal(seeds, 0, shape, impl=impl)
    if plan.b[0] != 0:
        y = y + plan.b[0] * philox_normal(seeds, 1, shape, impl=impl)
    scales = per_step(guidance_scale, plan.num_steps)
    if rows is None:
        rows = torch.tensor(step_rows(plan, scales), dtype=torch.float64, device=y.device)
    memory = [*plan.m, 0.0, 0.0]  # of the next state, y_{N-i-1}, and of the one after it
    clean = None
    for i, (t, lam, scale) in enumerate(zip(plan.t, plan.lam, scales)):
        eps = evaluate(eps_fn, y, t, lam, scale)
        last = i + 1 == plan.num_steps
        x, y_next, clean = prox_step(y, *eps, rows[i], clean=clean if memory[i + 1] else None, seeds=seeds, impl=impl,
                                     want_x=want_x or last, want_next=not last, want_clean=memory[i + 2] != 0)
        yield i, y, x
        y = y_next


def step_rows(plan: Plan, scales: Sequence[float]) -> list[list[float]]:
    """The coefficients of the fused step (`ops.prox_step`) at each of the plan's steps, guided by `scales`.

    The clean image that the prox at (t, lam) implies is D = (y - (1 - alpha_t + lam) / sqrt(lam) eps) / sqrt(alpha_t): E[x_0 | y]
    when eps is E[n | y] (`matching.expected_noise`, solved for x_0).
    """
    rows = []
    for i, (t, lam, scale) in enumerate(zip(plan.t, plan.lam, scales)):
        to_next = {} if i + 1 == plan.num_steps else dict(a=plan.a[i + 1], b=plan.b[i + 1], memory=plan.m[i + 1])
        clean_y = 1 / math.sqrt(plan.schedule.alpha(t))
        clean_eps = clean_y * (plan.schedule.one_minus_alpha(t) + lam) / math.sqrt(lam)
        rows.append(step_row(plan.rho[i] * math.sqrt(lam), guidance_scale=scale, clean_y=clean_y, clean_eps=clean_eps,
                             draw=i + 2, **to_next))
    return rows


def clean_estimate(plan: Plan, i: int, y: Tensor, x: Tensor) -> Tensor:
    """The clean image D that step i implies (see `step_rows`), of its input y and result x, [B, *shape] each; at the last step x itself.

    x = y - rho sqrt(lam) eps gives back the eps that was used, guidance included.
    """
    if i + 1 == plan.num_steps:
        return x
    t, lam = plan.t[i], plan.lam[i]
    return (y - (plan.schedule.one_minus_alpha(t) + lam) / (plan.rho[i] * lam) * (y - x)) / math.sqrt(plan.schedule.alpha(t))


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
    eps_cond, eps_uncond = eps_fn(y, *(y.new_full(y.shape[:1], v) for v in (t, lam)), guidance_scale)  # type: ignore[call-arg]
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


def as_seeds(seeds: Tensor | Sequence[int], device=None) -> Tensor:
    """int64 [B] on `device` (default: where they are)."""
    seeds = torch.as_tensor(seeds, device=device)
    if seeds.dim() != 1 or seeds.is_floating_point() or seeds.dtype == torch.bool:
        raise ValueError(f"seeds must be integers, one per image, got {seeds.dtype} of shape {tuple(seeds.shape)}")
    return seeds.to(torch.int64)
