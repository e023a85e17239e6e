"""Every stage of ZeRO trains the same network, resumes to the same bits, and hands its checkpoints to any other."""

import json
import resource
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from runs import ROOT, BareRanks, assert_same_checkpoint, become_rank, overrides
from tiny_run import weights

from proxt2i.config import load_config
from proxt2i.export import main as export_main
from proxt2i.models.bundle import load_bundle
from proxt2i.models.uvit import UViT2DModel
from proxt2i.training import distributed
from proxt2i.training.loop import Trainer

STAGES = ["zero1", "zero2", "zero3", "zero2_offload"]
TOLERANCE = dict(rtol=1e-3, atol=5e-5)  # weights are about 0.02 and have moved by as much; sums over ranks run in another order


def deepspeed_json(stage):
    loaded = json.loads((ROOT / "configs" / f"{stage}.json").read_text())
    if stage == "zero3":  # cut every parameter, also the small ones that it would keep whole
        loaded["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return loaded


def train(arguments, stage, run_dir, resume=None, *, ranks):
    config = load_config((), [*arguments, f"train.run_dir={run_dir}"], ranks.world_size)
    Trainer(config, deepspeed_json(stage), resume and str(resume), ranks).run()


def on_this_rank(rank, world_size, port, arguments, log):
    """Each stage straight through, and again from its own half-way checkpoint; then others' half-way checkpoints."""
    become_rank(rank, world_size, port, log)
    folder, *arguments = arguments
    folder, ranks = Path(folder), distributed.start(threads=1)

    def half_way(stage):
        return folder / stage / "checkpoints" / "step-000000096"

    for stage in STAGES:
        train(arguments, stage, folder / stage, ranks=ranks)
        train(arguments, stage, folder / f"{stage}-again", half_way(stage), ranks=ranks)
    train(arguments, "zero3", folder / "2-to-3", half_way("zero2"), ranks=ranks)
    train(arguments, "zero2", folder / "3-to-2", half_way("zero3"), ranks=ranks)
    distributed.stop()


@pytest.fixture(scope="module")
def length():
    return dict(train__checkpoint_every=96, sample__every=192, train__log_every=16, model__gradient_checkpointing="true")


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def assert_close(one, other):
    for kind in ("weight", "ema"):
        left, right = weights(one, 192, kind), weights(other, 192, kind)
        for name in left:
            torch.testing.assert_close(left[name], right[name], **TOLERANCE)


def test_all_stages_train_resume_and_export(settings, ranks, tmp_path, length, capsys):
    arguments = overrides(settings, **length)
    run = BareRanks(tmp_path, *arguments, log=tmp_path / "log", program=on_this_rank)
    assert run.wait() == [0, 0], run.output
    last = "checkpoints/step-000000192"
    for stage in STAGES:
        assert_same_checkpoint(tmp_path / stage / last, tmp_path / f"{stage}-again" / last)
        assert_close(tmp_path / "zero2", tmp_path / stage)
        assert losses(tmp_path / stage) == pytest.approx(losses(tmp_path / "zero2"), rel=1e-4)
        assert sum(f.stat().st_size for f in (tmp_path / stage / last).glob("rank-00000*")) == pytest.approx(
            sum(f.stat().st_size for f in (tmp_path / stage / last).glob("rank-00001*")), rel=0.1)  # both carry their half
        # the averaged weights, gathered by the ranks for the model folder and read from their files by the command
        assert export_main([str(tmp_path / stage), "--out", str(tmp_path / "exported")]) == 0
        bundle, averaged = load_bundle(tmp_path / "exported"), weights(tmp_path / stage, 192, "ema")
        for name, parameter in bundle.uvit.named_parameters():
            assert torch.equal(parameter.flatten(), averaged[name])
        assert (tmp_path / stage / "samples" / "000000192.png").exists()
    assert_close(tmp_path / "zero2", tmp_path / "2-to-3")
    assert_close(tmp_path / "zero3", tmp_path / "3-to-2")

    # one rank goes on where two stopped: the same samples in the same order, the same losses to rounding
    train(arguments, "zero2", tmp_path / "alone", tmp_path / "zero2" / "checkpoints" / "step-000000096", ranks=ranks)
    assert_close(tmp_path / "zero2", tmp_path / "alone")
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "zero2")[6:], rel=1e-4)


