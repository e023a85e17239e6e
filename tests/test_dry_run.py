"""`--dry-run`: its numbers against real tensors, and what it refuses. No GPU, no training."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from proxt2i import dry_run as dry
from proxt2i.config import Config, load_config
from proxt2i.models.bundle import EMBEDDED, load_components
from proxt2i.models.text import text_sizes
from proxt2i.models.uvit import build_uvit
from proxt2i.models.vae import codec_sizes
from proxt2i.train import main
from proxt2i.training.engine import read_deepspeed_json

ROOT = Path(__file__).parent.parent


def test_sizes_of_the_components_are_those_of_the_loaded_ones(tmp_path):
    text, codec = load_components(EMBEDDED)
    assert text_sizes(EMBEDDED) == (text.dims, text.lengths) and codec_sizes(EMBEDDED) == (codec.channels, codec.factor)
    weights = {tensor.untyped_storage().data_ptr(): tensor.numel() * 4 for module in (text, codec) for tensor in module.parameters()}
    assert dry.frozen_bytes(EMBEDDED, bf16=False) == pytest.approx(sum(weights.values()), rel=0.01)
    assert codec_sizes(tmp_path) == (3, 1)  # no vae folder: pixels


@pytest.mark.parametrize("bf16", [True, False])
def test_activations_are_what_autograd_really_saves(bf16):
    uvit = build_uvit("portraits")
    saved, weights = {}, {p.untyped_storage().data_ptr() for p in uvit.parameters()}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        uvit(torch.randn(8, 16, 8, 8), torch.rand(8), torch.rand(8), [torch.randn(8, 24, 96)])
    real = sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights)
    with torch.device("meta"):
        uvit = build_uvit("portraits")
    assert dry.activation_bytes(uvit, 8, bf16) == pytest.approx(real, rel=0.01)
    uvit.gradient_checkpointing = True
    inputs = 7 * 8 * 42 * 128 * 4  # blocks x images x tokens x width
    assert inputs < dry.activation_bytes(uvit, 8, bf16) < 0.5 * real


def test_state_is_shared_as_the_stage_says():
    alone, shared = (dry.state_memory(muon=900, adamw=100, stage=1, world_size=n) for n in (1, 10))
    assert list(alone.values()) == [4000, 4000, 4000, 4400, 4000]
    assert list(shared.values()) == [4000, 400, 4400, 440, 400]
    assert list(dry.state_memory(900, 100, 2, 10).values()) == [4000, 400, 400, 440, 400]
    assert list(dry.state_memory(900, 100, 3, 10).values()) == [400, 400, 400, 440, 400]


def test_it_prints_what_uvit_h_needs(capsys):
    config = load_config(ROOT / "configs" / "uvit_h_256.yaml", ["data.shards=portraits", "train.peak_tflops=312", "model.gradient_checkpointing=true"], world_size=16)
    dry.dry_run(config, read_deepspeed_json(ROOT / "configs" / "zero2.json"), 16)
    output = capsys.readouterr().out
    assert "16 rank(s), ZeRO-2" in output and "1,024 images a step = 16 x 2 x 32" in output
    assert "282 tokens" in output and "16 x 312 TFLOP/s (train.peak_tflops)" in output and "gradient checkpointing" in output
    params = float(re.search(r"U-ViT: ([\d.]+) M", output)[1]) * 1e6
    memory = {name.strip(): float(size) for name, size in re.findall(r"^  (.+?)  +([\d.]+)$", output, re.M)}
    assert memory["weights"] == pytest.approx(params * 4 / 2**30, abs=0.001)
    assert memory["gradients"] == pytest.approx(params * 4 / 16 / 2**30, abs=0.001)
    assert memory["together"] == pytest.approx(sum(memory.values()) - memory["together"], abs=0.01)
    flops, hours = 300e6 * 0.874e12, float(re.search(r"([\d,.]+) h at 40%", output)[1])
    assert hours == pytest.approx(flops / (0.4 * 16 * 312e12) / 3600, rel=0.01)
    assert re.search(r"a checkpoint: 7.46 GiB", output)  # weights, averaged weights, two moments: 16 bytes a parameter


def test_as_typed_it_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "proxt2i/train.py", "--dry-run", "--world-size", "8", f"train.run_dir={tmp_path / 'run'}",
                           f"data.portraits_dir={tmp_path / 'data'}"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "8 rank(s), ZeRO-2" in done.stdout and "1.54 M parameters" in done.stdout and "together" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["--dry-run", "--world-size", "3"], "train.batch_size (64) must be divisible by the number of ranks (3)"),
    (["--dry-run", "--world-size", "0"], "--world-size"),
    (["--world-size", "4"], "--world-size"),
    (["--dry-run", "data.image_size=72"], "data.image_size (72) must be a multiple of 16"),
    (["--dry-run", "model.num_heads=5"], "embed_dim 128 must be divisible by num_heads 5"),
    (["--dry-run", "data.shards=EMPTY"], "no .tar shard in EMPTY"),
    (["--dry-run", "model.components=EMPTY"], "text_encoder folder is missing: EMPTY/text_encoder"),
])
def test_what_the_run_would_refuse_is_refused(arguments, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_optimizer_sizes_cover_every_parameter():
    with torch.device("meta"):
        uvit = build_uvit("portraits")
    optim = Config().optim
    muon, adamw = dry.optimizer_sizes(uvit, optim)
    assert muon + adamw == sum(p.numel() for p in uvit.parameters()) and muon > 10 * adamw > 0
    optim.name = "adamw"
    assert dry.optimizer_sizes(uvit, optim) == (0, muon + adamw)
