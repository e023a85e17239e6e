import itertools
import random

import numpy as np
import pytest

from proxt2i.data.portraits import ATTRIBUTES, WORDS, draw_attributes, draw_portrait, make_portrait, write_caption, write_portraits
from proxt2i.data.shards import ShardDataset, index_shards


def test_a_portrait_is_a_function_of_its_seed():
    (a, caption_a, meta_a), (b, caption_b, meta_b) = make_portrait(11), make_portrait(11)
    assert np.array_equal(np.asarray(a), np.asarray(b)) and caption_a == caption_b and meta_a == meta_b
    assert not np.array_equal(np.asarray(a), np.asarray(make_portrait(12)[0]))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_of_every_attribute_is_visible(name):
    base = draw_attributes(random.Random(5)) | {"eyewear": "none", "hat": "none"}
    drawn = [np.asarray(draw_portrait(base | {name: value}, random.Random(3)), np.int16) for value in ATTRIBUTES[name]]
    for a, b in itertools.combinations(drawn, 2):
        changed = (np.abs(a - b).max(2) > 40).sum()
        assert changed >= 12, f"{name}: only {changed} pixels differ clearly"


@pytest.mark.parametrize("size", [32, 64, 96])
def test_sizes(size):
    assert make_portrait(0, size)[0].size == (size, size)


def test_an_odd_size_is_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        make_portrait(0, 50)


def words_said(name: str, value: str, caption: str) -> bool:
    options = WORDS[name][value] if name in WORDS else (value,)
    return any(f" {option} " in f" {caption} " for option in options)


def test_captions_say_what_is_stated_and_never_the_wrong_value():
    for seed in range(400):
        _, caption, meta = make_portrait(seed)
        for name, value in meta["attributes"].items():
            if name in meta["stated"] and name != "background":
                assert words_said(name, value, caption), (name, value, caption)
            if name in ("person", "expression", "skin"):
                for other in ATTRIBUTES[name]:
                    assert other == value or not words_said(name, other, caption), (other, caption)


def test_complete_captions_state_all_eight():
    for seed in range(50):
        rng = random.Random(seed)
        attributes = draw_attributes(rng)
        caption, stated = write_caption(attributes, rng, complete=True)
        assert set(stated) == set(ATTRIBUTES) and attributes["background"] in caption


def test_attributes_are_dropped_about_as_often_as_documented():
    stated = [make_portrait(seed)[2] for seed in range(1500)]
    rate = {n: np.mean([n in m["stated"] for m in stated if m["attributes"][n] != "none"]) for n in ATTRIBUTES}
    assert rate.pop("person") == 1
    assert all(0.86 < r < 0.94 for r in rate.values()), rate


def test_shards_hold_what_was_drawn(tmp_path):
    write_portraits(tmp_path / "shards", 25, seed=40, shard_size=10, progress=False)
    dataset = ShardDataset(index_shards(tmp_path / "shards"), 64)
    assert len(dataset) == 25
    image, caption, meta = make_portrait(43)
    sample = dataset[3]
    assert np.array_equal(sample["image"], np.asarray(image).transpose(2, 0, 1))
    assert sample["caption"] == caption and sample["attributes"] == meta
