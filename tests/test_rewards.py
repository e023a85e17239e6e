"""The interface of rewards, and the rewards whose weights ship with the package or that need none."""

import json
import random
import threading

import pytest
import torch

from proxt2i.data.portraits import ATTRIBUTES, draw_attributes, make_arrays, write_caption
from proxt2i.data.prompts import load_prompts
from proxt2i.images import save_png, to_pil, to_uint8
from proxt2i.rewards import REWARDS, RewardError, RewardSettings, Scorer, combine, load_reward, read_settings, score, settings_of
from proxt2i.rewards.__main__ import main
from proxt2i.rewards.contrast import changed_captions
from proxt2i.rewards.portraits import read_caption
from proxt2i.rewards.preprocess import quantise


@pytest.fixture(scope="module")
def portraits():
    images, captions, metadata = make_arrays(100_000_700, 24)
    return torch.from_numpy(images).float() / 255, captions, metadata


class Fixed:
    """A reward that calls `function`, and notes its batches."""

    def __init__(self, function, name="fixed", batch_size=4):
        self.function, self.name, self.batch_size, self.batches = function, name, batch_size, []

    def __call__(self, images, prompts, metadata=None):
        self.batches.append(len(prompts))
        return self.function(images, prompts, metadata)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_from_yaml(tmp_path):
    file = tmp_path / "rewards.yaml"
    file.write_text("rewards:\n- {name: pickscore, path: portraits, weight: 2}\n- name: portraits\n- {name: http, url: 'http://a:1/hpsv2', timeout_s: 5}\n")
    settings = read_settings(file)
    assert [s.key for s in settings] == ["pickscore", "portraits", "hpsv2"] and settings[0].weight == 2.0 and settings[2].timeout_s == 5


@pytest.mark.parametrize(("entries", "message"), [
    (["pickscor"], r"rewards\[0\]: unknown reward 'pickscor'; did you mean pickscore\?"),
    (["portraits", {"name": "portraits", "weigth": 1}], r"rewards\[1\]: unknown key weigth; did you mean weight\?"),
    ([{"name": "portraits", "weight": "much"}], "weight must be float, got 'much'"),
    ([{"name": "portraits", "batch_size": 0}], "batch_size must be at least 1"),
    ([{"name": "pickscore", "path": "a/b", "revision": "main"}], "40 hexadecimal digits"),
    ([{"name": "portraits", "dtype": "half"}], "dtype must be one of fp32, bf16, fp16"),
    (["http"], "url"),
    (["portraits", "portraits"], "2 rewards are called 'portraits'; give each a label"),
    ([{"weight": 1}], "a mapping with one"),
    ({}, "must be a list"),
])  # fmt: skip
def test_wrong_settings_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        settings_of(entries)


def test_missing_weights_say_what_to_get_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PROXT2I_REWARDS", str(tmp_path))
    with pytest.raises(ValueError) as error:
        load_reward(RewardSettings("pickscore"))
    text = str(error.value)
    assert "lacks config.json, model.safetensors" in text and f"hf download yuvalkirstain/PickScore_v1 config.json model.safetensors --revision COMMIT --local-dir {tmp_path}/pickscore" in text
    with pytest.raises(ValueError, match="needs `revision`"):
        load_reward(RewardSettings("pickscore", path="yuvalkirstain/PickScore_v1"))


# -- score and combine ------------------------------------------------------------------------------------------------


def test_score_batches_each_reward_by_its_own_size():
    images, prompts = torch.rand(10, 3, 8, 8), [f"prompt {i}" for i in range(10)]
    metadata = [{"i": i} for i in range(10)]
    small = Fixed(lambda x, p, m: x.mean((1, 2, 3)), "small", 3)
    large = Fixed(lambda x, p, m: torch.tensor([10.0 * d["i"] + int(q[7:]) for d, q in zip(m, p)]), "large", 16)
    scores = score([small, large], images, prompts, metadata)
    assert small.batches == [3, 3, 3, 1] and large.batches == [10]
    assert torch.equal(scores["small"], images.mean((1, 2, 3))) and scores["large"].tolist() == [11.0 * i for i in range(10)]


@pytest.mark.parametrize(("function", "message"), [
    (lambda x, p, m: torch.where(torch.tensor([q == "prompt 5" for q in p]), torch.nan, 1.0), "reward bad, prompt 'prompt 5': returned nan for image 5"),
    (lambda x, p, m: torch.ones(3), r"reward bad, images 0 to 3, first prompt 'prompt 0': returned \[3\] for 4 images"),
    (lambda x, p, m: [1.0] * len(p), "returned list"),
    (lambda x, p, m: {}["x"], "reward bad, images 0 to 3, first prompt 'prompt 0': KeyError: 'x'"),
])  # fmt: skip
def test_a_failing_reward_is_named_with_the_prompt(function, message):
    with pytest.raises(RewardError, match=message):
        score([Fixed(function, "bad")], torch.rand(6, 3, 8, 8), [f"prompt {i}" for i in range(6)])


