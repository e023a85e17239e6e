"""The command lines as a user types them, on the shipped model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from proxt2i import evaluate, sample
from proxt2i.data.portraits import make_portrait
from proxt2i.embedded import HELD_OUT_SEED, SHIPPED_MODEL
from proxt2i.embedded.judge import Judge, right_attributes
from proxt2i.models.bundle import load_bundle
from proxt2i.pipeline import generate

PROMPT = "a smiling woman with long red hair and glasses"


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(SHIPPED_MODEL)


def test_module_draws_pictures_that_carry_their_settings(tmp_path):
    command = [sys.executable, "-m", "proxt2i.sample", PROMPT, "a man with a beanie", "--num-images", "2", "--seed", "5", "--steps", "6", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 images" in done.stdout
    pictures = sorted(p for p in tmp_path.glob("*.png") if p.name != "grid.png")
    assert len(pictures) == 4 and (tmp_path / "grid.png").exists()
    settings = Image.open(pictures[0]).text
    assert settings["prompt"] == PROMPT and settings["seed"] == "5" and settings["steps"] == "6" and settings["plan"] == "relaxed"
    assert Image.open(pictures[0]).size == (64, 64)


def test_in_bf16_nearly_the_same_pictures(tmp_path):
    pictures = {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        assert sample.main([PROMPT, "--num-images", "2", "--steps", "4", "--dtype", dtype, "--out", str(out)]) == 0
        opened = [Image.open(path) for path in sorted(out.glob("0*.png"))]
        assert len(opened) == 2 and all(picture.text.get("dtype", "fp32") == dtype for picture in opened)
        pictures[dtype] = torch.stack([torch.from_numpy(np.array(picture)) for picture in opened]).float()
    assert 0 < (pictures["fp32"] - pictures["bf16"]).abs().mean() < 3


def test_a_picture_is_its_seed_and_prompt_whatever_the_batch(bundle):
    prompts, seeds = [PROMPT, "a man with a beanie", "a lady with a brimmed hat"], [3, 4, 5]
    together = generate(bundle, prompts, seeds, num_steps=4).int()
    alone = torch.cat([generate(bundle, [p], [s], num_steps=4) for p, s in zip(prompts, seeds)]).int()
    assert (together - alone).abs().max() <= 1
    assert torch.equal(generate(bundle, prompts, seeds, num_steps=4).int(), together)
    other = generate(bundle, prompts, [6, 7, 8], num_steps=4).int()
    assert all((a - b).abs().float().mean() > 2 for a, b in zip(together, other))


def test_a_size_that_is_not_square(bundle, tmp_path):
    assert sample.main([PROMPT, "--num-images", "1", "--steps", "4", "--seed", "3", "--size", "96x48", "--out", str(tmp_path)]) == 0
    assert Image.open(next(tmp_path.glob("000-*.png"))).size == (48, 96)
    own, asked = (generate(bundle, [PROMPT], [3], num_steps=4, size=size) for size in (None, (64, 64)))
    assert torch.equal(own, asked)
    with pytest.raises(SystemExit):
        sample.main([PROMPT, "--size", "96"])


def test_pictures_show_what_the_prompts_say(bundle):
    drawn = [make_portrait(HELD_OUT_SEED + 70_000 + i, complete=True) for i in range(64)]
    images = generate(bundle, [c for _, c, _ in drawn], list(range(64)), num_steps=8, guidance_scale=2.0)
    right, _ = right_attributes(Judge()(images)[0], [m for _, _, m in drawn])
    assert right.float().mean() > 0.985
    swapped, _ = right_attributes(Judge()(images.roll(1, 0))[0], [m for _, _, m in drawn])
    assert swapped.float().mean() < 0.6  # the judge does not just say yes


def test_guidance_on_the_last_steps_costs_no_more_than_it_should(bundle):
    batches = []
    hook = bundle.uvit.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    options = dict(num_steps=4, guidance_scale=1.5)
    last = generate(bundle, [PROMPT], [3], **options, guidance_below=0.0)
    everywhere = generate(bundle, [PROMPT], [3], **options, guidance_below=1.0)
    hook.remove()
    assert batches == [1, 1, 1, 2] + [2] * 4
    assert not torch.equal(last, everywhere)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no prompt"),
        (["  "], "prompt is empty"),
        (["a man", "--prompts", "missing.txt"], "no such file"),
        (["a man", "--plan", "backward", "--steps", "9"], "10"),
        (["a man", "--plan", "hybird"], "did you mean 'hybrid'"),
        (["a man", "--steps", "0"], "--steps 0"),
        (["a man", "--num-images", "0"], "--num-images 0"),
        (["a man", "--guidance", "-1"], "guidance_scale=-1"),
        (["a man", "--guidance-below", "1.5"], "guidance_below=1.5"),
        (["a man", "--size", "64x70"], "size 64x70: height and width must be multiples of 16 pixels for this model; the nearest is 64x64"),
        (["a man", "--model", "nowhere"], "nowhere"),
        (["a man", "--device", "tpu9"], "tpu9"),
    ],
)
def test_wrong_input_is_named(arguments, message, tmp_path, capsys):
    assert sample.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("proxt2i.sample: error:") and message in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_empty_prompt_file_is_named(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n \n")
    assert sample.main(["--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_corrupt_model_is_named(tmp_path, capsys):
    import shutil

    shutil.copytree(SHIPPED_MODEL, tmp_path / "model")
    weights = next((tmp_path / "model" / "uvit").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert sample.main(["a man", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert str(weights) in capsys.readouterr().err


def test_evaluation_writes_its_table(tmp_path, capsys):
    arguments = ["--num-prompts", "32", "--diversity-prompts", "2", "--steps", "4,8", "--guidance", "2", "--out", str(tmp_path)]
    assert evaluate.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [r.get("steps") for r in rows] == [None, None, 4, 8]
    assert rows[0]["accuracy"] > 0.99 and rows[3]["accuracy"] > 0.97
    assert rows[3]["frechet_distance"] > 0 and 0.2 < rows[3]["diversity"] < 2
    assert (tmp_path / "relaxed-steps8-guidance2.png").exists() and "all right" in capsys.readouterr().out


def test_evaluation_refuses_an_invalid_step_count(tmp_path, capsys):
    assert evaluate.main(["--plan", "backward", "--steps", "4", "--out", str(tmp_path)]) == 2
    assert "smallest valid num_steps" in capsys.readouterr().err
