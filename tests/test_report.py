"""What one sees of a run: rows of stats.jsonl, trackers, and the report page, on a real (tiny) run on portraits."""

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proxt2i import report
from proxt2i.config import load_config
from proxt2i.models.flops import training_flops
from proxt2i.report_plots import thinned
from proxt2i.training import distributed
from proxt2i.training.engine import read_deepspeed_json
from proxt2i.training.loop import Trainer
from proxt2i.training.meter import Meter
from proxt2i.training.tracking import WANDB_ID, Tracker, check_trackers, read_rows

ZERO2 = Path(__file__).parent.parent / "configs" / "zero2.json"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        os.environ.pop(name, None)
    folder = tmp_path_factory.mktemp("runs")
    settings = [f"train.run_dir={folder / 'tiny'}", f"data.portraits_dir={folder}", f"data.cache_dir={folder}", "data.num_images=64",
                "model.embed_dim=32", "model.depth=3", "model.num_heads=2", "diffusion.step_counts=[4,8]", "optim.warmup_images=32",
                "train.images=256", "train.batch_size=32", "train.log_every=64", "train.checkpoint_every=128", "train.peak_tflops=2",
                "sample.every=128", "sample.per_prompt=1", "sample.prompts=[a man with a <beanie> & glasses,a woman]"]
    trainer = Trainer(load_config(None, settings), read_deepspeed_json(ZERO2), None, distributed.start(threads=1))
    assert trainer.run() == 0
    return trainer


def test_rows_say_what_was_computed_and_where_the_loss_is(trainer):
    rows = read_rows(trainer.run_dir / "stats.jsonl")
    assert [row["images"] for row in rows] == [64, 128, 192, 256]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(42 * row["images_per_s"])
        assert row["tflops_per_s"] == pytest.approx(row["images_per_s"] * training_flops(trainer.uvit.config) / 1e12)
        assert row["mfu"] == pytest.approx(row["tflops_per_s"] / 2)
        for n in (4, 8):
            steps = [value for key, value in row.items() if key.startswith(f"loss/N{n}/k")]
            assert 1 <= len(steps) <= n and min(steps) <= row[f"loss/N{n}"] <= max(steps)
    assert len({key for row in rows for key in row if re.fullmatch(r"loss/N8/k\d", key)}) == 8


def test_the_meter_counts_every_shape_and_leaves_out_what_is_not_finite(trainer):
    meter = Meter(["N2/k2", "N2/k1", "t0.5"], trainer.uvit.config, trainer.ranks)
    assert meter.peak is None  # a CPU: none is invented
    meter.add_images(torch.zeros(2, 16, 8, 8))
    meter.add_images(torch.zeros(3, 16, 4, 20))
    assert (meter.images, meter.tokens) == (5, 2 * (26 + 16) + 3 * (26 + 20))
    assert meter.flops == 2 * training_flops(trainer.uvit.config) + 3 * training_flops(trainer.uvit.config, 4, 20)
    meter.add_losses(torch.tensor([1.0, 3.0, float("nan"), 5.0, 7.0]), torch.tensor([0, 1, 1, 1, 2]))
    row = meter.summary()
    assert (row["loss"], row["loss/N2"], row["loss/N2/k2"], row["loss/N2/k1"], row["loss/t0.5"]) == (4.0, 3.0, 1.0, 4.0, 7.0)
    assert "mfu" not in row and meter.images == 0 and not any(key.startswith("loss") for key in meter.summary() if key != "loss")