def test_wrong_inputs_are_refused():
    reward, good = Fixed(lambda x, p, m: torch.ones(len(p))), torch.rand(2, 3, 8, 8)
    for images, prompts, metadata, message in [
        (good * 2 - 1, ["a", "b"], None, r"image \d \('[ab]'\) has values outside \[0, 1\]"),
        (good.index_fill(0, torch.tensor([1]), torch.nan), ["a", "b"], None, r"image 1 \('b'\)"),
        (good, ["a"], None, "2 images, 1 prompts"),
        (good, ["a", "b"], [None], "1 metadata"),
        ((good * 255).byte(), ["a", "b"], None, "must be float"),
    ]:
        with pytest.raises(ValueError, match=message):
            score([reward], images, prompts, metadata)
    assert not reward.batches


def test_combine_normalises_within_groups_then_weighs():
    settings = [RewardSettings("portraits", weight=2.0), RewardSettings("jpeg_compressibility", weight=-1.0)]
    group = torch.tensor([7, 3, 7, 3, 9])
    scores = {"portraits": torch.tensor([1.0, 0.5, 3.0, 0.5, 5.0]), "jpeg_compressibility": torch.tensor([0.0, 100.0, 0.0, 300.0, 1.0])}
    # group 7: portraits +-1 sigma; group 3: jpeg +-1 sigma, portraits all the same; group 9: alone
    assert combine(scores, settings, group).tolist() == [-2.0, 1.0, 2.0, -1.0, 0.0]
    moved = {"portraits": 1000 * scores["portraits"] + 3, "jpeg_compressibility": scores["jpeg_compressibility"]}
    torch.testing.assert_close(combine(moved, settings, group), combine(scores, settings, group))
    noise = {"portraits": torch.tensor([0.0, 1e-6]), "jpeg_compressibility": torch.zeros(2)}
    assert combine(noise, settings, torch.zeros(2, dtype=torch.int64)).abs().max() < 0.02  # the floor


def test_combine_refuses_missing_scores():
    with pytest.raises(ValueError, match="no scores of portraits; there are scores of x"):
        combine({"x": torch.ones(2)}, [RewardSettings("portraits")], torch.zeros(2, dtype=torch.int64))


def test_scorer_works_in_the_background_and_passes_errors_on():
    release = threading.Event()
    slow = Fixed(lambda x, p, m: (release.wait(20), x.mean((1, 2, 3)))[1], "slow")
    images = torch.full((2, 3, 8, 8), 0.25)
    with Scorer([slow]) as scorer:
        future = scorer.submit(images, ["a", "b"])
        images.fill_(1.0)  # the caller's tensor is its own again
        assert not future.done()
        release.set()
        assert future.result(20)["slow"].tolist() == [0.25, 0.25]
    with Scorer([Fixed(lambda x, p, m: 1 / 0, "broken")]) as scorer, pytest.raises(RewardError, match="reward broken, prompt 'a': ZeroDivisionError"):
        scorer.submit(images[:1], ["a"]).result(20)


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_quantise_gives_the_bytes_of_the_saved_png():
    x = torch.rand(4, 3, 8, 8) * 2.2 - 1.1
    assert torch.equal(quantise((x + 1) / 2), to_uint8(x))


def test_jpeg_is_the_size_of_the_file(portraits, tmp_path):
    images, captions, _ = portraits
    scores = score([load_reward(RewardSettings(name)) for name in ("jpeg_compressibility", "jpeg_incompressibility")], images, captions)
    for i in range(4):
        to_pil(quantise(images)[i]).save(tmp_path / "a.jpg", quality=95)
        assert scores["jpeg_incompressibility"][i].item() == pytest.approx((tmp_path / "a.jpg").stat().st_size / 1000)
    assert torch.equal(scores["jpeg_compressibility"], -scores["jpeg_incompressibility"])


def test_portraits_counts_stated_attributes(portraits):
    images, captions, metadata = portraits
    reward = load_reward(RewardSettings("portraits"))
    assert score([reward], images, captions, metadata)["portraits"].mean() > 0.99
    assert torch.equal(score([reward], images, captions)["portraits"], score([reward], images, captions, metadata)["portraits"])  # read from the captions
    person, hair = metadata[0]["attributes"]["person"], metadata[0]["attributes"]["hair_color"]
    wrong = {"attributes": {"person": person, "hair_color": "red" if hair != "red" else "gray"}, "stated": ["person", "hair_color"]}
    assert reward(images[:1], captions[:1], [wrong]).item() == 0.5
    with pytest.raises(RewardError, match="a red bicycle.*states no attribute"):
        score([reward], images[:1], ["a red bicycle"])


def test_every_caption_of_the_grammar_is_read_right():
    for seed in range(3000):
        rng = random.Random(seed)
        attributes = draw_attributes(rng)
        caption, stated = write_caption(attributes, rng, complete=seed % 2 == 0)
        assert read_caption(caption) == {"attributes": {n: attributes[n] for n in attributes if n in stated}, "stated": [n for n in attributes if n in stated]}, caption


