"""Every stage of ZeRO trains the same network, resumes to the same bits, and hands its checkpoints to any other."""

import json

import pytest
import torch
from tiny_run import ROOT, assert_same_checkpoint, overrides, run_on_two_ranks, weights

from proxt2i.config import load_config
from proxt2i.export import main as export_main
from proxt2i.models.bundle import load_bundle
from proxt2i.training import distributed, engine as engines
from proxt2i.training.loop import Trainer

STAGES = ["zero1", "zero2", "zero3", "zero2_offload"]
TOLERANCE = dict(rtol=1e-3, atol=5e-5)  # weights are about 0.02 and have moved by as much; sums over ranks run in another order


def deepspeed_json(stage):
    loaded = json.loads((ROOT / "configs" / f"{stage}.json").read_text())
    if stage == "zero3":  # cut every parameter, also the small ones that it would keep whole
        loaded["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return loaded


def train(arguments, stage, run_dir, resume=None, ranks=None):
    ranks = ranks or distributed.start(threads=1)
    config = load_config((), [*arguments, f"train.run_dir={run_dir}"], ranks.world_size)
    Trainer(config, deepspeed_json(stage), resume and str(resume), ranks).run()


def on_this_rank(arguments, folder):
    """Each stage straight through, and again from its own half-way checkpoint; then others' half-way checkpoints."""
    for stage in STAGES:
        train(arguments, stage, folder / stage)
        train(arguments, stage, folder / f"{stage}-again", folder / stage / "checkpoints" / "step-000000096")
    train(arguments, "zero3", folder / "2-to-3", folder / "zero2" / "checkpoints" / "step-000000096")
    train(arguments, "zero2", folder / "3-to-2", folder / "zero3" / "checkpoints" / "step-000000096")


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
    assert run_on_two_ranks(on_this_rank, arguments, tmp_path) == [0, 0]
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
    train(arguments, "zero2", tmp_path / "alone", tmp_path / "zero2" / "checkpoints" / "step-000000096", ranks)
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
