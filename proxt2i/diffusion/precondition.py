"""Preconditioning of the prox network, in the spirit of EDM (Karras et al., 2022, section 5), derived for prox pairs.

With unit-variance data the best linear guess of n from y = sqrt(alpha) x_0 + sqrt(1 - alpha) e + sqrt(lam) n is
sqrt(lam) / (1 + lam) y. A network that predicts eps itself has to reproduce that guess to many digits where y is nearly
pure noise: all the picture there is, is in a remainder of variance c_out^2, down to 1e-4 in our plans. So the network
predicts the remainder, scaled to unit variance:

    eps_theta = c_skip y + c_out F_theta        c_skip = sqrt(lam) / (1 + lam)        c_out^2 = lam alpha / (v (1 + lam))

with v = 1 - alpha + lam. c_out^2 is the variance of E[n | x_0, y] - c_skip y (`matching.expected_noise`): with
y = sqrt(alpha) x_0 + sqrt(v) z it is sqrt(lam) alpha / (sqrt(v) (alpha + v)) z - sqrt(lam alpha) / (alpha + v) x_0, and
alpha + v = 1 + lam.

A score network predicts all of the noise in x_t (lam = 0). The same derivation gives it c_skip = sqrt(1 - alpha) and
c_out = sqrt(alpha): F = sqrt(alpha) e - sqrt(1 - alpha) x_0 is the "v" of Salimans & Ho (2022). It is also what the prox
network has at t = 0, lam = (1 - alpha) / alpha, where n is all the noise in y = x / sqrt(alpha).
"""

import torch
from torch import Tensor

from .schedule import VPSchedule


def precondition(t: Tensor, lam: Tensor, schedule: VPSchedule = VPSchedule()) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) for t, lam of any shape, in their dtype; where lam = 0, those of a score network."""
    alpha, variance = schedule.alpha(t), schedule.one_minus_alpha(t) + lam
    of_all_noise = lam == 0
    c_skip = torch.where(of_all_noise, variance, lam).sqrt() / (1 + lam)
    c_out = torch.where(of_all_noise, alpha, lam * alpha / (variance * (1 + lam))).sqrt()
    return c_skip, c_out
