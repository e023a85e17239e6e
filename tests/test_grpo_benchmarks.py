"""benchmarks/grpo_quality.py and reward_sensitivity.py: what they draw, and what they read out of a run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.grpo_config import load_config
from proxt2i.models.bundle import load_bundle
from proxt2i.pipeline import generate

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import grpo_quality  # noqa: E402
import reward_sensitivity  # noqa: E402


def test_models_are_drawn_as_the_sampler_draws_them_without_memory():
    bundle = load_bundle(SHIPPED_MODEL)
    how = load_config(grpo_quality.ROOT / "configs" / "grpo_portraits.yaml").rollout
    captions, seeds = ["a man with a beanie", "a smiling woman with long red hair"] * 2, torch.arange(4)
    drawn = grpo_quality.draw(bundle, how, 4, captions, seeds)
    bundle.settings = replace(bundle.settings, extrapolation=0.0)
    expected = generate(bundle, captions, seeds.tolist(), num_steps=4, plan=how.plan, guidance_scale=how.guidance, guidance_below=how.guidance_below, progress=False)
    assert (drawn.int() - expected.int()).abs().max() <= 1  # another batch, other rounding


def test_changes_are_paired():
    rows = [{"kind": "prox", "plan": "relaxed", "steps": 4, "when": when, "all_right": 0.5, "error": 0.1, "accuracy": 0.9, "fd": 3.0, "diversity": 1.0,
             "diversity_of_right": 0.9, **change} for when, change in (("before", {}), ("after", {"change": 0.125, "change_error": 0.01}))]
    lines = grpo_quality.table(rows).splitlines()
    assert "| – |" in lines[2] and "+0.125 ± 0.010" in lines[3]
    assert grpo_quality.error([0, 1, 0, 1]) == pytest.approx(0.288675, rel=1e-4)


def test_choosing_among_the_pictures_gives_the_variance_of_the_mixture():
    """Right pictures around +1, wrong ones around -1, both with variance 1/4: a share p of right ones has variance 1/4 + 4 p (1 - p)."""
    torch.manual_seed(0)
    right = torch.rand(64, 400) < 0.5
    features = torch.where(right, 1.0, -1.0)[..., None] + 0.5 * torch.randn(64, 400, 1)
    for odds in (1.0, 3.0, 1e3):
        share, variance = grpo_quality.by_choice(features, right, odds)
        assert share == pytest.approx(odds / (odds + 1), abs=0.01) and variance == pytest.approx(0.25 + 4 * share * (1 - share), rel=0.02)


def test_the_curve_of_a_run_is_its_looks_and_the_start(tmp_path):
    looks = [{"eval/jpeg_compressibility": -4.0, "eval/portraits": 0.9, "eval/pickscore": 21.0, "diversity/pictures": 0.02}, {"eval/jpeg_compressibility": -2.0, "eval/portraits": 0.6, "eval/pickscore": 20.0, "diversity/pictures": 0.004}]
    rows = [{"images": images, "kl": 0.1 * i, "alarms": i // 2, **looks[i // 2]} for i, images in enumerate((64, 128, 192, 256))]
    rows.insert(2, {"images": 160, "kl": 0.1, "alarms": 0})  # after an interruption, before the next look
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "log.txt").write_text("x\nALARM at 1,192 images: diversity of pictures is down to 20%; a rose while b fell; guard.alarm=warn\n")
    curve, alarms = reward_sensitivity.curve(tmp_path), reward_sensitivity.alarms(tmp_path)
    assert [look["images"] for look in curve] == [0, 192] and curve[1]["diversity/pictures"] == 0.004  # a look repeated in later rows counts once
    assert alarms == {1192: "diversity of pictures is down to 20%; a rose while b fell"}
    aligned = [{**look, "eval/pickscore_contrast": 1.0 * i} for i, look in enumerate(curve)]
    runs = {"collapsing": {"looks": curve, "alarms": alarms}, "alignment": {"looks": aligned, "alarms": {}}}
    reward_sensitivity.plot({"runs": runs, "min_diversity": 0.7}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
