"""Our rewards give the scores of the public packages, which tests/rewards_vs_packages/golden.json holds (`make rewards-check` computes them anew).

PROXT2I_GOLDEN names another such file.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent / "rewards_vs_packages"))
import cases  # noqa: E402

from proxt2i.rewards import RewardSettings, load_reward, score  # noqa: E402
from proxt2i.rewards import aesthetic, clipscore, hpsv2, imagereward  # noqa: E402
from proxt2i.rewards.clip import clip_of_open_clip, load_clip_tokenizer  # noqa: E402

CPU, FILE = torch.device("cpu"), Path(os.environ.get("PROXT2I_GOLDEN") or cases.GOLDEN)
GOLDEN = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    return load_clip_tokenizer(cases.write_clip_tokenizer(tmp_path_factory.mktemp("clip")))


def weights(name, offset, key="shapes"):
    return cases.weights(GOLDEN[name][key], GOLDEN["seed"] + offset)


def assert_same_scores(name, reward, atol=2e-5):
    reward.name, reward.batch_size = name, 3
    ours = torch.stack([score([reward], batch.float() / 255, cases.PROMPTS)[name] for batch in cases.pictures()])
    theirs = torch.tensor(GOLDEN[name]["scores"])
    assert theirs.std() > 100 * atol  # or agreeing would mean little
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_hpsv2(clip_tokenizer, tmp_path):
    file = tmp_path / hpsv2.FILES[1]
    torch.save({"state_dict": weights("hpsv2", 0), "epoch": 1}, file)
    assert_same_scores("hpsv2", hpsv2.HPSv2(hpsv2.read_clip(file, CPU, torch.float32, *GOLDEN["hpsv2"]["heads"]), clip_tokenizer))


def test_clipscore(clip_tokenizer):
    clip = clip_of_open_clip(weights("clipscore", 2), Path("clip"), CPU, torch.float32, *GOLDEN["clipscore"]["heads"], hidden_act="quick_gelu")
    assert_same_scores("clipscore", clipscore.ClipScore(clip, clip_tokenizer))


def test_aesthetic(tmp_path):
    clip = clip_of_open_clip(weights("aesthetic", 2), Path("clip"), CPU, torch.float32, *GOLDEN["aesthetic"]["heads"], hidden_act="quick_gelu")
    clip.save_pretrained(tmp_path)
    torch.save(weights("aesthetic", 3, "head_shapes"), tmp_path / aesthetic.HEADS[1])
    assert_same_scores("aesthetic", load_reward(RewardSettings("aesthetic", path=str(tmp_path))))


def test_imagereward(tmp_path):
    from transformers import BertTokenizer

    save_file(weights("imagereward", 1), tmp_path / imagereward.FILES[0])
    tokenizer = BertTokenizer.from_pretrained(cases.write_bert_tokenizer(tmp_path / "bert"))
    assert_same_scores("imagereward", imagereward.read_model(tmp_path / imagereward.FILES[0], CPU, torch.float32, tokenizer, cases.BLIP_VISION, GOLDEN["imagereward"]["text_config"]))


def test_pickscore(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    golden = GOLDEN["pickscore"]
    clip = CLIPModel(CLIPConfig(text_config=golden["text_config"], vision_config=golden["vision_config"], projection_dim=golden["projection_dim"]))
    clip.load_state_dict(weights("pickscore", 4))
    clip.save_pretrained(tmp_path)
    cases.write_clip_tokenizer(tmp_path)
    assert_same_scores("pickscore", load_reward(RewardSettings("pickscore", path=str(tmp_path))), atol=1e-4)  # of scores around 20


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    tensors = weights("imagereward", 1)
    tensors["blip.visual_encoder.extra"] = tensors.pop("mlp.layers.7.bias")
    save_file(tensors, tmp_path / "ImageReward.safetensors")
    with pytest.raises(ValueError, match="does not fit the model: 1 missing, first mlp.7.bias; 1 unknown, first blip.visual_encoder.extra"):
        imagereward.read_model(tmp_path / "ImageReward.safetensors", CPU, torch.float32, None, cases.BLIP_VISION, GOLDEN["imagereward"]["text_config"])
    tensors = weights("hpsv2", 0)
    del tensors["visual.ln_post.bias"]
    with pytest.raises(ValueError, match="visual.*ln_post|post_layernorm"):
        clip_of_open_clip(tensors, Path("hps.pt"), CPU, torch.float32, 2, 2)
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="bad.pt is not a readable torch checkpoint"):
        hpsv2.read_clip(tmp_path / "bad.pt", CPU, torch.float32)


def test_checkpoints_with_code_are_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"state_dict": {"a": torch.ones(1)}, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a readable torch checkpoint of plain tensors"):
        hpsv2.read_clip(tmp_path / "evil.pt", CPU, torch.float32)
    assert not (tmp_path / "owned").exists()
