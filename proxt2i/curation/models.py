"""The model stages of a scan, each a small class: a batch of pictures in, one value a picture out."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from proxt2i.curation.config import Curation
from proxt2i.rewards import RewardSettings, load_reward, score
from proxt2i.rewards.clip import embed_images, load_clip, load_clip_tokenizer
from proxt2i.rewards.preprocess import clip_pixels

HANDS = ("a photo in which a hand is visible", "a close-up photo of hands and fingers", "a person holding something in their hand")
NO_HANDS = ("a photo in which no hand is visible", "a close-up photo of a face", "a portrait cut off at the shoulders")


class Scores:
    """Any reward of proxt2i.rewards. (uint8 [B, S, S, 3], captions) -> float32 [B]."""

    def __init__(self, config: Curation, device: torch.device):
        c = config.aesthetic
        self.batch_size = c.batch_size
        self.reward = load_reward(RewardSettings(c.reward, path=c.path, batch_size=c.batch_size, dtype=c.dtype), device)

    def __call__(self, pictures: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        return score([self.reward], images, list(captions))[self.reward.name].numpy()


class ClipHands:
    """Zero-shot: the probability that a CLIPModel gives to prompts about hands against prompts about none."""

    def __init__(self, folder: Path, device: torch.device):
        self.clip = load_clip(folder, device, torch.float32)
        tokens = load_clip_tokenizer(folder)(list(HANDS + NO_HANDS), padding=True, truncation=True, return_tensors="pt",
                                               max_length=self.clip.config.text_config.max_position_embeddings).to(device)
        with torch.inference_mode():
            features = self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)
            self.text = torch.nn.functional.normalize(features, dim=-1)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """float32 [B, 3, S, S] in [0, 1] -> probability float32 [B]."""
        embeddings = embed_images(self.clip, clip_pixels(images, self.clip.config.vision_config.image_size))
        chances = (self.clip.logit_scale.exp() * embeddings @ self.text.T).softmax(-1)
        return chances[:, : len(HANDS)].sum(-1).cpu()


class Hands:
    """The detector that `hands.detector` names. uint8 [B, S, S, 3] -> bool [B]."""

    def __init__(self, config: Curation, device: torch.device):
        self.batch_size, self.threshold = config.hands.batch_size, config.hands.threshold
        self.detector = load_detector(config.hands.detector, device)

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        chances = self.detector(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        if not isinstance(chances, Tensor) or chances.shape != (len(pictures),):
            raise ValueError(f"hands.detector returned {getattr(chances, 'shape', type(chances).__name__)} for {len(pictures)} pictures, not one probability each")
        return chances.float().cpu().numpy() >= self.threshold


def load_detector(name: str, device: torch.device):
    """clip:FOLDER, or MODULE:FUNCTION: function(device) -> detector(images float32 [B, 3, S, S] in [0, 1]) -> probability [B]. ValueError if it cannot be had."""
    kind, colon, rest = name.partition(":")
    if not colon:
        raise ValueError(f"hands.detector: {name!r} must be clip:FOLDER (a transformers CLIPModel with its tokenizer) or MODULE:FUNCTION")
    if kind == "clip":
        folder = Path(rest).expanduser()
        if not folder.is_dir():
            raise ValueError(f"hands.detector: {folder} does not exist; get a CLIPModel into it, for example\n"
                             f"  hf download openai/clip-vit-large-patch14 config.json model.safetensors tokenizer.json vocab.json merges.txt --local-dir {folder}")
        return ClipHands(folder, device)
    try:
        return getattr(importlib.import_module(kind), rest)(device)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"hands.detector: cannot import {rest} from {kind} ({error})") from None
