"""Tiny models, pictures and prompts on which our rewards and the public packages are compared. Needs neither them nor proxt2i.

Weights are a function of names, shapes and a seed, so both sides have the same without a file.
"""

import gzip
import json
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden.json"
TOKENIZER = ROOT / "proxt2i" / "embedded" / "assets" / "tokenizer" / "tokenizer.json"
SIZES = [(40, 40), (64, 45), (31, 58)]  # height, width: enlarged and shrunk, with odd rests to crop
PROMPTS = [
    "a smiling woman with long red hair", "Portrait of a MAN, against  blue; no hat!", "fish &amp; chips (don't ask)",
    "a lady with golden hair in a bun and spectacles and a wide hat on a pink background " * 4,
]  # fmt: skip
CLIP = dict(vision_layers=2, vision_width=64, patch_size=8, image_size=32, text_layers=2, text_width=64, text_heads=2, vision_heads=1)  # OpenAI's: width / 64 heads
BLIP_VISION = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, intermediate_size=256)
BLIP_TEXT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, max_position_embeddings=64)


def pictures() -> list[torch.Tensor]:
    """One batch per size, uint8 [len(PROMPTS), 3, H, W]: blurred noise."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for height, width in SIZES:
        noise = torch.rand(len(PROMPTS), 3, height // 4, width // 4, generator=generator)
        x = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
        batches.append(((x + 0.1 * torch.rand(x.shape, generator=generator)) / 1.1 * 255).round().to(torch.uint8))
    return batches


def weights(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """Values of ordinary size: norms near 1, biases small, matrices by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        if name == "logit_scale":
            tensors[name] = torch.tensor(3.0)
        elif len(shape) < 2:
            tensors[name] = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise
        else:
            tensors[name] = noise / noise[0].numel() ** 0.5
    return tensors


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def _merges() -> list[str]:
    merges = json.loads(TOKENIZER.read_text())["model"]["merges"]
    return [" ".join(m) if isinstance(m, list) else m for m in merges]


def _bytes() -> list[str]:
    """The characters that stand for bytes, in the order of OpenAI's bytes_to_unicode."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clip_vocabulary() -> list[str]:
    return _bytes() + [c + "</w>" for c in _bytes()] + ["".join(m.split()) for m in _merges()] + ["<|startoftext|>", "<|endoftext|>"]


def write_clip_tokenizer(folder: Path) -> Path:
    """vocab.json and merges.txt, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(clip_vocabulary())}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_merges()]) + "\n")
    return folder


def write_bpe(path: Path) -> Path:
    """The same merges, as OpenAI's and open_clip's SimpleTokenizer read them."""
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.write("\n".join(["#version: 0.2", *_merges()]))  # no line after the last
    return path


def write_bert_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["woman", "man", "lady", "hair", "hat", "with", "portrait", "background", "##ing", "##en", "&", ",", ";", "!", "(", ")", "'"]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *words]) + "\n")
    return folder
