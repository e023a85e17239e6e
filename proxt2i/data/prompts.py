"""Prompts to draw pictures for: from a file, or captions of the portraits' grammar. A prompt is known by its number, never by its text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PORTRAITS_SEED = 200_000_000  # captions are drawn from this portrait seed on: far from every training and held-out set


@dataclass(frozen=True)
class Prompts:
    """texts[i], metadata[i]: of prompt number i; metadata is what rewards may ask for ({} where there is none)."""

    texts: list[str]
    metadata: list[dict]

    def __len__(self) -> int:
        return len(self.texts)

    def order(self, seed: int, start: int, count: int) -> np.ndarray:
        """Numbers of the prompts of groups start ... start + count - 1: every prompt once in each pass, passes shuffled anew. int64 [count].

        A function of (seed, position) alone, whatever was asked before.
        """
        positions = np.arange(start, start + count)
        passes = {p: np.random.Generator(np.random.PCG64([seed, p])).permutation(len(self)) for p in np.unique(positions // len(self)).tolist()}
        return np.array([passes[p][i] for p, i in zip((positions // len(self)).tolist(), (positions % len(self)).tolist())], dtype=np.int64)


def load_prompts(source: str, num: int, seed: int, complete: bool) -> Prompts:
    """Read `source`: a text file with a prompt a line, a .jsonl with {"prompt": ..., "metadata": {...}} a line, or "portraits": `num` captions
    of the grammar (`complete`: stating every attribute), which carry their attributes. Empty lines are left out.

    ValueError naming the file and the line for what cannot be read, and for a file without prompts.
    """
    if source == "portraits":
        return _portraits(num, seed, complete)
    texts, metadata = [], []
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts.source: {source} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            text, about = _parse(line, f"{source}, line {number}") if source.endswith(".jsonl") else (line.strip(), {})
            texts.append(text)
            metadata.append(about)
    if not texts:
        raise ValueError(f"prompts.source: {source} holds no prompts")
    return Prompts(texts, metadata)


def _parse(line: str, where: str) -> tuple[str, dict]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    prompt, metadata = (entry.get("prompt"), entry.get("metadata", {})) if isinstance(entry, dict) else (None, {})
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(metadata, dict):
        raise ValueError(f'{where} must be like {{"prompt": "a red car", "metadata": {{}}}}, metadata being optional')
    return prompt.strip(), metadata


def _portraits(num: int, seed: int, complete: bool) -> Prompts:
    import random

    from proxt2i.data.portraits import draw_attributes, write_caption

    texts, metadata = [], []
    for i in range(num):
        rng = random.Random(PORTRAITS_SEED + seed * num + i)
        attributes = draw_attributes(rng)
        text, stated = write_caption(attributes, rng, complete)
        texts.append(text)
        metadata.append({"attributes": attributes, "stated": stated})
    return Prompts(texts, metadata)
