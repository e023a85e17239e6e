"""The mathematics: schedule, plans, the proximal sampler, proximal matching, and the score baseline."""

from .graphs import CudaGraphs
from .matching import LOSSES, PairSampler, expected_noise, noised, pair_coefficients, proximal_matching_loss, sample_mse
from .plan import PLANS, Plan, make_plan, time_grid
from .policy import Policy, Rollout, compare, guided_output, make_policy, rollout
from .precondition import precondition
from .proximal import clean_estimate, guidance_scales, guided, sample, trajectory
from .schedule import VPSchedule
from .score import (
    SCORE_SAMPLERS, ScorePlan, TimeSampler, ddim, ddpm, eps_from_prox, euler_maruyama, euler_ode,
    prox_from_eps, sample_score, score_loss, score_plan,
)

__all__ = [
    "CudaGraphs", "LOSSES", "PLANS", "SCORE_SAMPLERS", "PairSampler", "Plan", "Policy", "Rollout", "ScorePlan", "TimeSampler", "VPSchedule",
    "clean_estimate", "compare", "ddim", "ddpm", "eps_from_prox", "euler_maruyama", "euler_ode", "expected_noise", "guidance_scales", "guided",
    "guided_output", "make_plan", "make_policy", "noised", "pair_coefficients", "precondition", "prox_from_eps", "proximal_matching_loss", "rollout", "sample", "sample_mse", "sample_score",
    "score_loss", "score_plan", "time_grid", "trajectory",
]