def test_pickscore_of_the_embedded_clip_is_its_logit(portraits):
    from transformers import AutoTokenizer

    from proxt2i.embedded import ASSETS
    from proxt2i.embedded.train_clip import load_clip, pixels, tokenize

    images, captions, _ = portraits
    reward = load_reward(RewardSettings("pickscore", path="portraits", batch_size=7))
    scores = score([reward], images, captions)["pickscore"]
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    with torch.no_grad():
        expected = load_clip(ASSETS / "clip")(pixel_values=pixels(quantise(images)), **tokenize(tokenizer, captions)).logits_per_image.diagonal()
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert (scores > score([reward], images, captions[1:] + captions[:1])["pickscore"]).float().mean() > 0.95


# -- the command ------------------------------------------------------------------------------------------------------


def test_files_are_scored_by_the_prompt_that_they_carry(portraits, tmp_path, capsys):
    images, captions, metadata = portraits
    files = [save_png(to_pil(quantise(images)[i]), tmp_path / f"{i}.png", {"prompt": captions[i]}) for i in range(2)]
    to_pil(quantise(images)[2]).resize((96, 64)).save(tmp_path / "2.png")
    flags = ["--reward", "portraits,pickscore", "--set", "pickscore.path=portraits", "--json", "--device", "cpu"]
    assert main([str(f) for f in files] + flags) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rewards = [load_reward(s) for s in settings_of(["portraits", {"name": "pickscore", "path": "portraits"}])]
    expected = score(rewards, images[:2], captions[:2])
    for i, row in enumerate(rows):
        assert row["prompt"] == captions[i] and row["portraits"] == 1.0 and row["pickscore"] == pytest.approx(expected["pickscore"][i].item(), abs=1e-4)
    assert main([str(files[0]), str(tmp_path / "2.png"), "--prompt", captions[0], *flags]) == 0  # of two sizes
    alone = json.loads(capsys.readouterr().out.splitlines()[0])
    assert alone == rows[0] | {"pickscore": pytest.approx(rows[0]["pickscore"], abs=1e-4)}  # batches differ, so it does by rounding


def test_mistakes_on_the_command_line_are_explained(portraits, tmp_path, capsys):
    to_pil(quantise(portraits[0])[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    for arguments, message in [
        ([a, "--reward", "portraits"], "carries no prompt: give --prompt"),
        ([a, "--reward", "portraits", "--prompt", "a man", "--prompt", "a woman"], "2 --prompt for 1 pictures"),
        ([b, "--reward", "portraits", "--prompt", "a man"], "b.png is not a readable picture"),
        ([a, "--reward", "jpeg", "--prompt", "a man"], "did you mean jpeg_compressibility?"),
        ([a, "--reward", "portraits", "--prompt", "a bicycle"], "reward portraits, prompt 'a bicycle'"),
        (["--reward", "portraits"], "no picture"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_list_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROXT2I_REWARDS", str(tmp_path))
    (tmp_path / "imagereward").mkdir()
    for file in ("ImageReward.pt", "vocab.txt"):
        (tmp_path / "imagereward" / file).touch()
    assert main(["--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")}
    assert lines.keys() == REWARDS.keys()
    assert f"found in {tmp_path}/imagereward" in lines["imagereward"] and "lacks config.json" in lines["clipscore"] and lines["portraits"].endswith("ready")


def test_the_contrast_asks_whether_the_prompt_fits_better_than_its_negatives(portraits):
    images, captions, metadata = portraits
    pickscore, contrast = (load_reward(RewardSettings(name, path="portraits")) for name in ("pickscore", "pickscore_contrast"))
    given = [captions[1], captions[2]]
    scores = score([contrast], images[:1], captions[:1], [{"negatives": given}])["pickscore_contrast"]
    each = torch.cat([score([pickscore], images[:1], [text])["pickscore"] for text in (captions[0], *given)])
    torch.testing.assert_close(scores, each.log_softmax(0)[:1], atol=1e-4, rtol=0)
    assert (score([contrast], images, captions, metadata)["pickscore_contrast"] > -0.7).float().mean() > 0.9  # drawings show what they say: above 1/2
    wrong = [changed_captions(caption)[0] for caption in captions]
    assert (score([contrast], images, wrong)["pickscore_contrast"] < -0.7).float().mean() > 0.9


@pytest.mark.parametrize("complete", [True, False])
def test_a_changed_caption_differs_in_one_attribute(complete):
    prompts = load_prompts("portraits", 100, 3, complete)
    for text, about in zip(prompts.texts, prompts.metadata):
        stated = {name: about["attributes"][name] for name in about["stated"]}
        read = [read_caption(changed)["attributes"] for changed in changed_captions(text)]
        assert len(read) == sum(len(ATTRIBUTES[name]) - 1 for name in stated) == len({tuple(sorted(r.items())) for r in read})
        assert all(r.keys() == stated.keys() and sum(r[name] != stated[name] for name in stated) == 1 for r in read)
