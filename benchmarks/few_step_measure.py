"""What few_step.py measures with: prompts, real pictures, and a network that looks at pictures. Portraits, or any shards with a CLIP model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from proxt2i.evaluation.portraits import drawings_of, held_out, through_codec


@dataclass
class Measure:
    """captions: of the prompts.  look(images uint8 [M, 3, H, W], indices of their prompts) -> features [M, D], share of what was asked
    for that is right [M].  draw_real() -> `copies` real pictures of each prompt, prompt by prompt, uint8; codec: the VAE."""

    captions: list[str]
    look: Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]
    draw_real: Callable[[], Tensor]
    copies: int
    codec: object

    @cached_property
    def _pictures(self) -> Tensor:
        return self.draw_real()

    def _features(self, images: Tensor) -> Tensor:
        return self.look(images, [i for i in range(len(self.captions)) for _ in range(self.copies)])[0]

    @cached_property
    def real(self) -> Tensor:
        """Features of the real pictures."""
        return self._features(self._pictures)

    @cached_property
    def real_codec(self) -> Tensor:
        """The same after the VAE."""
        return self._features(through_codec(self._pictures, self.codec))


def portraits_measure(num_prompts: int, codec, copies: int = 4) -> Measure:
    """The embedded drawings: held-out prompts that state all attributes, `copies` drawings of each, and the judge."""
    from proxt2i.embedded.judge import Judge, right_attributes

    judge = Judge()
    _, captions, metadata = held_out(num_prompts)

    def look(images: Tensor, indices: list[int]) -> tuple[Tensor, Tensor]:
        predicted, features = judge(images)
        right, stated = right_attributes(predicted, [metadata[i] for i in indices])
        return features, (right & stated).sum(1) / stated.sum(1)

    return Measure(captions, look, lambda: drawings_of(metadata, copies), copies, codec)


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

    return Measure(captions, look, lambda: images, 1, codec)
