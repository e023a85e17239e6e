"""Networks of other models as posterior-mean proxes: their noise schedules, and the fused step in their own coordinates (ours).

A network that predicts e, v or the flow from x = signal x_0 + noise e knows E[x_0 | x] and so, for every pair (t, lam) whose input has
that noise, the posterior-mean prox of the pair (score.py, "equivalence"). Nothing is trained. With g = sqrt(signal^2 + noise^2), x / g is
a sample of the variance-preserving diffusion at alpha = (signal / g)^2, and the prox's input is y = sqrt(1 + lam) x / g.
"""

import math
from collections.abc import Sequence

from .plan import Plan
from .schedule import VPSchedule

# Pure noise counts as this much signal, because the clean-image prox of none at all has an infinite step.
SMALLEST_ALPHA = 1e-12
LARGEST_SIGMA = 1 - 1e-9


class TableSchedule:
    """A discrete diffusion, alphas_cumprod[n] for n = 0, ..., T - 1, as a schedule for `make_plan`.

    Timestep n is the time (n + 1) / T; time 0 is the clean image. Between timesteps ln alpha is linear, which is a constant beta, so that
    gamma of whole timesteps is the chain's own -sum ln(1 - beta_n).
    """

    def __init__(self, alphas_cumprod: Sequence[float]):
        self.integrals = [0.0, *(-math.log(max(alpha, SMALLEST_ALPHA)) for alpha in map(float, alphas_cumprod))]

    @property
    def num_timesteps(self) -> int:
        return len(self.integrals) - 1

    def _integral(self, t: float) -> float:
        n = min(int(t * self.num_timesteps), self.num_timesteps - 1)
        low, high = self.integrals[n], self.integrals[n + 1]
        return low + (high - low) * (t * self.num_timesteps - n)

    def beta_integral(self, s: float, t: float) -> float:
        return self._integral(t) - self._integral(s)

    def alpha(self, t: float) -> float:
        return math.exp(-self._integral(t))

    def one_minus_alpha(self, t: float) -> float:
        return -math.expm1(-self._integral(t))

    def t_of_alpha(self, alpha: float) -> float:
        """Beyond 1, where "backward" asks in its first steps, with the last beta; ValueError beyond 1.01."""
        integral, last = -math.log(alpha), self.num_timesteps - 1
        n = next((n for n in range(last) if integral <= self.integrals[n + 1]), last)
        low, high = self.integrals[n], self.integrals[n + 1]
        t = (n + (integral - low) / (high - low)) / self.num_timesteps
        if t > 1.01:
            raise ValueError(f"the network would be asked at timestep {self.timestep(t):.0f} of {self.num_timesteps}: take more steps or another plan")
        return t

    def tau(self, t: float, lam: float) -> float:
        return self.t_of_alpha(self.alpha(t) / (1 + lam))

    def timestep(self, t: float) -> float:
        """What the network is told at time t; fractional between two timesteps."""
        return t * self.num_timesteps - 1

    def time(self, timestep: float) -> float:
        return (timestep + 1) / self.num_timesteps

    def size(self, t: float) -> float:
        return 1.0


class FlowSchedule:
    """x = (1 - sigma) x_0 + sigma e. The time is sigma; alpha = (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2)."""

    def __init__(self, num_timesteps: int = 1000):
        self.num_timesteps = num_timesteps

    def alpha(self, t: float) -> float:
        return (1 - t) ** 2 / self.size(t) ** 2

    def one_minus_alpha(self, t: float) -> float:
        return (t / self.size(t)) ** 2

    def size(self, t: float) -> float:
        """g = sqrt(signal^2 + noise^2)."""
        return math.hypot(1 - t, t)

    def timestep(self, t: float) -> float:
        return t * self.num_timesteps

    def time(self, timestep: float) -> float:
        return timestep / self.num_timesteps


def network_rows(plan: Plan, times: Sequence[float], prediction: str, schedule: VPSchedule | TableSchedule | FlowSchedule) -> list[dict[str, float]]:
    """The coefficients of the fused step in the network's coordinates: `ops.step_row`'s arguments for each step of the plan.

    times: of the network's inputs x. y = k x with k = sqrt(1 + lam) / g, and with e = p x + q output the relaxed prox
    y - rho sqrt(lam) eps_n, where eps_n = sqrt(lam / tot) e and tot = 1 - alpha_t + lam, is

        (k - r p) (x - s output)        r = rho lam / sqrt(tot)        s = r q / (k - r p)

    Likewise the clean image D = (y - sqrt(tot) e) / sqrt(alpha_t). The next state is divided by its own k; the last is the image itself.
    """
    rows = []
    scales = [math.sqrt(1 + lam) / schedule.size(time) for lam, time in zip(plan.lam, times)] + [1.0]
    a, b, m = (column[1:] + (end,) for column, end in ((plan.a, 1.0), (plan.b, 0.0), (plan.m, 0.0)))
    for i, (t, lam, rho, time) in enumerate(zip(plan.t, plan.lam, plan.rho, times)):
        k, total, clean = scales[i], plan.schedule.one_minus_alpha(t) + lam, math.sqrt(plan.schedule.alpha(t))
        p, q = _noise(prediction, time, lam, total)
        r = rho * lam / math.sqrt(total)
        of_x = k - r * p
        rows.append(dict(sqrt_lam=r * q / of_x, a=a[i] * of_x / scales[i + 1], b=b[i] / scales[i + 1], memory=m[i] / scales[i + 1],
                         clean_y=(k - math.sqrt(total) * p) / clean, clean_eps=math.sqrt(total) * q / clean, draw=i + 2))
    return rows


def _noise(prediction: str, time: float, lam: float, total: float) -> tuple[float, float]:
    """(p, q) with e = p x + q output."""
    if prediction == "v_prediction":  # v = sqrt(alpha) e - sqrt(1 - alpha) x_0, at 1 - alpha = tot / (1 + lam)
        return math.sqrt(total / (1 + lam)), math.sqrt(max(1 - total / (1 + lam), 0.0))
    if prediction == "flow_prediction":  # v = e - x_0
        return 1.0, 1 - time
    return 0.0, math.sqrt(total / lam) if prediction == "prox" else 1.0
