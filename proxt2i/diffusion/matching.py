"""Learning the prox: training pairs and the proximal matching loss (LPN, ProxDM eq. 7-8, ProxT2I).

    y = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) e + sqrt(lam) n        loss(eps_theta(y, t, lam, c), n)

The target is n, the noise added for the prox: neither e nor the sum of both. `expected_noise` is its mean given x_0 and y.
Training itself runs the fused operators of `proxt2i.ops.matching`, which these functions are the plain form of.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.matching import LOSSES, proximal_loss
from .plan import check_name, make_plan
from .schedule import VPSchedule


class PairSampler:
    """Draws (t, lam) from the rows of the plans we sample with: training pairs are the sampler's own queries.

    A step count N is drawn with probability proportional to `weights` (default: equal), then k in 1..N with probability
    proportional to (alpha_t / (1 - alpha_t + lam))^snr_power. Power 0 is uniform, as in ProxDM (which draws from larger step
    counts; the default counts are ours). Above 0 (ours) fewer draws go to pairs whose y hardly depends on x_0, where there
    is next to nothing to learn.

    table: list of (t, lam, (N, k)), one row a bucket;  probabilities: float64 [rows];
    bucket_names: "N4/k3", ...
    """

    def __init__(self, step_counts: Sequence[int] = (4, 5, 6, 8, 10, 20), plan: str = "hybrid",
                 schedule: VPSchedule = VPSchedule(), weights: Sequence[float] | None = None, grid="uniform",
                 snr_power: float = 0.0):
        if not step_counts or len(set(step_counts)) != len(step_counts):
            raise ValueError(f"step_counts={tuple(step_counts)}: need at least one, each once")
        weights = [1.0] * len(step_counts) if weights is None else [float(w) for w in weights]
        if len(weights) != len(step_counts) or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ValueError(f"weights={weights}: need one per step count {tuple(step_counts)}, "
                             "none negative, not all 0")
        self.table, probabilities = [], []
        for num_steps, weight in zip(step_counts, weights):
            p = make_plan(plan, num_steps, schedule, grid)
            self.table += [(t, lam, (num_steps, num_steps - i)) for i, (t, lam) in enumerate(zip(p.t, p.lam))]
            share = [(schedule.alpha(t) / (schedule.one_minus_alpha(t) + lam)) ** snr_power for t, lam in zip(p.t, p.lam)]
            probabilities += [weight / sum(weights) * s / sum(share) for s in share]
        self.bucket_names = [f"N{num_steps}/k{k}" for _, _, (num_steps, k) in self.table]
        self.probabilities = torch.tensor(probabilities, dtype=torch.float64)
        self._inner_edges = self.probabilities.cumsum(0)[:-1]
        self._t, self._lam = (torch.tensor(column, dtype=torch.float32) for column in list(zip(*self.table))[:2])

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pair per uniform, nothing else random: u in [0, 1), [B] -> t, lam float32, bucket int64, each [B]."""
        bucket = torch.searchsorted(self._inner_edges.to(u.device), u.double(), right=True)
        return self._t.to(u.device)[bucket], self._lam.to(u.device)[bucket], bucket


def pair_coefficients(t: Tensor, lam: Tensor, schedule: VPSchedule = VPSchedule()) -> Tensor:
    """sqrt(alpha_t), sqrt(1 - alpha_t), sqrt(lam): t, lam [B] -> [B, 3] in their dtype."""
    return torch.stack([schedule.alpha(t), schedule.one_minus_alpha(t), lam], dim=1).sqrt()


def noised(x0: Tensor, t: Tensor, lam: Tensor, e: Tensor, n: Tensor, schedule: VPSchedule = VPSchedule()) -> Tensor:
    """The network's input y = sqrt(alpha_t) x0 + sqrt(1 - alpha_t) e + sqrt(lam) n.

    x0, e, n: [B, ...], e and n independent N(0, I);  t, lam: [B].  float32 (float64 if x0 is).
    """
    x0 = _wide(x0)
    signal, noise, prox_noise = pair_coefficients(t, lam, schedule).to(x0.dtype).T.reshape(3, -1, *[1] * (x0.dim() - 1))
    return signal * x0 + noise * e + prox_noise * n


def expected_noise(x0: Tensor, y: Tensor, t: Tensor, lam: Tensor, schedule: VPSchedule = VPSchedule()) -> Tensor:
    """E[n | x0, y] = sqrt(lam) / (1 - alpha_t + lam) * (y - sqrt(alpha_t) x0), the part of n that x0 and y determine (ours).

    Given x0, y - sqrt(alpha_t) x0 = sqrt(1 - alpha_t) e + sqrt(lam) n, and the mean of n given that sum is its share of the
    variance. As a target it has the same mean given y as n itself (tower rule), hence the same minimiser of the mse, and
    nothing that no network could predict: the floor (1 - alpha_t) / (1 - alpha_t + lam) of the mse, and its gradient noise,
    are gone. At t = 0 it is n. Shapes and dtypes as in `noised`.
    """
    x0 = _wide(x0)
    variance = schedule.one_minus_alpha(t) + lam
    signal, factor = (v.to(x0.dtype).reshape(-1, *[1] * (x0.dim() - 1)) for v in (schedule.alpha(t).sqrt(), lam.sqrt() / variance))
    return factor * (y - signal * x0)


def proximal_matching_loss(eps: Tensor, n: Tensor, zeta: float = 1.0, kind: str = "prox") -> Tensor:
    """Loss of each sample, [B], in float32 (float64 if eps is).  eps, n: [B, ...], any float dtype.

    kind "prox": 1 - exp(-mse / zeta^2), mse the mean over a sample's elements (ProxDM eq. 7). Its gradient is the
        mse's times exp(-mse / zeta^2) / zeta^2: samples already fitted count most. zeta -> 0 leads to the mode of n
        given y, zeta -> inf to its mean.
    kind "l1": mean |eps - n| (ProxDM's first training phase).   kind "l2": the mse.
    """
    check_name("loss kind", kind, LOSSES)
    if kind == "l1":
        return (_wide(eps) - n).abs().flatten(1).mean(1)
    mse = sample_mse(eps, n)
    if kind == "l2":
        return mse
    return proximal_loss(mse, zeta)


def sample_mse(eps: Tensor, n: Tensor) -> Tensor:
    """Mean squared error of each sample: [B, ...], [B, ...] -> [B] in float32 (float64 if eps is)."""
    return (_wide(eps) - n).square().flatten(1).mean(1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
