"""Sampling by proximal steps (ProxDM's PDA and PDA-hybrid, ProxT2I, and our variants: see plan.py).

The network predicts the noise in y: with eps = eps_theta(y, t, lam), prox_{-lam ln p_t}(y) = y - sqrt(lam) eps.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops import philox_normal, prox, prox_step
from .plan import Plan

EpsFn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@torch.no_grad()
def sample(
    eps_fn: EpsFn,
    plan: Plan,
    shape: Sequence[int],
    seeds: Tensor | Sequence[int],
    *,
    guidance_scale: float = 1.0,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    impl: str | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one image (or latent) per seed by `plan`; returns x_0, float32 [B, *shape].

    eps_fn(y, t, lam): float32 [B, *shape], [B], [B] -> (eps_cond, eps_uncond), each [B, *shape]; eps_uncond is
        None exactly when guidance_scale is 1 (see `guided`), else ValueError.
    shape: of one sample, without the batch.  seeds: int64 [B]; an image's noise is a function of its seed alone.
    callback(i, y, x): called after step i = 0, ..., N-1 with the prox's input y_{N-i} and its result x_{N-i-1}.
    impl, device: passed to the ops; the device of the state (default: that of seeds).
    """
    for i, y, x in trajectory(eps_fn, plan, shape, seeds, guidance_scale=guidance_scale, impl=impl, device=device):
        if callback is not None:
            callback(i, y, x)
    return x


def trajectory(eps_fn: EpsFn, plan: Plan, shape: Sequence[int], seeds: Tensor | Sequence[int], *,
               guidance_scale: float = 1.0, impl: str | None = None,
               device=None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`sample`, step by step and with gradients: yields (i, y_{N-i}, x_{N-i-1}) for i = 0, ..., N-1."""
    seeds = as_seeds(seeds, device)
    shape = tuple(shape)
    y = plan.a[0] * philox_normal(seeds, 0, shape, impl=impl)
    if plan.b[0] != 0:
        y = y + plan.b[0] * philox_normal(seeds, 1, shape, impl=impl)
    for i, (t, lam) in enumerate(zip(plan.t, plan.lam)):
        eps_cond, eps_uncond = evaluate(eps_fn, y, t, lam, guidance_scale)
        combine = dict(guidance_scale=guidance_scale, sqrt_lam=math.sqrt(lam), impl=impl)
        if i + 1 == plan.num_steps:
            yield i, y, prox(y, eps_cond, eps_uncond, **combine)
        else:
            a, b = plan.a[i + 1], plan.b[i + 1]
            x, y_next = prox_step(y, eps_cond, eps_uncond, a=a, b=b, seeds=seeds, step=i + 2, **combine)
            yield i, y, x
            y = y_next


def guided(model: Callable, text: list[Tensor], null_text: list[Tensor] | None, guidance_scale: float) -> EpsFn:
    """The eps_fn of a conditional network, with both branches of guidance in one batch.

    model(y, t, lam, text) -> eps.  text: list of [B, L_i, D_i]; null_text: the empty caption's, batch B or 1.
    guidance_scale 1 evaluates the conditional branch alone, 0 the null branch alone, any other value both.
    """
    if guidance_scale == 1:
        return lambda y, t, lam: (model(y, t, lam, text), None)
    if null_text is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs null_text, the embedding of the empty caption")
    null_text = [null.expand_as(cond) for cond, null in zip(text, null_text, strict=True)]
    if guidance_scale == 0:
        return lambda y, t, lam: (model(y, t, lam, null_text),) * 2
    both = [torch.cat(pair) for pair in zip(text, null_text)]

    def eps_fn(y, t, lam):
        eps_cond, eps_uncond = model(*(torch.cat([v, v]) for v in (y, t, lam)), both).chunk(2)
        return eps_cond, eps_uncond

    return eps_fn


def evaluate(eps_fn: EpsFn, y: Tensor, t: float, lam: float, guidance_scale: float) -> tuple[Tensor, Tensor | None]:
    """eps_fn at one (t, lam) for the whole batch; ValueError when its branches do not fit guidance_scale."""
    eps_cond, eps_uncond = eps_fn(y, *(y.new_full(y.shape[:1], v) for v in (t, lam)))
    if (eps_uncond is None) != (guidance_scale == 1):
        given = "no unconditional eps" if eps_uncond is None else "an unconditional eps"
        raise ValueError(f"eps_fn returned {given} but guidance_scale={guidance_scale}: "
                         "give guided(...) and the sampler the same guidance_scale")
    return eps_cond, eps_uncond


def as_seeds(seeds: Tensor | Sequence[int], device=None) -> Tensor:
    """int64 [B] on `device` (default: where they are)."""
    seeds = torch.as_tensor(seeds, device=device)
    if seeds.dim() != 1 or seeds.is_floating_point() or seeds.dtype == torch.bool:
        raise ValueError(f"seeds must be integers, one per image, got {seeds.dtype} of shape {tuple(seeds.shape)}")
    return seeds.to(torch.int64)
