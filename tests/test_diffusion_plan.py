"""Schedule and plans against closed forms."""

import math

import pytest
import torch

from proxt2i.diffusion import PLANS, VPSchedule, make_plan, time_grid

SCHEDULE = VPSchedule()

# (t, lam) of the hybrid plan in sampling order, worked out by hand from gamma_k = [.1 + 19.9 (2k - 1)/(2N)] / N
HYBRID_QUERIES = {
    4: [(0.75, 4.378), (0.5, 3.134), (0.25, 1.891), (0, 0.647)],
    6: [(0.833, 3.057), (0.667, 2.504), (0.5, 1.951), (0.333, 1.399), (0.167, 0.846), (0, 0.293)],
    10: [(0.9, 1.901), (0.8, 1.702), (0.7, 1.503), (0.6, 1.304), (0.5, 1.105),
         (0.4, 0.906), (0.3, 0.707), (0.2, 0.508), (0.1, 0.309), (0, 0.110)],
}


def test_beta_integral_is_the_integral_of_beta():
    points = torch.linspace(0.2, 0.9, 10_001, dtype=torch.float64)
    assert SCHEDULE.beta_integral(0.2, 0.9) == pytest.approx(torch.trapezoid(SCHEDULE.beta(points), points).item(), rel=1e-12)
    assert SCHEDULE.beta_integral(0.0, 1.0) == pytest.approx(0.1 + 9.95, rel=1e-12)


@pytest.mark.parametrize("t, alpha", [(0, 1), (0.1, 0.896), (0.25, 0.524), (0.5, 0.079), (0.75, 0.0034), (1, 4.3e-5)])
def test_alpha(t, alpha):
    assert SCHEDULE.alpha(t) == pytest.approx(alpha, rel=0.02)
    assert SCHEDULE.alpha(t) == pytest.approx(math.exp(-(0.1 * t + 9.95 * t * t)), rel=1e-12)
    assert SCHEDULE.t_of_alpha(SCHEDULE.alpha(t)) == pytest.approx(t, abs=1e-12)
    assert SCHEDULE.alpha(t) + SCHEDULE.one_minus_alpha(t) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_tensors_in_tensors_out(dtype, tolerance):
    t = torch.tensor([0.0, 1e-4, 0.3, 1.0], dtype=dtype)
    for function in (SCHEDULE.beta, SCHEDULE.alpha, SCHEDULE.one_minus_alpha, lambda t: SCHEDULE.beta_integral(0.0, t)):
        result = function(t)
        assert result.dtype == dtype
        expected = torch.tensor([function(v) for v in t.tolist()], dtype=torch.float64)
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(SCHEDULE.t_of_alpha(SCHEDULE.alpha(t)), t, rtol=1e-4, atol=1e-5)


def test_constant_beta():
    constant = VPSchedule(2.0, 2.0)
    assert constant.alpha(0.5) == pytest.approx(math.exp(-1))
    assert constant.t_of_alpha(math.exp(-1)) == pytest.approx(0.5)


@pytest.mark.parametrize("betas", [(0, 20), (-1, 20), (20, 0.1), (0.1, math.inf), (math.nan, 1)])
def test_schedule_refuses_bad_betas(betas):
    with pytest.raises(ValueError, match="beta_min"):
        VPSchedule(*betas)


@pytest.mark.parametrize("num_steps", HYBRID_QUERIES)
def test_hybrid_queries(num_steps):
    plan = make_plan("hybrid", num_steps)
    assert list(zip(plan.t, plan.lam)) == [pytest.approx(row, abs=6e-4) for row in HYBRID_QUERIES[num_steps]]
    assert plan.t[-1] == 0


