"""Training end to end on a tiny model, and its promises: exact resume, damage found and named, bad steps skipped."""

import json
import os
import re
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_checkpoint, start
from tiny_run import ZERO2, make_trainer, weights

from proxt2i.config import DiffusionConfig, OptimConfig, TrainConfig, load_config
from proxt2i.diffusion import expected_noise, noised, proximal_matching_loss, score_loss
from proxt2i.ops import philox_normal
from proxt2i.pipeline import generate, plan_of
from proxt2i.training import engine as engines
from proxt2i.training.checkpoint import check_intact
from proxt2i.training.ema import EMA
from proxt2i.training.objective import Objective
from proxt2i.training.randomness import sample_seeds, uniforms


# -- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything_behind(settings, ranks, tmp_path):
    run_dir = tmp_path / "run"
    trainer = make_trainer(settings, ranks, train__images=1600, train__tensorboard="true", optim__lr=5e-3)
    assert trainer.run() == 0

    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == list(range(32, 1601, 32))
    assert {"loss", "loss/N4", "loss/N8", "grad_norm", "lr", "images_per_s", "data_wait", "memory_gib"} <= rows[-1].keys()
    first, last = (sum(row["loss"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first
    assert all(row["bad_steps"] == 0 and row["grad_norm"] > 0 for row in rows)
    assert load_config(run_dir / "config.yaml") == trainer.config
    assert list((run_dir / "tensorboard").iterdir())
    with Image.open(run_dir / "samples" / "000001600.png") as grid:
        assert grid.size == (64, 64) and len(np.unique(np.asarray(grid))) > 10  # 2 x 2 images of 32 pixels
    assert [path.name for path in sorted((run_dir / "checkpoints").glob("step-*"))] == ["step-000001536", "step-000001600"]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-000001600"

    from proxt2i.models.bundle import load_bundle

    bundle = load_bundle(run_dir / "model")
    averaged = weights(run_dir, 1600, "ema")
    for name, parameter in bundle.uvit.named_parameters():
        assert torch.equal(parameter.flatten(), averaged[name])
    assert any(not torch.equal(averaged[name], raw) for name, raw in weights(run_dir, 1600).items())
    assert bundle.settings.num_steps == 4 and bundle.text(["a red square"])[0].shape == (1, 4, 16)


@pytest.mark.parametrize("times, bucket", [("uniform", "loss/t0."), ("pairs", "loss/N4")])
def test_the_score_baseline_and_streamed_images_train_too(settings, ranks, times, bucket):
    trainer = make_trainer(settings, ranks, diffusion__objective="score", diffusion__score_times=times, data__cache_latents="false",
                           data__workers=0, data__flip="true", train__images=64)
    assert trainer.run() == 0
    row = json.loads((trainer.run_dir / "stats.jsonl").read_text().splitlines()[-1])
    assert 0 < row["loss"] < 5 and any(key.startswith(bucket) for key in row)

    # its model folder says what it is, and sampling asks it accordingly: for all the noise (lam = 0), at the pairs' times
    from proxt2i.models.bundle import load_bundle

    bundle, asked = load_bundle(trainer.run_dir / "model"), []
    bundle.uvit.register_forward_pre_hook(lambda module, args: asked.append(args[1:3]))
    generate(bundle, ["a red square"], [0], num_steps=4, guidance_scale=1.0)
    assert bundle.settings.objective == "score" and all((lam == 0).all() for _, lam in asked)
    assert [t.item() for t, _ in asked] == pytest.approx(plan_of(bundle.settings, 4).tau, rel=1e-5)


def test_score_training_on_the_pairs_levels():
    """The network sees the same noise at the same times as the prox's would be, and its share of the draws."""
    prox, score = (Objective(DiffusionConfig(objective=kind, score_times="pairs"), 0) for kind in ("prox", "score"))
    x0, positions = torch.randn(64, 4, 2, 2), torch.arange(64)
    ours, theirs = score.example(x0, positions), prox.example(x0, positions)
    torch.testing.assert_close(ours.t, prox.schedule.tau(theirs.t, theirs.lam))
    assert not ours.lam.any() and torch.equal(ours.bucket, theirs.bucket)
    signal = torch.stack([ours.coefficients[:, 0], theirs.coefficients[:, 0] / (1 + theirs.lam).sqrt()])
    torch.testing.assert_close(signal[0], signal[1], rtol=1e-4, atol=1e-6)


def test_gradient_accumulation_gives_the_same_weights(settings, ranks, tmp_path):
    for name, micro_batch in (("whole", 16), ("parts", 4)):
        make_trainer(settings, ranks, train__run_dir=tmp_path / name, train__micro_batch=micro_batch, train__images=64).run()
    whole, parts = weights(tmp_path / "whole", 64), weights(tmp_path / "parts", 64)
    for key in whole:
        torch.testing.assert_close(whole[key], parts[key], rtol=1e-3, atol=1e-5)


# -- resume -----------------------------------------------------------------------------------------------------------


def interrupted_run(settings, ranks, run_dir, after_steps, signal_number=signal.SIGTERM):
    trainer = make_trainer(settings, ranks, train__run_dir=run_dir)
    step = trainer.step

    def step_then_signal():
        step()
        if trainer.images_seen == after_steps * trainer.batch_size:
            os.kill(os.getpid(), signal_number)

    trainer.step = step_then_signal
    return trainer, trainer.run()


@pytest.mark.parametrize("signal_number, precision", [(signal.SIGTERM, "fp32"), (signal.SIGINT, "bf16")])
def test_a_signal_saves_and_resume_is_bit_equal(settings, ranks, tmp_path, signal_number, precision):
    settings["train.precision"] = precision
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    handler = signal.getsignal(signal.SIGTERM)
    assert make_trainer(settings, ranks, train__run_dir=straight).run() == 0
    trainer, received = interrupted_run(settings, ranks, broken, 5, signal_number)
    assert received == signal_number and trainer.images_seen == 80
    assert not (broken / "model").exists()
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = make_trainer(settings, ranks, "auto", train__run_dir=broken)
    assert resumed.images_seen == 80
    assert resumed.run() == 0
    assert_same_checkpoint(straight / "checkpoints" / "step-000000192", broken / "checkpoints" / "step-000000192", ranks=1)
    images = [json.loads(line)["images"] for line in (broken / "stats.jsonl").read_text().splitlines()]
    assert images == sorted(set(images)) and images[-1] == 192


@pytest.mark.parametrize("features, bf16", [({}, False), ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
                                            ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)])
def test_auto_is_bf16_on_cpus_with_instructions_for_it(monkeypatch, settings, ranks, features, bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert make_trainer(settings, ranks, train__precision="auto").bf16 is bf16
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert engines.runs_in_bf16("auto", gpu) and engines.runs_in_bf16("bf16", cpu) and not engines.runs_in_bf16("fp32", gpu)


def test_a_run_goes_on_in_the_other_precision_and_says_so(settings, ranks, tmp_path, capsys):
    interrupted_run(settings, ranks, tmp_path / "run", 5, signal.SIGTERM)
    resumed = make_trainer(settings, ranks, "auto", train__precision="bf16")
    assert "was trained in fp32, this run goes on in bf16" in capsys.readouterr().out
    assert resumed.images_seen == 80 and resumed.run() == 0 and all(w.isfinite().all() for w in weights(tmp_path / "run", 192).values())


def test_resume_depends_on_the_optimizer_state(settings, ranks, tmp_path):
    """The equality above would be worthless if fresh moments gave it as well."""
    make_trainer(settings, ranks).run()
    run_dir = tmp_path / "run"
    trainer = make_trainer(settings, ranks, str(run_dir / "checkpoints" / "step-000000128"), train__run_dir=tmp_path / "again")
    trainer.optimizer.state.clear()
    trainer.run()
    right, wrong = weights(run_dir, 192), weights(tmp_path / "again", 192)
    assert any(not torch.equal(right[key], wrong[key]) for key in right)


@pytest.mark.parametrize("changes, message", [
    (dict(optim__name="adamw"), "optim.name must be that of the run"),
    (dict(diffusion__precondition=False), "trained with preconditioning"),
    (dict(diffusion__beta_max=15.0), "trained with preconditioning"),
])
def test_what_would_change_the_meaning_of_a_checkpoint_is_refused(finished, ranks, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(finished[0], ranks, "auto", **changes)


def test_another_number_of_heads_is_refused_though_its_weights_fit(settings, ranks):
    make_trainer(settings, ranks, train__images=64, model__qk_norm="false").run()
    with pytest.raises(ValueError, match="trained with num_heads = 2, this run asks for 4"):
        make_trainer(settings, ranks, "auto", train__images=64, model__qk_norm="false", model__num_heads=4)


def test_existing_checkpoints_are_not_overwritten(settings, ranks):
    make_trainer(settings, ranks, train__images=64).run()
    with pytest.raises(ValueError, match="already holds checkpoints: add --resume .* another train.run_dir"):
        make_trainer(settings, ranks, train__images=64)


def test_resume_without_checkpoints_starts_fresh_and_says_so(settings, ranks, capsys):
    assert make_trainer(settings, ranks, "auto").images_seen == 0
    assert "no checkpoint in" in capsys.readouterr().out


def test_changed_settings_are_reported(settings, ranks, capsys):
    make_trainer(settings, ranks, train__images=64).run()
    make_trainer(settings, ranks, "auto", train__images=64, optim__lr=1e-3)
    assert "optim.lr: 0.002 -> 0.001" in capsys.readouterr().out
    with pytest.raises(ValueError, match="do not fit"):
        make_trainer(settings, ranks, "auto", train__images=64, model__depth=5)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(settings, ranks, tmp_path):
    """A finished run's (settings, newest checkpoint, the one before)."""
    make_trainer(settings, ranks).run()
    folder = tmp_path / "run" / "checkpoints"
    return settings, folder / "step-000000192", folder / "step-000000128"


def cut_short(folder):
    file = next(folder.glob("rank-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    return file


def flip_a_bit(folder):
    file = next(folder.glob("rank-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(data)
    return file


def remove_a_file(folder):
    file = next(folder.glob("rank-*.safetensors"))
    file.unlink()
    return file


def break_state(folder):
    file = folder / "state.json"
    file.write_text(file.read_text()[:40])
    return file


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, remove_a_file, break_state])
def test_damaged_checkpoints_are_skipped_and_named(finished, ranks, capsys, damage):
    settings, newest, older = finished
    check_intact(newest)
    file = damage(newest)
    with pytest.raises(ValueError, match=re.escape(str(file))):  # asked for by name: an error, no fallback
        make_trainer(settings, ranks, str(newest))
    assert make_trainer(settings, ranks, "auto").images_seen == 128
    assert str(file) in capsys.readouterr().out
    damage(older)
    with pytest.raises(ValueError, match="none of the 2 checkpoints .* is intact"):
        make_trainer(settings, ranks, "auto")


def test_a_save_cut_off_by_a_crash_is_no_checkpoint(settings, ranks, tmp_path, monkeypatch):
    trainer = make_trainer(settings, ranks, train__checkpoint_every=64)

    def power_cut(*_):
        raise KeyboardInterrupt

    saves = []
    finish = trainer.store._finish

    def finish_twice_then_die(*arguments):
        saves.append(arguments)
        (power_cut if len(saves) == 2 else finish)(*arguments)

    monkeypatch.setattr(trainer.store, "_finish", finish_twice_then_die)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "step-000000128.tmp").is_dir()
    resumed = make_trainer(settings, ranks, "auto")
    assert resumed.images_seen == 64
    assert resumed.run() == 0
    assert not list(folder.glob("*.tmp"))


# -- bad steps --------------------------------------------------------------------------------------------------------


def test_non_finite_steps_are_skipped_counted_and_finally_fatal(settings, ranks, capsys):
    trainer = make_trainer(settings, ranks, train__max_bad_steps=3)
    loss = trainer.objective.loss
    bad = {32, 80, 96, 112}  # images seen before the step

    def poisoned(eps, example, images_seen):
        losses = loss(eps, example, images_seen)
        return losses * torch.tensor(float("nan")) if images_seen in bad else losses

    trainer.objective.loss = poisoned
    before = {}
    step = trainer.step

    def watched():
        before.update({name: p.detach().clone() for name, p in trainer.uvit.named_parameters()})
        average = trainer.ema.averages[0].clone()
        start = trainer.images_seen
        step()
        changed = any(not torch.equal(before[name], p) for name, p in trainer.uvit.named_parameters())
        assert changed == (start not in bad)
        assert torch.equal(average, trainer.ema.averages[0]) == (start in bad)

    trainer.step = watched
    with pytest.raises(ValueError, match="3 steps in a row had to be skipped, the last for a non-finite gradient"):
        trainer.run()
    assert trainer.spikes.skipped == 4
    assert all(p.isfinite().all() for p in trainer.uvit.parameters())
    rows = [json.loads(line) for line in (trainer.run_dir / "stats.jsonl").read_text().splitlines()]
    assert rows[1]["bad_steps"] == 1 and 0 < rows[1]["loss"] < 2  # the finite half of the interval
    assert "non-finite gradient at 48 images" in capsys.readouterr().out


@pytest.mark.parametrize("ruin", [1.0, float("inf"), float("nan")])
def test_the_norm_of_the_gradients_is_deepspeeds(settings, ranks, ruin):
    zero = make_trainer(settings, ranks).engine.optimizer
    for params in zero.params_in_partition:
        gradients, padding = [torch.randn_like(p) * (i + 1) for i, p in enumerate(params)], torch.full((3,), 7.0)
        padding._zero_padding = True
        gradients[0].view(-1)[0] *= ruin
        ours, theirs = (norm([*gradients, padding], params) for norm in (zero.get_grad_norm_direct, partial(type(zero).get_grad_norm_direct, zero)))
        torch.testing.assert_close(ours, theirs)
        assert (ours == -1) == (ruin != 1.0)
    assert zero.get_grad_norm_direct([padding], []) == 0  # a rank that owns nothing


# -- parts ------------------------------------------------------------------------------------------------------------


def test_randomness_depends_on_seed_and_position_alone():
    objective, x0, positions = Objective(DiffusionConfig(), 7), torch.randn(8, 2, 4, 4), torch.arange(100, 108)
    whole = objective.example(x0, positions)
    halves = [objective.example(x0[part], positions[part]) for part in (slice(0, 4), slice(4, 8))]
    for name in ("y", "t", "lam", "seeds", "bucket"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    eps = torch.randn_like(x0)
    losses = [objective.loss(eps[part], half, 0) for part, half in zip((slice(0, 4), slice(4, 8)), halves)]
    assert torch.equal(objective.loss(eps, whole, 0), torch.cat(losses))
    assert not torch.equal(whole.y, Objective(DiffusionConfig(), 8).example(x0, positions).y)
    targets = philox_normal(whole.seeds, 1, x0.shape[1:])
    assert len({tuple(row.flatten().tolist()) for row in targets}) == 8
    # y is what the target says: prox with the true noise and t = 0 gives x0 back
    many = objective.example(torch.ones(512, 2, 4, 4), torch.arange(512))
    at_zero = many.t == 0
    assert at_zero.any()
    clean = many.y - many.lam.sqrt()[:, None, None, None] * philox_normal(many.seeds, 1, (2, 4, 4))
    torch.testing.assert_close(clean[at_zero], torch.ones_like(clean[at_zero]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [
    dict(), dict(target="noise"), dict(l1_images=10), dict(objective="score"), dict(objective="score", score_times="pairs"),
])
def test_examples_and_losses_are_those_of_the_plain_functions(settings):
    config = DiffusionConfig(zeta=0.9, **settings)
    objective, x0 = Objective(config, 7), torch.randn(16, 2, 4, 4)
    example, eps = objective.example(x0, torch.arange(16)), torch.randn(16, 2, 4, 4)
    e, n = (philox_normal(example.seeds, draw, (2, 4, 4)) for draw in (0, 1))
    y = noised(x0, example.t, example.lam, e, n, objective.schedule)
    torch.testing.assert_close(example.y, y)
    expected = expected_noise(x0, y, example.t, example.lam, objective.schedule)
    target = e if config.objective == "score" else expected if config.target == "expected" else n
    loss = score_loss(eps, target) if config.objective == "score" else proximal_matching_loss(
        eps, target, config.zeta, "l1" if config.l1_images else "prox")
    torch.testing.assert_close(objective.loss(eps, example, 0), loss)


def test_uniforms_are_uniform_and_streams_independent():
    seeds = sample_seeds(0, np.arange(100_000))
    one, two = uniforms(seeds, 1), uniforms(seeds, 2)
    assert len(np.unique(seeds)) == 100_000
    for values in (one, two):
        assert 0 <= values.min() and values.max() < 1
        counts = np.histogram(values, 50, (0, 1))[0]
        assert ((counts - 2000) ** 2 / 2000).sum() < 100  # chi-squared, 49 degrees of freedom
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.01 and abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.01


def test_caption_dropout_rate():
    objective = Objective(DiffusionConfig(caption_dropout=0.1), 0)
    text, null = [torch.ones(20_000, 1, 1)], [torch.zeros(1, 1, 1)]
    kept = objective.drop_captions(text, null, torch.arange(20_000))[0].mean().item()
    assert abs(kept - 0.9) < 0.01


def test_learning_rate_in_images():
    optim = OptimConfig(lr=1.0, warmup_images=100, final_lr=0.1)
    assert engines.learning_rate(optim, 0, 1100) < 0.02
    assert engines.learning_rate(optim, 50, 1100) == pytest.approx(0.5, abs=0.01)
    assert engines.learning_rate(optim, 100, 1100) == pytest.approx(1.0)
    assert engines.learning_rate(optim, 600, 1100) == pytest.approx(0.55)  # half-way: the mean of 1 and 0.1
    assert engines.learning_rate(optim, 1100, 1100) == pytest.approx(0.1)
    assert engines.learning_rate(OptimConfig(lr=1.0, warmup_images=100, schedule="constant"), 900, 1100) == 1.0


def test_ema_half_life_in_images():
    weight = torch.ones(1)
    ema = EMA([weight], half_life=64, ramp=1e9)
    weight.zero_()
    for step in range(1, 5):
        ema.update(16 * step, 16)
    assert ema.averages[0].item() == pytest.approx(0.5, rel=1e-6)  # 4 steps of 16 images = one half-life
    assert EMA([weight], 64, ramp=0.0).decay(16, 16) == 0.0  # no memory while the ramp is at 0
    assert EMA([weight], 1000, ramp=0.1).decay(1000, 10) == pytest.approx(0.5 ** 0.1)  # half-life 100 at 1,000 images


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_parameter_groups(settings, ranks, name):
    """Weight decay is for matrices only, Muon for those inside the blocks."""
    trainer = make_trainer(settings, ranks)
    names = {id(parameter): name for name, parameter in trainer.uvit.named_parameters()}
    *muon, decayed, plain = engines._parameter_groups(trainer.uvit, OptimConfig(name=name, weight_decay=0.1))
    assert len(muon) == (name == "muon")
    for group in muon:
        assert all("block" in names[id(p)] and p.ndim == 2 for p in group["params"])
        assert group["momentum"] == 0.95
        assert not any("block" in names[id(p)] for p in decayed["params"])
    assert all(group["weight_decay"] == 0.1 for group in [*muon, decayed]) and plain["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decayed["params"])
    assert "position" in {names[id(p)] for p in plain["params"]}
    assert sum(len(group["params"]) for group in [*muon, decayed, plain]) == len(names)


def test_muon_and_adamw_follow_one_curve_to_their_own_peaks(settings, ranks):
    trainer = make_trainer(settings, ranks)
    engines.set_learning_rate(trainer.engine, OptimConfig(lr=0.01, muon_lr=0.04), 0.005)
    assert [group["lr"] for group in trainer.engine.optimizer.param_groups] == [0.02, 0.005, 0.005]


def test_adamw_alone_trains_too(settings, ranks):
    trainer = make_trainer(settings, ranks, optim__name="adamw")
    assert trainer.run() == 0
    assert not any("momentum" in group for group in trainer.engine.optimizer.param_groups)


@pytest.mark.parametrize("change, message", [
    ({"zero_optimization": {"stage": 4}}, "stage must be 1, 2 or 3, got 4"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device must be cpu or none, got nvme"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload is DeepSpeed's old name"),
    ({"bf16": {"enabled": True}}, "remove bf16; train.precision sets it"),
    ({"optimizer": {"type": "Adam"}}, "remove optimizer"),
])
def test_unsupported_deepspeed_settings_are_refused(tmp_path, change, message):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({**json.loads(ZERO2.read_text()), **change}))
    with pytest.raises(ValueError, match=re.escape(str(file)) + ".*" + re.escape(message)):
        engines.read_deepspeed_json(file)


def test_deepspeed_numbers_must_agree_with_the_config():
    loaded = json.loads(ZERO2.read_text())
    filled = engines.fill_deepspeed_json(loaded, TrainConfig(batch_size=64, micro_batch=8), OptimConfig(), 2, 1000, False)
    assert filled["train_micro_batch_size_per_gpu"] == 8 and filled["gradient_accumulation_steps"] == 4
    assert filled["zero_optimization"]["reduce_bucket_size"] == 1000
    with pytest.raises(ValueError, match="train_batch_size is 32, but .* give 64"):
        engines.fill_deepspeed_json({**loaded, "train_batch_size": 32}, TrainConfig(batch_size=64), OptimConfig(), 2, 1000, False)


# -- as typed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
    (["--deepspeed", "no.json"], "--deepspeed no.json: no such file"),
])
def test_wrong_input_is_one_line_and_status_2(arguments, message):
    process = start([sys.executable, "proxt2i/train.py", *arguments])
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert "error: " in output and message in output and "Traceback" not in output


def test_arguments_may_come_in_any_order():
    from proxt2i.train import parse_arguments

    given = parse_arguments(["--local_rank=1", "optim.lr=1", "--resume", "train.seed=2", "--config", "c.yaml", "data.flip=true"])
    assert given.resume == "auto" and given.config == ["c.yaml"]
    assert sorted(given.overrides) == ["data.flip=true", "optim.lr=1", "train.seed=2"]
    assert parse_arguments(["--resume", "runs/x/checkpoints/step-1"]).resume == "runs/x/checkpoints/step-1"
    assert parse_arguments([]).resume is None
