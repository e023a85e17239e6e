"""benchmarks/few_step.py: its samplers are diffusers' samplers, and it runs from end to end on portraits and on any shards."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from proxt2i.data.portraits import write_portraits
from proxt2i.diffusion import VPSchedule, prox_from_eps
from proxt2i.embedded import ASSETS, SHIPPED_MODEL
from proxt2i.ops import philox_normal

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import few_step  # noqa: E402
import few_step_samplers as samplers  # noqa: E402

SCHEDULE, SEEDS, SHAPE = VPSchedule(), torch.arange(3), (4, 5)


def score(x, t, lam=None, guidance_scale=1):
    t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))  # one number, or one an image
    return torch.sin(1.5 * x + 3 * t[:, None, None]) + 0.4 * x, None


def diffusers_loop(scheduler, num_steps, **noise_of_step):
    scheduler.set_timesteps(num_steps)
    x = philox_normal(SEEDS, 0, SHAPE)
    for i, timestep in enumerate(scheduler.timesteps):
        noise = {key: make(i) for key, make in noise_of_step.items()}
        x = scheduler.step(score(x, (int(timestep) + 1) / 1000)[0], timestep, x, **noise).prev_sample
    return x


def betas():
    alphas = np.array([SCHEDULE.alpha(i / 1000) for i in range(1001)])
    return 1 - alphas[1:] / alphas[:-1]


@pytest.mark.parametrize("num_steps", [4, 5, 8, 10, 20])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_ddim_and_ddpm_are_those_of_diffusers(monkeypatch, name, num_steps):
    draws = iter(range(1, 100))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: philox_normal(SEEDS, next(draws), SHAPE))
    kind = DDIMScheduler if name == "ddim" else DDPMScheduler
    theirs = diffusers_loop(kind(trained_betas=betas(), clip_sample=False, timestep_spacing="trailing"), num_steps)
    ours = samplers.draw(samplers.SAMPLERS[name], score, num_steps, "uniform", SHAPE, SEEDS, 1.0, SCHEDULE)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("num_steps", [4, 8, 10])
@pytest.mark.parametrize("name", ["dpm++2m", "sde-dpm++2m", "unipc"])
def test_other_grids_do_not_change_diffusers_schedulers(name, num_steps):
    """Setting `sigmas` to the noise levels of the uniform grid gives what the untouched scheduler does with trailing time steps."""
    options = dict(trained_betas=betas(), timestep_spacing="trailing", final_sigmas_type="zero")
    if name == "unipc":
        theirs = diffusers_loop(UniPCMultistepScheduler(**options), num_steps)
    else:
        kind = "sde-dpmsolver++" if name.startswith("sde") else "dpmsolver++"
        noise = {"variance_noise": lambda i: philox_normal(SEEDS, i + 1, SHAPE)} if name.startswith("sde") else {}
        theirs = diffusers_loop(DPMSolverMultistepScheduler(**options, algorithm_type=kind), num_steps, **noise)
    ours = samplers.draw(samplers.SAMPLERS[name], score, num_steps, "uniform", SHAPE, SEEDS, 1.0, SCHEDULE)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    other = samplers.draw(samplers.SAMPLERS[name], score, num_steps, "t^2", SHAPE, SEEDS, 1.0, SCHEDULE)
    assert (other - ours).abs().max() > 0.05


def test_unipc_on_the_prox_network_asks_for_its_pairs():
    """A prox network that is a score network in disguise must give what that one gives at the same noise levels."""
    sampler = samplers.SAMPLERS["unipc on prox"]
    ours = samplers.draw(sampler, prox_from_eps(score), 6, "uniform", SHAPE, SEEDS, 1.0, SCHEDULE)
    taus = (0.0, *reversed(samplers.query_times(sampler, 6, "uniform", SCHEDULE)))
    theirs = samplers._diffusers("unipc", score, taus, SHAPE, SEEDS, 1.0, SCHEDULE)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grid", samplers.GRIDS)
def test_grids_rise_from_0_to_1(grid):
    for num_steps in (4, 10, 20):
        times = samplers.GRIDS[grid](num_steps, SCHEDULE)
        assert len(times) == num_steps + 1 and times[0] == 0 and times[-1] == 1 and list(times) == sorted(set(times))


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_calls_its_network_once_a_step(name):
    sampler, calls = samplers.SAMPLERS[name], []

    def eps_fn(x, t, lam, guidance_scale):
        calls.append(guidance_scale)
        assert (lam > 0).all() if sampler.network.startswith("prox") else (lam == 0).all()
        return (x, None) if guidance_scale == 1 else (x, x)

    scales = [1.0] * 8 + [1.5] * 2
    assert samplers.draw(sampler, eps_fn, 10, "uniform", SHAPE, SEEDS, scales, SCHEDULE).shape == (3, 4, 5)
    assert calls == scales and len(samplers.query_times(sampler, 10, "uniform", SCHEDULE)) == 10


def run(monkeypatch, tmp_path, *settings):
    monkeypatch.setattr(sys, "argv", ["few_step.py", f"out={tmp_path / 'out'}", f"score={SHIPPED_MODEL}", "processes=1", "nfe=[4,6]", "search_nfe=[4]",
                                      "guidance=[1.0,1.5]", "guidance_below=[1.0,0.3]", "seeds=2", "samplers=[relaxed,hybrid]", *settings])
    few_step.main()
    return json.loads((tmp_path / "out" / "results.json").read_text())["rows"]


def test_the_benchmark_from_end_to_end(monkeypatch, tmp_path, capsys):
    rows = run(monkeypatch, tmp_path, "prompts=48", "search_prompts=32")
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert {(r["sampler"], r["nfe"]) for r in rows} == {("relaxed", 4), ("relaxed", 6), ("hybrid", 4), ("hybrid", 6)}
    for r in rows:
        assert r["accuracy"]["mean"] > 0.95 and 0 < r["fd"]["low"] <= r["fd"]["mean"] <= r["fd"]["high"] < 20 and 0.3 < r["diversity"] < 2
    assert "| 4 | relaxed | prox | uniform |" in capsys.readouterr().out
    assert (tmp_path / "out" / "few_step.png").stat().st_size > 10_000 and len(list((tmp_path / "out" / "grids").iterdir())) == 4
    again = run(monkeypatch, tmp_path, "prompts=48", "search_prompts=32")
    assert again == rows and cells == {path: path.stat().st_mtime_ns for path in cells}  # nothing is drawn twice


def test_the_benchmark_on_shards_with_a_clip_model(monkeypatch, tmp_path):
    write_portraits(tmp_path / "shards", 40, seed=5, progress=False)
    shutil.copytree(ASSETS / "clip", tmp_path / "clip")
    shutil.copytree(ASSETS / "tokenizer", tmp_path / "clip", dirs_exist_ok=True)
    rows = run(monkeypatch, tmp_path, "prompts=32", "search_prompts=16", f"shards={tmp_path / 'shards'}", f"clip={tmp_path / 'clip'}")
    assert all(r["accuracy"]["mean"] > 0.7 for r in rows)  # of 16 captions the picture's own is the nearest; chance is 1/16


def test_wrong_settings_are_refused(monkeypatch, tmp_path, capsys):
    for settings, message in ((["samplers=[ddimm]"], "unknown samplers"), (["clip=x"], "needs both"), (["prompts=8"], "must not exceed"),
                              (["nfee=[4]"], "nfee"), (["prompts=many"], "many"), ([f"prox={tmp_path / 'nowhere'}"], "nowhere")):
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path, *settings)
        assert message in capsys.readouterr().err