@pytest.mark.parametrize("arguments, message", [
    (["{tmp}/nowhere"], "nowhere: no such folder"),
    (["{tmp}"], "holds no checkpoint yet"),
    (["{tmp}/run/checkpoints/step-000000096"], "say with --out where the model goes"),
    (["{tmp}/run", "--components", "{tmp}/nowhere"], "say where with --components FOLDER"),
])
def test_export_says_what_is_wrong(settings, ranks, tmp_path, length, capsys, arguments, message):
    train(overrides(settings, **length, train__images=96), "zero2", tmp_path / "run", ranks=ranks)
    assert export_main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_export_of_raw_weights_in_bf16(settings, ranks, tmp_path, length):
    train(overrides(settings, **length, train__images=96), "zero2", tmp_path / "run", ranks=ranks)
    assert export_main([str(tmp_path / "run"), "--weights", "raw", "--dtype", "bf16", "--out", str(tmp_path / "raw")]) == 0
    from safetensors.torch import load_file

    raw = load_file(tmp_path / "raw" / "uvit" / "diffusion_pytorch_model.safetensors")
    for name, values in weights(tmp_path / "run", 96).items():
        assert torch.equal(raw[name].flatten(), values.bfloat16())


# -- stages, spikes, a full disk ------------------------------------------------------------------------------------------


def test_a_second_stage_starts_from_the_first_at_twice_the_size(settings, ranks, tmp_path, length):
    """Its positions are the first stage's, interpolated; everything else is taken over as it is, into the average as well."""
    train(overrides(settings, **length, train__images=96), "zero2", tmp_path / "first", ranks=ranks)
    larger = overrides(settings, **length, train__images=96, data__image_size=64, model__init_from=tmp_path / "first" / "model")
    config = load_config((), [*larger, f"train.run_dir={tmp_path / 'second'}"])
    trainer = Trainer(config, deepspeed_json("zero2"), None, ranks)
    first = load_bundle(tmp_path / "first" / "model").uvit.resize_(8)
    averages = trainer.partition.gather(trainer.ema.averages)
    for name, values in first.named_parameters():
        assert torch.equal(dict(trainer.uvit.named_parameters())[name], values) and torch.equal(averages[name], values)
    assert trainer.uvit.position.shape[1] == 2 + 4 + 16  # t, lambda, text, 4 x 4 patches
    trainer.run()
    assert load_bundle(tmp_path / "second" / "model").uvit.config.sample_size == 8

    with pytest.raises(ValueError, match="model.init_from: .*first.model was trained with depth = 3, this run asks for 5"):
        Trainer(load_config((), [*larger, "model.depth=5", f"train.run_dir={tmp_path / 'third'}"]), deepspeed_json("zero2"), None, ranks)


def test_spikes_are_skipped_counted_and_remembered(settings, ranks, tmp_path, length, capsys):
    config = load_config((), overrides(settings, **length | dict(train__images=1808, train__run_dir=tmp_path / "run", train__checkpoint_every=1760)))
    trainer = Trainer(config, deepspeed_json("zero2"), None, ranks)
    loss, step, before = trainer.objective.loss, trainer.step, {}
    trainer.objective.loss = lambda eps, example, seen: loss(eps, example, seen) * (1e4 if seen in (800, 1728) else 1)

    def watched():
        before.update(seen=trainer.images_seen, weights=[flat.detach().clone() for flat in trainer.partition.flat])
        step()
        changed = not all(torch.equal(old, new) for old, new in zip(before["weights"], trainer.partition.flat))
        assert changed == (before["seen"] != 1728)  # 800 images are 50 steps: too early to know what is usual

    trainer.step = watched
    trainer.run()
    assert trainer.spikes.skipped == 1 and trainer.spikes.in_a_row == 0
    assert "times the mean of the last 100 steps at 1,744 images: step skipped (1 so far)" in capsys.readouterr().out
    again = Trainer(config, deepspeed_json("zero2"), str(tmp_path / "run"), ranks)
    assert again.spikes == trainer.spikes


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(settings, ranks, tmp_path, length):
    config = load_config((), overrides(settings, **length | dict(train__run_dir=tmp_path / "run", sample__every=0)))
    trainer = Trainer(config, deepspeed_json("zero2"), None, ranks)
    save, soft_hard = trainer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_small_disk():
        if trainer.images_seen == 192:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, soft_hard[1]))
        save()

    trainer.save = save_on_a_small_disk
    try:
        with pytest.raises(ValueError, match="cannot save .*step-000000192: .*File too large.*last good checkpoint is .*step-000000096"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-000000096"]
    train(overrides(settings, **length), "zero2", tmp_path / "run", tmp_path / "run", ranks=ranks)
    assert (tmp_path / "run" / "model").is_dir()


def test_compiled_blocks_are_whole_graphs_and_train_alike(settings, ranks, tmp_path, length, monkeypatch):
    monkeypatch.setattr(UViT2DModel, "compile_repeated_blocks", partialmethod(UViT2DModel.compile_repeated_blocks, backend="aot_eager"))
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        train(overrides(settings, **length | dict(train__compile=compiled, model__gradient_checkpointing="false")), "zero2", tmp_path / name, ranks=ranks)
    assert_close(tmp_path / "eager", tmp_path / "compiled")
    with pytest.raises(ValueError, match="train.compile needs ZeRO stage 1 or 2"):
        train(overrides(settings, **length, train__compile="true"), "zero3", tmp_path / "third", ranks=ranks)
