"""Plans: the table of numbers that the trainer, the sampler and the kernels share.

A sampler of N steps on the times 0 = t_0 < ... < t_N = 1 repeats, for k = N, ..., 1,

    y_k = a_k x_k + b_k z_k            x_{k-1} = y_k + rho_k (prox_{-lam_k ln p_{t_{k-1}}}(y_k) - y_k)

and a plan is the list of its rows (t_{k-1}, lam_k, a_k, b_k, rho_k). With gamma_k = integral of beta from t_{k-1} to t_k and
rho = 1:

    name                 a              b                      lam                            source
    hybrid               1 + gamma/2    sqrt(gamma)            gamma                          ProxDM, ProxT2I
    backward             1/(1-gamma/2)  sqrt(gamma)/(1-gamma/2)  gamma/(1-gamma/2)            ProxDM (PDA)
    variance_preserving  1 + gamma/2    sqrt(gamma)            sqrt((1+gamma/2)^2+gamma) - 1  ours: keeps N(0, I)
    ode                  1 + gamma/2    0                      gamma/2                        ours: probability flow

The plan `relaxed` (ours) asks the network for the same proxes as `hybrid`, but shows it only what it was trained on, and goes
as far (rho) as the noise that the next state must have demands: see `_relaxed`.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .schedule import VPSchedule

Grid = str | Callable[[float], float] | Sequence[float]


def _hybrid(gamma):
    return gamma, 1 + gamma / 2, math.sqrt(gamma)


def _backward(gamma):
    shrink = 1 - gamma / 2
    return gamma / shrink, 1 / shrink, math.sqrt(gamma) / shrink


def _variance_preserving(gamma):
    # var(y) = (1 + gamma/2)^2 + gamma = (1 + lam)^2 for unit-variance x; the prox of N(0, I) divides y by 1 + lam
    return math.sqrt((1 + gamma / 2) ** 2 + gamma) - 1, 1 + gamma / 2, math.sqrt(gamma)


def _ode(gamma):
    return gamma / 2, 1 + gamma / 2, 0.0


_ROWS = {"hybrid": _hybrid, "backward": _backward, "variance_preserving": _variance_preserving, "ode": _ode}
PLANS = ("relaxed", *_ROWS)


@dataclass(frozen=True)
class Plan:
    """Rows in sampling order k = N, ..., 1, as tuples of N floats.

    t: the time t_{k-1} of the density whose prox is taken (the smaller time; the last is exactly 0);
    lam: the prox's step size; a, b: scale of x and of the fresh noise that make the prox's input y;
    rho: how far x goes from y to the prox (1: all the way);
    m: y += m (D - D'), D and D' the clean images that the last two proxes imply (0: a plan without memory).
    """

    name: str
    num_steps: int
    t: tuple[float, ...]
    lam: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    rho: tuple[float, ...]
    m: tuple[float, ...]
    schedule: VPSchedule = VPSchedule()

    @property
    def tau(self) -> list[float]:
        """The times whose noise the network was trained to see at each step."""
        return [self.schedule.tau(t, lam) for t, lam in zip(self.t, self.lam)]


def make_plan(name: str, num_steps: int, schedule: VPSchedule = VPSchedule(), grid: Grid = "uniform", *,
              eta: float = 1.0, extrapolation: float = 1.0) -> Plan:
    """The plan `name` (one of PLANS) with `num_steps` steps on `grid` (see `time_grid`).

    eta, extrapolation: of the plan "relaxed", which see; the others have no use for them.
    Raises ValueError for an unknown name, a step count below 1, a bad grid, or too few steps for "backward",
    whose every gamma_k must be below 2.
    """
    check_name("plan", name, PLANS)
    times = time_grid(num_steps, grid)
    gammas = _gammas(times, schedule)
    if name == "backward" and max(gammas) >= 2:
        raise ValueError(_too_few_steps(num_steps, max(gammas), schedule, grid))
    t = tuple(reversed(times[:-1]))
    if name == "relaxed":
        return Plan(name, num_steps, t, *_relaxed(t, tuple(reversed(gammas)), schedule, eta, extrapolation), schedule)  # type: ignore[call-arg]
    lam, a, b = zip(*(_ROWS[name](gamma) for gamma in reversed(gammas)))
    return Plan(name, num_steps, t, lam, a, b, (1.0,) * num_steps, (0.0,) * num_steps, schedule)


def relaxed_plan(alphas: Sequence[float], schedule: VPSchedule, eta: float = 1.0, extrapolation: float = 1.0) -> Plan:
    """The plan "relaxed" that shows the network the noise levels `alphas`, rising, in (0, 1), through proxes of the clean density.

    The split of a level into t and lam does not matter to a posterior mean: all are the same function of the input.
    """
    t, lam = (0.0,) * len(alphas), tuple((1 - alpha) / alpha for alpha in alphas)
    return Plan("relaxed", len(alphas), t, *_relaxed(t, lam, schedule, eta, extrapolation), schedule)  # type: ignore[call-arg]


def _relaxed(t, lam, schedule, eta, extrapolation):
    """Columns lam, a, b, rho, m of the plan that never shows the network more noise than it was trained on (ours).

    sqrt(1 + lam) x_tau is distributed like the training input of the pair (t, lam) when alpha_tau = alpha_t / (1 + lam)
    (score.py, "equivalence"). So the states are kept at the times tau_k of the pairs, y_k = sqrt(1 + lam_k) x_{tau_k}, and the
    step from tau = tau_k to tau' = tau_{k-1}, with the clean image D that the prox implies,

        D = (y - (1 - alpha_t + lam) / sqrt(lam) eps) / sqrt(alpha_t)                     x_tau = sqrt(alpha_tau) D + sigma_tau e
        x_tau' = sqrt(alpha_tau') D + sqrt(sigma_tau'^2 - c^2) e + c z,                   sigma_tau^2 = 1 - alpha_tau

    leaves a point mass the variance it has at tau' for every c. eta: c in units of the std of the posterior of x_tau' given
    x_tau and D, so that c = 0 (eta = 0) makes a DDIM step and eta = 1 an ancestral step of the *relaxed prox*: D and e are
    affine in y and eps, so x_tau' is a multiple of y - rho sqrt(lam) eps, plus noise. extrapolation w: D is extended
    linearly in the half-log-SNR to the middle of the step, as in DPM-Solver++(2M), D + w (D - D_previous) / (2 r).
    """
    alphas = [schedule.alpha(s) / (1 + l) for s, l in zip(t, lam)] + [1.0]
    noises = [(schedule.one_minus_alpha(s) + l) / (1 + l) for s, l in zip(t, lam)] + [0.0]
    a, b, rho, m = [math.sqrt(1 + lam[0])], [0.0], [], [0.0]
    step_before = None
    for i, (s, l) in enumerate(zip(t, lam)):
        alpha, alpha_next, noise, noise_next = alphas[i], alphas[i + 1], noises[i], noises[i + 1]
        variance = eta**2 * noise_next / noise * (1 - alpha / alpha_next)
        of_e = math.sqrt(max(noise_next - variance, 0.0) / noise)
        of_d = math.sqrt(alpha_next) - of_e * math.sqrt(alpha)
        clean = 1 / math.sqrt(schedule.alpha(s))
        of_y = of_e / math.sqrt(1 + l) + of_d * clean
        rho.append(of_d * clean * (schedule.one_minus_alpha(s) + l) / l / of_y)
        if i + 1 == len(t):
            return lam, tuple(a), tuple(b), tuple(rho), tuple(m)
        step = 0.5 * math.log(alpha_next * noise / (noise_next * alpha))  # in half-log-SNR
        scale = math.sqrt(1 + lam[i + 1])
        a.append(scale * of_y)
        b.append(scale * math.sqrt(min(variance, noise_next)))
        m.append(0.0 if step_before is None else scale * of_d * extrapolation * step / (2 * step_before))
        step_before = step


def time_grid(num_steps: int, grid: Grid = "uniform") -> tuple[float, ...]:
    """Times t_0 = 0 < t_1 < ... < t_N = 1.

    grid: "uniform" (t_k = k/N), a function that warps [0, 1] onto itself (t_k = grid(k/N), e.g.
    `lambda u: u**1.5`), or the N + 1 times themselves.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}: need an integer of at least 1")
    uniform = tuple(k / num_steps for k in range(num_steps + 1))
    if isinstance(grid, str):
        check_name("grid", grid, ("uniform",))
        return uniform
    times = tuple(float(t) for t in (map(grid, uniform) if callable(grid) else grid))
    if len(times) != num_steps + 1:
        raise ValueError(f"grid has {len(times)} times; num_steps={num_steps} needs {num_steps + 1}, both ends in")
    if times[0] != 0 or times[-1] != 1 or not all(s < t for s, t in zip(times, times[1:])):
        raise ValueError(f"grid must rise strictly from exactly 0 to exactly 1, got {times}")
    return times


def check_name(field: str, name: str, valid: Sequence[str]) -> None:
    """ValueError that lists the valid names, and the nearest, unless `name` is one of them."""
    if name in valid:
        return
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown {field} {name!r}{hint}; valid: {', '.join(valid)}")


def _gammas(times, schedule):
    return [schedule.beta_integral(s, t) for s, t in zip(times, times[1:])]


def _too_few_steps(num_steps, worst, schedule, grid):
    problem = f'plan "backward" needs every gamma_k < 2, but num_steps={num_steps} has one of {worst:.3f}'
    if not (isinstance(grid, str) or callable(grid)):
        return f"{problem}; use more, closer times in grid or another plan"
    enough = (n for n in range(1, 10_000) if max(_gammas(time_grid(n, grid), schedule)) < 2)
    smallest = next(enough, None)
    fix = f"the smallest valid num_steps on this grid is {smallest}" if smallest else "no num_steps will do"
    return f"{problem}; {fix} (the other plans take any)"
