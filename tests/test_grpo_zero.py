"""GRPO on two ranks in every stage of ZeRO, with offload and with adapters: the same training, the same bits after a resume, checkpoints for each other."""

import json
from pathlib import Path

import pytest
import torch
from runs import ROOT, BareRanks, assert_same_checkpoint, become_rank, overrides, rows
from tiny_run import weights

from proxt2i.grpo_config import load_config
from proxt2i.models.bundle import load_uvit
from proxt2i.training import distributed
from proxt2i.training.grpo import GrpoTrainer

STAGES = ["zero1", "zero2", "zero3", "zero2_offload"]
LORA = ["policy.lora_rank=4", "policy.lora_alpha=8", "optim.eps=1e-8"]
HALF, LAST = "checkpoints/step-000000016", "checkpoints/step-000000032"


def train(arguments, stage, run_dir, ranks, resume=None):
    loaded = json.loads((ROOT / "configs" / f"{stage}.json").read_text())
    if stage == "zero3":  # cut every parameter, also the small ones that it would keep whole
        loaded["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config = load_config((), [*arguments, f"train.run_dir={run_dir}"], ranks.world_size)
    GrpoTrainer(config, loaded, resume and str(resume), ranks).run()


def on_this_rank(rank, world_size, port, arguments, log):
    become_rank(rank, world_size, port, log)
    folder, *arguments = arguments
    folder, ranks = Path(folder), distributed.start(threads=1)
    for stage in STAGES:
        train(arguments, stage, folder / stage, ranks)
        train(arguments, stage, folder / f"{stage}-again", ranks, folder / stage / HALF)
    train(arguments, "zero3", folder / "2-to-3", ranks, folder / "zero2" / HALF)
    for stage in ("zero2", "zero3"):
        train([*arguments, *LORA], stage, folder / f"lora-{stage}", ranks)
    train([*arguments, *LORA], "zero3", folder / "lora-zero3-again", ranks, folder / "lora-zero3" / HALF)
    distributed.stop()


def assert_close(one, other, images=16):
    """After one rollout that both drew with the same weights: in a later one, rounding makes a JPEG a byte longer, and advantages others."""
    for kind in ("weight", "ema"):
        left, right = weights(one, images, kind), weights(other, images, kind)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=5e-5)


def test_every_stage_trains_alike_and_resumes_to_the_bit(grpo, tmp_path):
    arguments = overrides(grpo, train__images=32, train__checkpoint_every=16, guard__every=0, policy__kl=0.1)
    run = BareRanks(tmp_path, *arguments, log=tmp_path / "log", program=on_this_rank)
    assert run.wait() == [0, 0], run.output
    for name in [*STAGES, "lora-zero3"]:
        assert_same_checkpoint(tmp_path / name / LAST, tmp_path / f"{name}-again" / LAST)
    for stage in STAGES:
        assert_close(tmp_path / "zero2", tmp_path / stage)
        exported, averaged = load_uvit(tmp_path / stage / "model" / "uvit"), weights(tmp_path / stage, 32, "ema")
        assert all(torch.equal(p.flatten(), averaged[name]) for name, p in exported.named_parameters())
    assert_close(tmp_path / "zero2", tmp_path / "2-to-3", images=32)
    assert_close(tmp_path / "lora-zero2", tmp_path / "lora-zero3")
    moved = weights(tmp_path / "lora-zero3", 32)
    assert all(".lora_" in name for name in moved) and max(v.abs().max() for name, v in moved.items() if ".lora_B." in name) > 1e-3
    for key in ("reward/jpeg_compressibility", "kl"):
        assert [row[key] for row in rows(tmp_path / "lora-zero3")] == pytest.approx([row[key] for row in rows(tmp_path / "lora-zero2")], rel=1e-3, abs=1e-6)
