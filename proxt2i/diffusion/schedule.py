"""The variance-preserving diffusion: x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) e, t in [0, 1]."""

import math
from dataclasses import dataclass

import torch


def _apply(function, value):
    """math.f for floats (float64), torch.f for tensors (their own dtype)."""
    return getattr(torch if isinstance(value, torch.Tensor) else math, function)(value)


@dataclass(frozen=True)
class VPSchedule:
    """beta(t) = beta_min + (beta_max - beta_min) t, and its integrals in closed form (ProxDM's .1 and 20).

    Every method takes floats (and computes in float64) or tensors (and keeps their dtype and device).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"beta_min={self.beta_min}, beta_max={self.beta_max}: need 0 < beta_min <= beta_max")

    def beta(self, t):
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def beta_integral(self, s, t):
        """gamma = integral of beta from s to t, exactly (beta is linear: the trapezoid rule has no error)."""
        return 0.5 * (self.beta(s) + self.beta(t)) * (t - s)

    def alpha(self, t):
        """alpha_t = exp(-integral of beta from 0 to t): the share of signal variance left at time t."""
        return _apply("exp", -self.beta_integral(0.0, t))

    def one_minus_alpha(self, t):
        """1 - alpha_t, the noise variance, without cancellation near t = 0."""
        return -_apply("expm1", -self.beta_integral(0.0, t))

    def tau(self, t, lam):
        """The time whose noise the training input y = x_t + sqrt(lam) n has: y / sqrt(1 + lam) is a sample of it (score.py)."""
        return self.t_of_alpha(self.alpha(t) / (1 + lam))

    def t_of_alpha(self, alpha):
        """The time with alpha_t = alpha, for alpha in (0, 1]; it exceeds 1 for alpha < alpha_1."""
        integral = -_apply("log", alpha)
        root = _apply("sqrt", self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral)
        return 2 * integral / (self.beta_min + root)

    # what a scheduler of diffusers asks for; networks.py has the schedules of other models' networks

    def timestep(self, t):
        """What the network is told at time t."""
        return t

    def time(self, timestep):
        return timestep

    def size(self, t):
        """sqrt(signal^2 + noise^2) of the network's input."""
        return 1.0
