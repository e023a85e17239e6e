"""LoRA under GRPO: adapters alone are trained, against the network without them; killed runs continue to the bit, and the result is a plain model."""

import shutil

import pytest
import torch
from grpo_runs import make, overrides
from runs import assert_same_checkpoint
from tiny_run import weights

from proxt2i.export import main as export_main
from proxt2i.models.bundle import load_uvit
from proxt2i.models.uvit import UViT2DModel
from proxt2i.training.lora import Lora, add_adapters, adapters_off, merge

LORA = dict(policy__lora_rank=4, policy__lora_alpha=8.0, policy__kl=0.1, optim__lr=1e-2, optim__eps=1e-8, guard__every=0, train__keep_checkpoints=3)


def outputs(uvit, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y, t, lam = torch.randn(3, 2, 4, 4, generator=generator), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.1, 1.0, 3.0])
    with torch.no_grad():
        return uvit(y, t, lam, [torch.randn(3, 4, 16, generator=generator)])


def test_adapters_alone_are_trained_and_end_in_a_plain_model(grpo, ranks, model, tmp_path):
    trainer = make(grpo, ranks, **LORA, sample__every=96, sample__prompts="[a red square]")
    before = {name: p.clone() for name, p in trainer.uvit.named_parameters()}
    kls, add = [], trainer.meter.add_transition
    trainer.meter.add_transition = lambda value, log_ratio, kl, outside: kls.append(kl.detach()) or add(value, log_ratio, kl, outside)
    assert trainer.reference is None  # no second copy
    trainer.run()
    assert not kls[0].any() and not kls[1].any() and kls[-1].min() > 0  # exactly the network itself, then not any more
    trained = {name: p for name, p in trainer.uvit.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained) and len(trained) == 2 * 4 * 3  # two factors, four layers, three blocks
    assert trained.keys() == weights(tmp_path / "run", 96).keys()
    for name, p in trainer.uvit.named_parameters():
        assert torch.equal(p, before[name]) != (name in trained)
    base = load_uvit(model / "uvit")
    with adapters_off(trainer.uvit):
        assert torch.equal(outputs(trainer.uvit), outputs(base))

    assert export_main([str(tmp_path / "run"), "--weights", "raw", "--out", str(tmp_path / "raw"), "--adapter", str(tmp_path / "adapter")]) == 0
    raw = load_uvit(tmp_path / "raw" / "uvit")
    assert raw.state_dict().keys() == base.state_dict().keys() and not torch.allclose(outputs(raw), outputs(base), atol=1e-3)
    torch.testing.assert_close(outputs(raw), outputs(trainer.uvit), atol=1e-5, rtol=1e-4)
    from peft import PeftModel

    torch.testing.assert_close(outputs(PeftModel.from_pretrained(base, tmp_path / "adapter")), outputs(raw), atol=1e-5, rtol=1e-4)
    averaged = merge(load_uvit(model / "uvit"), Lora(4, 8.0), {name: v.view(trained[name].shape) for name, v in weights(tmp_path / "run", 96, "ema").items()})
    assert torch.equal(outputs(load_uvit(tmp_path / "run" / "model" / "uvit")), outputs(averaged))
    assert (tmp_path / "run" / "samples" / "000000096.png").exists()


def test_a_resumed_run_ends_with_the_same_bits_and_wrong_ways_are_refused(grpo, ranks, model, tmp_path, capsys):
    make(grpo, ranks, **LORA).run()
    half = tmp_path / "run" / "checkpoints" / "step-000000032"
    make(grpo, ranks, resume=str(half), train__run_dir=tmp_path / "again", **LORA).run()
    assert_same_checkpoint(tmp_path / "run/checkpoints/step-000000096", tmp_path / "again/checkpoints/step-000000096", ranks=1)
    with pytest.raises(ValueError, match="written with LoRA {'rank': 4, 'alpha': 8.0}, this run asks for off"):
        make(grpo, ranks, resume=str(half), train__run_dir=tmp_path / "other")
    base = shutil.copytree(model, tmp_path / "base")
    net = load_uvit(base / "uvit")
    with torch.no_grad():
        net.out.bias.add_(1)
    net.save_pretrained(base / "uvit")
    assert export_main([str(tmp_path / "run"), "--base", str(base)]) == 2
    assert "not (or no longer) the network that they were trained on: say where that model folder is with --base" in capsys.readouterr().err
    assert export_main([str(tmp_path / "run"), "--base", str(model), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("changes, message", [
    (["policy.lora_rank=4", "optim.name=muon"], "needs optim.name=adamw"),
    (["policy.lora_alpha=4"], "belongs to a policy.lora_rank above 0"),
    (["policy.lora_rank=-1"], "policy.lora_rank"),
])
def test_wrong_settings_are_refused(grpo, changes, message, capsys):
    from proxt2i.grpo import main

    assert main(["--dry-run", *overrides(grpo), *changes]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_counts_the_adapters(grpo, capsys):
    from proxt2i.grpo import main

    assert main(["--dry-run", *overrides(grpo), "policy.lora_rank=4"]) == 0
    said = capsys.readouterr().out
    assert "LoRA: adapters of rank 4, 0.01 M parameters" in said and "reference network: 0.00 GiB" in said


def test_compiled_blocks_follow_the_switch(model):
    uvit = load_uvit(model / "uvit")
    add_adapters(uvit, Lora(2, 2.0))
    with torch.no_grad():
        for name, p in uvit.named_parameters():
            if ".lora_B." in name:
                p.add_(0.1)
    eager = outputs(uvit)
    UViT2DModel.compile_repeated_blocks(uvit, fullgraph=True, backend="eager")
    torch.testing.assert_close(outputs(uvit), eager)
    with adapters_off(uvit):
        torch.testing.assert_close(outputs(uvit), outputs(load_uvit(model / "uvit")))
    torch.testing.assert_close(outputs(uvit), eager)
