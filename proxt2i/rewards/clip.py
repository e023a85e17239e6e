"""transformers' CLIPModel as the rewards use it: loaded from a folder, one unit vector per picture and per prompt."""

from __future__ import annotations

import html
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.files import check_component, check_loaded


def load_clip(folder: Path, device: torch.device, dtype: torch.dtype):
    """A CLIPModel from config.json and safetensors weights, in eval mode. ValueError for missing, damaged or unfitting files."""
    from transformers import CLIPModel
    from transformers.utils import logging as logging_utils

    if check_component(folder).get("model_type") != "clip":
        raise ValueError(f"{folder}/config.json is not that of a transformers CLIPModel")
    bar = logging_utils.is_progress_bar_enabled()
    logging_utils.disable_progress_bar()
    try:
        model, info = CLIPModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True)
    finally:
        if bar:
            logging_utils.enable_progress_bar()
    check_loaded(folder, info)
    return model.requires_grad_(False).eval().to(device)


def load_clip_tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"cannot load the tokenizer in {folder}: {error}") from error


@torch.inference_mode()
def embed_images(clip, pixels: Tensor) -> Tensor:
    """float32 [B, 3, size, size], preprocessed -> float32 [B, projection] of length 1, on the model's device."""
    pooled = clip.vision_model(pixel_values=pixels.to(clip.device, clip.dtype)).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


@torch.inference_mode()
def embed_prompts(clip, tokenizer, prompts: list[str]) -> Tensor:
    """float32 [B, projection] of length 1. Prompts are cut at the model's length (77 tokens); equal ones are encoded once."""
    unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    length = clip.config.text_config.max_position_embeddings
    batch = tokenizer(list(unique), padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(clip.device)
    pooled = clip.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    return F.normalize(clip.text_projection(pooled).float(), dim=-1)[[unique[prompt] for prompt in prompts]]


def clean(prompt: str) -> str:
    """As OpenAI's and open_clip's tokenizers begin: HTML entities replaced twice, white space collapsed. (They also run ftfy, which repairs
    wrongly decoded characters; prompts here are taken to be right.)"""
    return " ".join(html.unescape(html.unescape(prompt)).split())