def test_tensorboard_has_the_same_curves_with_single_steps_in_a_section_of_their_own(trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trainer.run_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/mfu", "train/images_per_s", "loss/N4", "loss_by_step/N4/k3"} <= set(tags["scalars"])
    assert not [tag for tag in tags["scalars"] if tag.startswith("loss/") and "/k" in tag] and tags["images"] == ["samples"]
    last = read_rows(trainer.run_dir / "stats.jsonl")[-1]
    assert events.Scalars("loss/N8")[-1].value == pytest.approx(last["loss/N8"]) and events.Scalars("loss/N8")[-1].step == 256


def test_the_page_holds_everything_and_needs_nothing_else(trainer, tmp_path, capsys):
    run = tmp_path / "tiny"
    shutil.copytree(trainer.run_dir, run)
    (run / "evaluation").mkdir()
    row = {"sampler": "relaxed", "steps": 8, "guidance": 1.5, "accuracy": 0.98765, "frechet_distance": 1.25, "diversity": None}
    (run / "evaluation" / "results.json").write_text(json.dumps({"rows": [{"sampler": "drawings", "accuracy": 1.0}, row]}))
    assert report.main([str(run)]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == run / "report.html"
    html = page.read_text()

    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html) and "@import" not in html and "url(http" not in html
    assert "256 of 256 images – finished" in html and "<td><code>train.peak_tflops</code></td><td>2.0</td>" in html
    assert "train.seed" not in html  # as the default
    assert "0.988" in html and "1.25" in html and "<td>relaxed</td>" in html
    assert "step-000000128" in html and "step-000000256" in html and ">latest<" in html
    assert "a man with a &lt;beanie&gt; &amp; glasses" in html and "<beanie>" not in html
    parameters = sum(p.numel() for p in trainer.uvit.parameters())
    assert f"{parameters / 1e6:,.2f} M" in html
    assert html.count("<svg") == 8  # loss, heat map, lr, gradient norm, images/s, MFU, data wait, memory; nothing was skipped
    assert "N = 4" in html and "k = 8" in html
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    expected = [np.asarray(Image.open(path)) for path in sorted((run / "samples").glob("*.png"))]
    assert len(pictures) == len(expected) == 2 and all(np.array_equal(a, b) for a, b in zip(pictures, expected))


def test_a_crashed_or_young_run_has_a_page_too(trainer, tmp_path):
    run = tmp_path / "crashed"
    shutil.copytree(trainer.run_dir, run, ignore=shutil.ignore_patterns("model", "samples", "tensorboard"))
    stats = run / "stats.jsonl"
    stats.write_text(stats.read_text()[:-100])  # the last line is cut
    (run / "deepspeed.json").write_text("{")
    html = report.write_report(run, tmp_path / "page.html").read_text()
    assert "192 of 256 images – not finished" in html and "No finished model yet" in html and "<svg" in html
    assert f"{sum(p.numel() for p in trainer.uvit.parameters()) / 1e6:,.2f} M" in html  # told by the checkpoint alone
    stats.unlink()
    html = report.write_report(run).read_text()
    assert "no statistics yet" in html and "<svg" not in html


def test_what_is_no_run_is_refused(tmp_path, capsys):
    for arguments, message in (([tmp_path / "none"], "no such folder"), ([tmp_path], "is no run folder: it holds no config.yaml")):
        assert report.main(list(map(str, arguments))) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("train: {images: [")
    assert report.main([str(tmp_path)]) == 2 and "not valid YAML" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_long_runs_are_averaged_to_fewer_points():
    rows = [{"images": i, "loss": 2.0 * i} | ({"late": 1.0} if i >= 500 else {}) for i in range(1000)]
    curves = thinned(rows, points=10)
    assert curves["images"].tolist() == pytest.approx([49.5 + 100 * i for i in range(10)])
    assert curves["loss"].tolist() == pytest.approx((2 * curves["images"]).tolist())
    assert np.isnan(curves["late"][:5]).all() and (curves["late"][5:] == 1).all()


def test_wandb_offline(tmp_path, monkeypatch, capfd):
    """The same run id after a resume, a new one after a fresh start; a clear error where it is not installed."""
    config = load_config(None, ["train.wandb=proxt2i-test", "train.tensorboard=false"])
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for images_seen in (0, 64, 0):
        tracker = Tracker(tmp_path, config, images_seen)
        tracker.log({"images": images_seen + 64, "lr": 0.1, "loss": 1.0, "grad_norm": 1.0, "images_per_s": 1.0, "data_wait": 0.0})
        tracker.grid(images_seen + 64, np.zeros((1, 1, 8, 8, 3), np.uint8))
        tracker.close()
        ids.append((tmp_path / WANDB_ID).read_text())
        assert list((tmp_path / "wandb").glob(f"offline-run-*-{ids[-1]}/*.wandb"))
    assert ids[0] == ids[1] != ids[2]


def test_a_missing_tracker_is_named_before_the_run(monkeypatch):
    config = load_config(None, ["train.wandb=proxt2i-test"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        check_trackers(config.train)
    check_trackers(load_config().train)  # not asked for
