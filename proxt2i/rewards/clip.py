"""transformers' CLIPModel as the rewards use it: loaded from a folder or from open_clip's names, one unit vector per picture and per prompt."""

from __future__ import annotations

import html
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.files import check_component, check_loaded
from .weights import quiet_loading


def load_clip(folder: Path, device: torch.device, dtype: torch.dtype):
    """A CLIPModel from config.json and safetensors weights, in eval mode. ValueError for missing, damaged or unfitting files."""
    if check_component(folder).get("model_type") != "clip":
        raise ValueError(f"{folder}/config.json is not that of a transformers CLIPModel")
    return _from_pretrained(folder, folder, device, dtype, use_safetensors=True, local_files_only=True)


def clip_of_open_clip(tensors: dict[str, Tensor], path: Path, device: torch.device, dtype: torch.dtype, text_heads: int, vision_heads: int, hidden_act: str = "gelu"):
    """The CLIPModel of a state_dict in open_clip's (and OpenAI's) names, of the file `path`. Sizes are those of the tensors, but the
    numbers of attention heads cannot be seen in them. ValueError when a tensor is missing, unknown or of a wrong shape."""
    from transformers import CLIPConfig

    try:
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        vocabulary, text_width = tensors["token_embedding.weight"].shape
        side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
        layers = {kind: len({k for k in tensors if re.fullmatch(rf"{kind}transformer\.resblocks\.\d+\.ln_1\.weight", k)}) for kind in ("", "visual.")}
        text = dict(vocab_size=vocabulary, hidden_size=text_width, intermediate_size=len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
                    num_hidden_layers=layers[""], num_attention_heads=text_heads, max_position_embeddings=len(tensors["positional_embedding"]),
                    bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1, hidden_act=hidden_act)
        vision = dict(hidden_size=width, intermediate_size=len(tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"]), num_hidden_layers=layers["visual."],
                      num_attention_heads=vision_heads, image_size=side * patch, patch_size=patch, hidden_act=hidden_act)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=tensors["text_projection"].shape[1])
        renamed = _transformers_names(tensors)
    except KeyError as error:
        raise ValueError(f"{path} is no CLIP checkpoint in open_clip's names: it lacks {error}") from None
    return _from_pretrained(None, path, device, dtype, config=config, state_dict=renamed)


def _transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"positional_embedding": "text_model.embeddings.position_embedding.weight", "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "visual.class_embedding": "vision_model.embeddings.class_embedding", "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight", "logit_scale": "logit_scale"}
    prefixes = {"ln_final.": "text_model.final_layer_norm.", "visual.ln_pre.": "vision_model.pre_layrnorm.", "visual.ln_post.": "vision_model.post_layernorm."}
    parts = {"ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.", "attn.out_proj.": "self_attn.out_proj."}
    result = {"text_projection.weight": tensors["text_projection"].T.contiguous(), "visual_projection.weight": tensors["visual.proj"].T.contiguous()}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if block:
            layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
            if block[3].startswith("attn.in_proj_"):
                for which, piece in zip("qkv", tensor.chunk(3)):
                    result[f"{layer}self_attn.{which}_proj.{block[3].removeprefix('attn.in_proj_')}"] = piece.contiguous()
            else:
                part = next((p for p in parts if block[3].startswith(p)), "")
                result[layer + parts.get(part, part) + block[3].removeprefix(part)] = tensor
        elif name in names:
            result[names[name]] = tensor
        elif name not in ("text_projection", "visual.proj"):
            prefix = next((p for p in prefixes if name.startswith(p)), "")
            result[prefixes.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return result


def _from_pretrained(folder: Path | None, named: Path, device: torch.device, dtype: torch.dtype, **options):
    from transformers import CLIPModel

    with quiet_loading():
        model, info = CLIPModel.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if folder is None and info.get("unexpected_keys"):
        raise ValueError(f"{named} has tensors that a CLIP does not: {', '.join(sorted(info['unexpected_keys'])[:3])}")
    check_loaded(named, info)
    return model.requires_grad_(False).eval().to(device)


def load_clip_tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"cannot load the tokenizer in {folder}: {error}") from error


def embed_images(clip, pixels: Tensor) -> Tensor:
    """float32 [B, 3, size, size], preprocessed -> float32 [B, projection] of length 1, on the model's device. Differentiable in the pixels."""
    pooled = clip.vision_model(pixel_values=pixels.to(clip.device, clip.dtype)).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


@torch.no_grad()
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
