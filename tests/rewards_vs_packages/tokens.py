"""Our reading of prompts gives the tokens of hpsv2's (open_clip's) tokenizer, with the real vocabulary. Run by `make rewards-check`, which
sets PROXT2I_GOLDEN to the file beside which score_with_packages.py has put tokens.json and the vocabulary."""

import json
import os
from pathlib import Path

import pytest

from proxt2i.rewards.clip import clean, load_clip_tokenizer

FOLDER = Path(os.environ["PROXT2I_GOLDEN"]).parent
TOKENS = json.loads((FOLDER / "tokens.json").read_text())


@pytest.mark.parametrize("text", TOKENS)
def test_tokens(text):
    ours = load_clip_tokenizer(FOLDER / "clip-tokenizer")([clean(text)], padding="max_length", truncation=True, max_length=77)["input_ids"][0]
    end = ours[0] + 1  # the end token follows the start token, and what comes after the first one does not matter
    theirs = TOKENS[text]
    assert ours[: ours.index(end) + 1] == theirs[: theirs.index(end) + 1]
