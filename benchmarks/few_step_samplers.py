"""The samplers that few_step.py compares, behind one function: `draw`.

Proximal ones are the plans of proxt2i.diffusion. Score samplers: the Euler ones of ProxDM, DDIM and ancestral DDPM on any time grid
(rows of proxt2i.diffusion.score, tested to be diffusers' steps), and DPM-Solver++ and UniPC as diffusers' own schedulers compute them,
on any time grid: they work on `sigmas`, and those can be set to the noise levels of a grid.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from proxt2i.diffusion import VPSchedule, make_plan, prox_from_eps, sample, sample_score, score_plan, time_grid
from proxt2i.diffusion.proximal import as_seeds, evaluate, per_step
from proxt2i.ops import philox_normal

TRAIN_STEPS = 1000  # of diffusers' tables


def log_snr_grid(num_steps: int, schedule: VPSchedule, first: float = 0.05) -> tuple[float, ...]:
    """Times from 0 to 1 whose N >= 2 positive ones are evenly spaced in log-SNR, the smallest `first`."""
    low, high = (math.log(schedule.alpha(t) / schedule.one_minus_alpha(t)) for t in (1.0, first))
    snrs = [math.exp(low + (high - low) * i / (num_steps - 1)) for i in range(num_steps)]
    times = [schedule.t_of_alpha(snr / (1 + snr)) for snr in snrs]
    return (0.0, *reversed(times[1:]), 1.0)


GRIDS = {
    "uniform": lambda n, schedule: time_grid(n),
    "t^1.5": lambda n, schedule: time_grid(n, lambda u: u**1.5),
    "t^2": lambda n, schedule: time_grid(n, lambda u: u**2),
    "log-SNR": log_snr_grid,
}


@dataclass(frozen=True)
class Sampler:
    """network: "prox", "score", "pairs" (a score network that was trained on the noise levels of the prox's pairs, and is asked there),
    "score as prox" (a plan whose pairs the prox network was not trained on runs on the score network through the exact equivalence,
    score.prox_from_eps) or "prox as score" (the other way round: a score sampler on the prox network, at the noise levels of its
    pairs). grids: to choose from. contender: worth all the seeds."""

    name: str
    network: str
    grids: tuple[str, ...] = ("uniform",)
    min_steps: int = 1
    contender: bool = True
    guided_parts: bool = True  # also try guidance on the last steps only
    options: tuple = ()  # of make_plan: which member of the family "relaxed" it is


ALL_GRIDS = tuple(GRIDS)
SAMPLERS = {s.name: s for s in (
    Sampler("euler_maruyama", "score", min_steps=2, contender=False, guided_parts=False),
    Sampler("euler_ode", "score", min_steps=2, contender=False, guided_parts=False),
    Sampler("ddim", "score", ALL_GRIDS),
    Sampler("ddpm", "score", ALL_GRIDS),
    Sampler("dpm++2m", "score", ALL_GRIDS),
    Sampler("sde-dpm++2m", "score", ALL_GRIDS),
    Sampler("unipc", "score", ALL_GRIDS),
    Sampler("ddim on prox", "prox as score", options=(("eta", 0.0), ("extrapolation", 0.0))),
    Sampler("ddpm on prox", "prox as score", options=(("eta", 1.0), ("extrapolation", 0.0))),
    Sampler("dpm++2m on prox", "prox as score", options=(("eta", 0.0), ("extrapolation", 1.0))),
    Sampler("unipc on prox", "prox as score"),
    Sampler("ddim on pairs", "pairs", options=(("eta", 0.0), ("extrapolation", 0.0))),
    Sampler("ddpm on pairs", "pairs", options=(("eta", 1.0), ("extrapolation", 0.0))),
    Sampler("dpm++2m on pairs", "pairs", options=(("eta", 0.0), ("extrapolation", 1.0))),
    Sampler("sde-dpm++2m on pairs", "pairs"),
    Sampler("unipc on pairs", "pairs"),
    Sampler("hybrid", "prox"),
    Sampler("backward", "score as prox", min_steps=10, contender=False, guided_parts=False),
    Sampler("variance_preserving", "score as prox", contender=False, guided_parts=False),
    Sampler("ode", "score as prox", contender=False, guided_parts=False),
    Sampler("relaxed", "prox"),
)}


def draw(sampler: Sampler, eps_fn, num_steps: int, grid: str, shape, seeds, guidance_scale, schedule: VPSchedule) -> torch.Tensor:
    """Latents float32 [B, *shape]. eps_fn: of the sampler's network. guidance_scale: one number, or one a step."""
    times = GRIDS[grid](num_steps, schedule)
    if sampler.network != "score":
        plan = _prox_plan(sampler, num_steps, times, schedule)
        if sampler.name.startswith("unipc"):
            eps_fn = eps_fn if sampler.network == "pairs" else _score_of_pairs(eps_fn, plan)
            return _diffusers("unipc", eps_fn, (0.0, *reversed(plan.tau)), shape, seeds, guidance_scale, schedule)
        eps_fn = prox_from_eps(eps_fn, schedule) if sampler.network in ("pairs", "score as prox") else eps_fn
        return sample(eps_fn, plan, shape, seeds, guidance_scale=guidance_scale)
    if sampler.name in ("dpm++2m", "sde-dpm++2m", "unipc"):
        return _diffusers(sampler.name, eps_fn, times, shape, seeds, guidance_scale, schedule)
    grid = times if sampler.name in ("ddim", "ddpm") else "uniform"
    return sample_score(eps_fn, score_plan(sampler.name, num_steps, schedule, grid), shape, seeds, guidance_scale=guidance_scale)


def query_times(sampler: Sampler, num_steps: int, grid: str, schedule: VPSchedule) -> list[float]:
    """The time whose noise the network sees in each step (tau, for a prox)."""
    times = GRIDS[grid](num_steps, schedule)
    if sampler.network != "score":
        return _prox_plan(sampler, num_steps, times, schedule).tau
    if sampler.name.startswith("euler"):
        return list(score_plan(sampler.name, num_steps, schedule).t)
    return list(reversed(times[1:]))


def _prox_plan(sampler: Sampler, num_steps: int, times, schedule: VPSchedule):
    name = "relaxed" if sampler.network in ("pairs", "prox as score") else sampler.name
    return make_plan(name, num_steps, schedule, times, **dict(sampler.options))


def _score_of_pairs(eps_fn, plan):
    """The eps_fn of a score network, from a prox network asked at the plan's pairs; it must be called in the plan's order."""
    rows = iter(zip(plan.t, plan.lam))

    def score_fn(x, tau, _, guidance_scale):
        t, lam = next(rows)
        total = plan.schedule.one_minus_alpha(t) + lam
        both = eps_fn(x * math.sqrt(1 + lam), torch.full_like(tau, t), torch.full_like(tau, lam), guidance_scale)
        return tuple(None if eps is None else eps * math.sqrt(total / lam) for eps in both)

    return score_fn


def make_scheduler(name: str, times, schedule: VPSchedule):
    """diffusers' scheduler for our schedule, stepping through the times N, ..., 1 of the grid and then to 0."""
    alphas = torch.tensor([1.0] + [schedule.alpha((i + 1) / TRAIN_STEPS) for i in range(TRAIN_STEPS)], dtype=torch.float64)
    betas = (1 - alphas[1:] / alphas[:-1]).numpy()
    if name == "unipc":
        scheduler = UniPCMultistepScheduler(trained_betas=betas, final_sigmas_type="zero")
    else:
        kind = "sde-dpmsolver++" if name.startswith("sde") else "dpmsolver++"
        scheduler = DPMSolverMultistepScheduler(trained_betas=betas, algorithm_type=kind, final_sigmas_type="zero")
    scheduler.set_timesteps(len(times) - 1)
    levels = [math.sqrt(schedule.one_minus_alpha(t) / schedule.alpha(t)) for t in reversed(times)]
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float32)
    return scheduler


@torch.no_grad()
def _diffusers(name, eps_fn, times, shape, seeds, guidance_scale, schedule):
    seeds = as_seeds(seeds)
    scheduler = make_scheduler(name, times, schedule)
    scales = per_step(guidance_scale, len(times) - 1)
    x = philox_normal(seeds, 0, tuple(shape))
    for i, (t, timestep, scale) in enumerate(zip(reversed(times[1:]), scheduler.timesteps, scales)):
        eps_cond, eps_uncond = evaluate(eps_fn, x, t, 0.0, scale)
        eps = eps_cond if eps_uncond is None else eps_uncond + scale * (eps_cond - eps_uncond)
        noise = {"variance_noise": philox_normal(seeds, i + 1, tuple(shape))} if name.startswith("sde") else {}
        x = scheduler.step(eps, timestep, x, **noise).prev_sample
    return x
