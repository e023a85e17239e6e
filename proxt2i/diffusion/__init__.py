"""The mathematics: schedule, plans, the proximal sampler, proximal matching, and the score baseline."""

from .matching import LOSSES, PairSampler, expected_noise, noised, pair_coefficients, proximal_matching_loss, sample_mse
from .plan import PLANS, Plan, make_plan, time_grid
from .precondition import precondition
from .proximal import guidance_scales, guided, sample, trajectory
from .schedule import VPSchedule
from .score import (
    SCORE_SAMPLERS, ScorePlan, TimeSampler, ddim, ddpm, eps_from_prox, euler_maruyama, euler_ode,
    prox_from_eps, sample_score, score_loss, score_plan,
)

__all__ = [
    "LOSSES", "PLANS", "SCORE_SAMPLERS", "PairSampler", "Plan", "ScorePlan", "TimeSampler", "VPSchedule",
    "ddim", "ddpm", "eps_from_prox", "euler_maruyama", "euler_ode", "expected_noise", "guidance_scales", "guided", "make_plan", "noised", "pair_coefficients",
    "precondition", "prox_from_eps", "proximal_matching_loss", "sample", "sample_mse", "sample_score", "score_loss",
    "score_plan", "time_grid", "trajectory",
]
