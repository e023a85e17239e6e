"""ImageReward (arXiv 2304.05977): BLIP's text encoder attends to the picture, and a linear head reads the first token.

A thin port onto transformers' BLIP modules of the model of the ImageReward package, with its weights and its published mean and std.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .aesthetic import linear_head
from .base import DTYPES, RewardSettings
from .preprocess import clip_pixels, float_clip_pixels
from .weights import Source, find_tokenizer, find_weights, first_of, load_strictly, read_tensors

FILES = ("ImageReward.safetensors", "ImageReward.pt")
SOURCE = Source(needed=(FILES,), downloads=(("THUDM/ImageReward", "ImageReward.pt"), ("google-bert/bert-base-uncased", "vocab.txt")), tokenizer=("vocab.txt",))
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output over the package's reference set
LENGTH = 35  # tokens; longer prompts are cut


class ImageReward(nn.Module):
    """vision: ViT over patches; text: BERT with cross-attention to them; mlp: the head."""

    def __init__(self, vision_config: dict, text_config: dict, tokenizer=None):
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        vision = BlipVisionConfig(**{**dict(hidden_act="gelu", layer_norm_eps=1e-6), **vision_config})
        text = BlipTextConfig(**{**dict(hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True, encoder_hidden_size=vision.hidden_size), **text_config})
        self.vision, self.text, self.tokenizer = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), tokenizer
        self.mlp = linear_head(text.hidden_size)
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(clip_pixels(images, self.vision.config.image_size), prompts).cpu()

    def differentiable(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        return self._score(float_clip_pixels(images, self.vision.config.image_size), prompts)

    def _score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        weight = self.vision.embeddings.patch_embedding.weight
        patches = self.vision(pixel_values=pixels.to(weight.device, weight.dtype)).last_hidden_state
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").to(weight.device)
        hidden = self.text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=patches).last_hidden_state
        return (self.mlp(hidden[:, 0].float()).squeeze(1) - MEAN) / STD


def our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's state_dict in our names. What scoring does not use (other parts of BLIP's pre-training, a buffer) is left out, as there."""
    rules = [(r"blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."), (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
             (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"), (r"blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
             (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
             (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
             (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
             (r"blip\.visual_encoder\.blocks\.(\d+)\.", r"vision.encoder.layers.\1."), (r"blip\.text_encoder\.", "text."), (r"mlp\.layers\.", "mlp.")]
    renamed = {}
    for name, tensor in tensors.items():
        if not re.match(r"blip\.visual_encoder\.|blip\.text_encoder\.|mlp\.", name) or name == "blip.text_encoder.embeddings.position_ids":
            continue
        pattern, replacement = next(((p, r) for p, r in rules if re.match(p, name)), ("", ""))
        renamed[re.sub(f"^{pattern}", replacement, name) if pattern else name] = tensor
    return renamed


def read_model(path: Path, device: torch.device, dtype: torch.dtype, tokenizer, vision_config: dict, text_config: dict) -> ImageReward:
    model = ImageReward(vision_config, text_config, tokenizer)
    load_strictly(model, our_names(read_tensors(path)), path)
    model.vision.to(device, dtype)
    model.text.to(device, dtype)
    model.mlp.to(device)
    return model


def load(settings: RewardSettings, device: torch.device) -> ImageReward:
    from transformers import BertTokenizer

    folder = find_weights(settings, SOURCE)
    tokenizer = BertTokenizer.from_pretrained(find_tokenizer(settings, folder, SOURCE), local_files_only=True)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16)
    text = dict(vocab_size=30524, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=512)
    return read_model(first_of(folder, FILES), device, DTYPES[settings.dtype], tokenizer, vision, text)
