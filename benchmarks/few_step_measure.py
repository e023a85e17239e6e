"""What few_step.py measures with: prompts, real pictures, and a network that looks at pictures. Portraits, or any shards with a CLIP model."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Measure:
    """captions: of the prompts.  real, real_codec: features [prompts * copies, D] of real pictures and of the same after the VAE,
    prompt by prompt.  look(images uint8, indices) -> features [M, D], share of what was asked for that is right [M]."""

    captions: list[str]
    real: Tensor
    real_codec: Tensor
    copies: int
    look: object


def portraits_measure(num_prompts: int, codec, copies: int = 4) -> Measure:
    """The embedded drawings: held-out prompts that state all attributes, `copies` drawings of each, and the judge."""
    from proxt2i.data.portraits import draw_portrait, make_portrait
    from proxt2i.embedded import HELD_OUT_SEED
    from proxt2i.embedded.judge import Judge, right_attributes

    judge = Judge()
    _, captions, metadata = zip(*(make_portrait(HELD_OUT_SEED + 10_000 + i, complete=True) for i in range(num_prompts)))
    drawn = [draw_portrait(m["attributes"], random.Random(m["seed"] * copies + j)) for m in metadata for j in range(copies)]
    images = torch.from_numpy(np.stack([np.asarray(d) for d in drawn])).permute(0, 3, 1, 2)

    def look(images: Tensor, indices: list[int]) -> tuple[Tensor, Tensor]:
        predicted, features = judge(images)
        right, stated = right_attributes(predicted, [metadata[i] for i in indices])
        return features, (right & stated).sum(1) / stated.sum(1)

    return Measure(list(captions), judge(images)[1], judge(through_codec(images, codec))[1], copies, look)


def clip_measure(shards: str, clip_folder: str, num_prompts: int, codec, image_size: int) -> Measure:
    """Held-out shards: their captions and pictures, in the image features of a CLIPModel; right: the picture is nearer to its own
    caption than to 15 others (R-precision)."""
    import transformers

    from proxt2i.data.shards import Bad, ShardDataset
    from proxt2i.data.index import index_shards

    model = transformers.CLIPModel.from_pretrained(clip_folder, use_safetensors=True, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    dataset = ShardDataset(index_shards(shards), image_size)
    samples = [s for s in (dataset[i] for i in range(min(len(dataset), 2 * num_prompts))) if not isinstance(s, Bad)][:num_prompts]
    if len(samples) < num_prompts:
        raise ValueError(f"{shards} has {len(samples)} usable samples; prompts={num_prompts} needs as many")
    captions, images = [s["caption"] for s in samples], torch.stack([s["image"] for s in samples])
    size, config = model.config.vision_config.image_size, transformers.CLIPImageProcessor()
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        chunks = []
        for part in images.split(64):
            pixels = torch.nn.functional.interpolate(part.float() / 255, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            chunks.append(model.get_image_features(pixel_values=(pixels - mean) / std))
        return torch.cat([getattr(c, "pooler_output", c) for c in chunks])

    with torch.no_grad():
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings, return_tensors="pt")
        texts = model.get_text_features(**tokens)
        texts = torch.nn.functional.normalize(getattr(texts, "pooler_output", texts), dim=-1)

    def look(images: Tensor, indices: list[int]) -> tuple[Tensor, Tensor]:
        features = embed(images)
        generator = torch.Generator().manual_seed(0)
        others = torch.randint(1, len(captions), (len(indices), 15), generator=generator)
        candidates = torch.cat([torch.zeros(len(indices), 1, dtype=torch.long), others], 1) + torch.tensor(indices)[:, None]
        nearness = (torch.nn.functional.normalize(features, dim=-1)[:, None] * texts[candidates % len(captions)]).sum(-1)
        return features, (nearness.argmax(1) == 0).float()

    return Measure(captions, embed(images), embed(through_codec(images, codec)), 1, look)


def through_codec(images: Tensor, codec) -> Tensor:
    """uint8 [M, 3, H, W] encoded and decoded again."""
    return torch.cat([to_uint8(codec.decode(codec.encode(part.float() / 127.5 - 1))) for part in images.split(128)])


def to_uint8(images: Tensor) -> Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
