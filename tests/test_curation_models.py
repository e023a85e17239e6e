"""The model stages of a curation with the real classes, tiny: scores, hands, captions, and what happens to captions that fail."""

import json

import numpy as np
import pytest
import torch
from faulty_shards import encoded, picture, read_result
from PIL import Image
from tiny_models import teach, write_aesthetic, write_qwen

from proxt2i.curation.__main__ import main
from proxt2i.curation.captioner import Captioner, judge
from proxt2i.curation.config import CaptionConfig, Curation, load_curation
from proxt2i.curation.models import ClipHands, Scores, load_detector
from proxt2i.curation.pictures import full_picture

CPU = torch.device("cpu")
SMALL = ["filter.min_short=48", "write.held_out=0", "run.workers=1", "run.device=cpu", "--quiet"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Knows dark and light pictures."""
    folder = write_qwen(tmp_path_factory.mktemp("qwen"))
    captioner = Captioner(CaptionConfig(str(folder), "What?", dtype="fp32", max_pixels=56 * 56), CPU)
    teach(captioner, [np.full((56, 56, 3), level, np.uint8) for level in (40, 230)], ["A dark square, all alone.", "A light square, all alone."])
    captioner.model.save_pretrained(folder)
    return folder


def folder_of(tmp_path, images, captions=None):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i:03d}.png").write_bytes(encoded(image, "PNG"))
        if captions and captions[i]:
            (folder / f"{i:03d}.txt").write_text(captions[i])
    return folder


def test_captions_are_of_their_pictures(qwen, tmp_path):
    """Seven pictures in batches of three, of other shapes than each other: greedy, at once, and each its own."""
    levels = [30, 240, 50, 225, 235, 45, 35]
    images = [Image.new("RGB", (56 + 8 * (i % 3), 56 + 4 * (i % 2)), (level,) * 3) for i, level in enumerate(levels)]
    folder = folder_of(tmp_path, images, [f"old {i}" if i else None for i in range(7)])
    settings = [f"caption.model={qwen}", "caption.prompt=What?", "caption.dtype=fp32", "caption.max_pixels=3136", "caption.batch_size=3", "dedup.near=false"]
    assert main([str(folder), str(tmp_path / "out"), *SMALL, *settings, "filter.placeholder_repeats=0", "dedup.exact=false"]) == 0
    found = {}
    import tarfile
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                about = json.loads(tar.extractfile(member).read())
                found[int(about["source"].split("/")[1])] = about
    assert [("light" if level > 128 else "dark") in found[i]["caption"] for i, level in enumerate(levels)] == [True] * 7, found
    assert [found[i]["original_caption"] for i in range(7)] == [""] + [f"old {i}" for i in range(1, 7)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["captions"] == {"made": 7, "troubles": {}}


def test_a_batch_changes_nothing(qwen):
    captioner = Captioner(CaptionConfig(str(qwen), "What?", dtype="fp32", max_pixels=112 * 112, max_tokens=12), CPU)
    rng = np.random.default_rng(0)
    shown = [rng.integers(0, 256, (60 + 20 * i, 90, 3), dtype=np.uint8) for i in range(3)]
    assert captioner.generate(shown) == [captioner.generate([one])[0] for one in shown]


@pytest.mark.parametrize("on_failure, kept, dropped", [("original", 2, {"no caption could be made": 1}), ("drop", None, None)])
def test_failing_captions_are_counted_and_tried_again(tmp_path, on_failure, kept, dropped):
    """An untrained model says nothing of use: its answers never end."""
    qwen = write_qwen(tmp_path / "qwen", seed=1)
    rng = np.random.default_rng(0)
    folder = folder_of(tmp_path, [picture(rng, 64, 60) for _ in range(3)], ["one", None, "three"])
    code = main([str(folder), str(tmp_path / "out"), *SMALL, f"caption.model={qwen}", "caption.dtype=fp32", "caption.max_pixels=3136", "caption.max_tokens=8", "caption.retries=1",
                 f"caption.on_failure={on_failure}"])
    if kept is None:
        assert code == 2  # nothing is left
        return
    assert code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["samples_out"] == kept and manifest["dropped"] == dropped
    assert sum(manifest["captions"]["troubles"].values()) == 3 and manifest["captions"]["made"] == 0
    assert set(read_result(tmp_path / "out")) == {"one", "three"}


def test_what_is_wrong_with_a_caption():
    good = "A woman with red hair smiles at the camera, her left hand on her chin."
    assert judge(good, True) == (good, "")
    assert judge(f'Here is a detailed caption: "{good}"\n', True) == (good, "")
    assert judge("", True) == judge(" \n", True) == judge("...", True) == ("", "empty")
    for text in ("I'm sorry, but I can't describe people in this picture.", "I cannot assist with that.", "As an AI language model, I have no eyes.", "Unfortunately, I am not able to see it."):
        assert judge(text, True) == ("", "refusal"), text
    assert judge("A man in a hat " * 20, True) == ("", "loop") and judge("very " * 40, False) == ("", "loop")
    assert judge(f"{good} Behind her there is a", False) == (good, "") and judge("A woman with red hair who", False) == ("", "unfinished")
    assert judge("She says sorry to the man on the left, and he smiles.", True)[1] == ""


def test_scores_are_the_rewards(tmp_path):
    """The pictures that pass are those to which the reward itself, on the same crop, gives enough."""
    weights, rng = write_aesthetic(tmp_path / "weights"), np.random.default_rng(0)
    images = [picture(rng, 64, 64) for _ in range(24)]
    folder = folder_of(tmp_path, images, [f"number {i}" for i in range(24)])
    aesthetic = ["aesthetic.reward=aesthetic", f"aesthetic.path={weights}", "aesthetic.image_size=64", "aesthetic.batch_size=7"]
    expected = Scores(load_curation((), aesthetic), CPU)(np.stack([np.asarray(image) for image in images]), [""] * 24)
    middle = float(np.median(expected))
    assert expected.std() > 0.01
    assert main([str(folder), str(tmp_path / "out"), *SMALL, *aesthetic, f"aesthetic.min_score={middle}"]) == 0
    found = read_result(tmp_path / "out")
    assert set(found) == {f"number {i}" for i in range(24) if expected[i] >= middle}
    assert all(abs(about["score"] - expected[int(caption.split()[1])]) < 1e-3 for caption, about in found.items())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"score too low": 24 - len(found)} and sum(manifest["histograms"]["score"]) == 24


def brightness(device):
    """A detector that takes bright pictures for hands."""
    return lambda images: images.mean((1, 2, 3))


def test_hands_by_metadata_first_then_by_the_detector(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray((np.asarray(picture(rng, 64, 64)) // 3 + 150 * (i % 2)).astype(np.uint8)) for i in range(8)]
    folder = folder_of(tmp_path, images, [f"number {i}" for i in range(8)])
    (folder / "000.json").write_text('{"num_hands": 2}')  # dark
    (folder / "001.json").write_text('{"num_hands": 0}')  # bright
    assert main([str(folder), str(tmp_path / "out"), *SMALL, "hands.detector=test_curation_models:brightness", "write.hands_apart=true"]) == 0
    flags = {caption: about["hands"] for caption, about in read_result(tmp_path / "out").items()}
    assert flags == {f"number {i}": {0: True, 1: False}.get(i, i % 2 == 1) for i in range(8)}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"] == {"train": 4, "hands": 4} and manifest["hands"] == 4


def test_zero_shot_hands_with_the_embedded_clip():
    """A CLIPModel with a tokenizer of its own: probabilities, the same alone as in a batch."""
    import shutil
    import tempfile
    from pathlib import Path

    from proxt2i.embedded import ASSETS

    with tempfile.TemporaryDirectory() as name:
        for source in [*(ASSETS / "clip").iterdir(), *(ASSETS / "tokenizer").iterdir()]:
            shutil.copy(source, name)
        detector = load_detector(f"clip:{name}", CPU)
        assert isinstance(detector, ClipHands) and Path(name).is_dir()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    chances = detector(images)
    assert chances.shape == (4,) and ((0 < chances) & (chances < 1)).all() and chances.std() > 0
    torch.testing.assert_close(chances, torch.cat([detector(one[None]) for one in images]))


def test_defaults_are_those_of_the_data_set():
    config = Curation()
    assert (config.filter.min_short, config.filter.max_aspect, config.aesthetic.min_score) == (256, 16 / 9, 4.5)
    assert full_picture(encoded(Image.new("CMYK", (40, 30))), 10**6).mode == "RGB"