@pytest.mark.parametrize("name", [name for name in PLANS if name != "relaxed"])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_rows_follow_their_formulas(name, num_steps):
    plan = make_plan(name, num_steps)
    assert (plan.name, plan.num_steps) == (name, num_steps)
    assert {len(column) for column in (plan.t, plan.lam, plan.a, plan.b)} == {num_steps}
    assert plan.rho == (1,) * num_steps and plan.m == (0,) * num_steps
    for i, (t, lam, a, b) in enumerate(zip(plan.t, plan.lam, plan.a, plan.b)):
        k = num_steps - i
        g = (0.1 + 19.9 * (2 * k - 1) / (2 * num_steps)) / num_steps
        expected = {
            "hybrid": (g, 1 + g / 2, g**0.5),
            "backward": (2 * g / (2 - g), 2 / (2 - g), 2 / (2 - g) * g**0.5),
            "variance_preserving": (((1 + g / 2) ** 2 + g) ** 0.5 - 1, 1 + g / 2, g**0.5),
            "ode": (g / 2, 1 + g / 2, 0),
        }[name]
        assert t == pytest.approx((k - 1) / num_steps, abs=1e-15)
        assert (lam, a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_steps", [1, 4, 6, 20])
def test_variance_preserving_keeps_unit_variance(num_steps):
    plan = make_plan("variance_preserving", num_steps)
    for lam, a, b in zip(plan.lam, plan.a, plan.b):  # prox of N(0, 1): y / (1 + lam)
        assert (a**2 + b**2) / (1 + lam) ** 2 == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 4, 9])
def test_backward_refuses_too_few_steps(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps={num_steps}\b.*smallest valid num_steps on this grid is 10"):
        make_plan("backward", num_steps)


def test_backward_accepts_ten_steps():
    plan = make_plan("backward", 10)
    assert plan.lam[0] == pytest.approx(38.2, abs=0.05)
    assert make_plan("backward", 20).lam[0] == pytest.approx(1.90, abs=0.005)


def test_backward_names_the_smallest_count_of_a_warped_grid():
    grid = lambda u: math.sqrt(u)  # denser where beta is large
    with pytest.raises(ValueError) as error:
        make_plan("backward", 3, grid=grid)
    smallest = int(str(error.value).split("grid is ")[1].split()[0])
    assert 3 < smallest < 10
    make_plan("backward", smallest, grid=grid)
    with pytest.raises(ValueError):
        make_plan("backward", smallest - 1, grid=grid)
    with pytest.raises(ValueError, match="more, closer times"):
        make_plan("backward", 2, grid=(0, 0.5, 1))


def test_grids():
    assert time_grid(4) == (0, 0.25, 0.5, 0.75, 1)
    assert time_grid(4, lambda u: u * u) == (0, 0.0625, 0.25, 0.5625, 1)
    plan = make_plan("hybrid", 2, grid=(0, 0.1, 1))
    assert plan.t == (0.1, 0)
    assert plan.lam == (SCHEDULE.beta_integral(0.1, 1.0), SCHEDULE.beta_integral(0.0, 0.1))
    assert sum(make_plan("hybrid", 7, grid=lambda u: u**1.5).lam) == pytest.approx(10.05)


@pytest.mark.parametrize("grid", [(0, 0.6, 0.5, 1), (0, 0.5, 0.5, 1), (0.1, 0.4, 0.5, 1), (0, 0.4, 0.5, 0.9), (0, math.nan, 0.5, 1)])
def test_bad_grids_are_refused(grid):
    with pytest.raises(ValueError, match="rise strictly"):
        make_plan("hybrid", 3, grid=grid)


def test_wrong_sizes_and_names_are_refused():
    with pytest.raises(ValueError, match="3 times; num_steps=3 needs 4"):
        make_plan("hybrid", 3, grid=(0, 0.5, 1))
    with pytest.raises(ValueError, match="unknown grid 'unifrom'.*'uniform'"):
        make_plan("hybrid", 3, grid="unifrom")
    with pytest.raises(ValueError, match=r"unknown plan 'hybird' \(did you mean 'hybrid'\?\); valid: relaxed, hybrid, backward, variance_"):
        make_plan("hybird", 3)
    with pytest.raises(ValueError, match="did you mean 'variance_preserving'"):
        make_plan("variance-preserving", 3)
    for num_steps in (0, -4, 2.5, True, "4"):
        with pytest.raises(ValueError, match="num_steps"):
            make_plan("hybrid", num_steps)
