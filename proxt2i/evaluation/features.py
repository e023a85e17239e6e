"""Features of pictures, and the reference set that a Fréchet distance compares with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from proxt2i.data.index import ShardIndex, index_shards
from proxt2i.data.shards import Bad, ShardDataset, Unusable, decode_image
from proxt2i.data.writing import IMAGE_EXTENSIONS, tars_in
from proxt2i.images import to_pil
from proxt2i.models.files import check_component, check_loaded, file_digest, files_digest, read_json
from proxt2i.rewards.preprocess import normalise
from proxt2i.rewards.weights import load_strictly, quiet_loading, read_tensors

INCEPTION = ("pt_inception-2015-12-05-6726825d.safetensors", "pt_inception-2015-12-05-6726825d.pth")
Extractor = Callable[[Tensor], Tensor]  # uint8 [B, 3, H, W] on the CPU -> float32 [B, D] on the CPU


# -- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """path: a folder of a transformers vision model, the file of FID's Inception, or None: the judge of portraits."""

    name: str  # "FD of" it is what tables say
    sha256: str
    path: Path | None

    def load(self, device: torch.device) -> Extractor:
        """ValueError for weights that are damaged or do not fit."""
        with quiet_loading():
            if self.path is None:
                return _judge(device)
            return _transformers(self.path, device) if self.path.is_dir() else _inception(self.path, device)


def features_of(path: Path | None) -> Features:
    """The features that --fd-model names, looked at but not loaded. ValueError names what is missing."""
    if path is None:
        from proxt2i.embedded import ASSETS

        return Features("portraits", files_digest([ASSETS / "judge"]), None)
    if path.is_dir() and (file := next((path / name for name in INCEPTION if (path / name).is_file()), None)):
        path = file
    if path.is_file():
        return Features("inception", file_digest(path), path)
    if not path.exists():
        raise ValueError(f"--fd-model {path}: no such folder or file; give the folder of a vision model of transformers (facebook/dinov2-large, downloaded), "
                         f"or FID's Inception, {INCEPTION[1]} of github.com/mseitzer/pytorch-fid")
    if not (path / "config.json").is_file():
        raise ValueError(f"--fd-model {path}: holds no config.json of a transformers model, and no {INCEPTION[1]}")
    return Features(str(check_component(path).get("model_type")), files_digest([path]), path)


def _judge(device: torch.device) -> Extractor:
    from proxt2i.embedded.judge import Judge
    from proxt2i.rewards.preprocess import pillow_resize

    judge = Judge(device=device)
    return lambda images: judge(pillow_resize(images, 64))[1]


def _transformers(folder: Path, device: torch.device) -> Extractor:
    """The whole picture, resized to the network's own square (Pillow, bicubic), as FD-DINOv2 is defined (arXiv 2306.04675); the pooled output, or
    where there is none that of the first token."""
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True)
    check_loaded(folder, info)
    vision = getattr(model, "vision_model", model)  # of a CLIP and its like
    config = getattr(model.config, "vision_config", model.config)
    if model.main_input_name != "pixel_values" and vision is model:
        raise ValueError(f"--fd-model {folder} is a {model.config.model_type} model, which takes no pictures; give a vision model, DINOv2 say")
    size, mean, std = _preprocessing(folder, config)
    vision = vision.requires_grad_(False).eval().to(device)

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        pixels = [np.asarray(to_pil(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images]
        pixels = normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), mean, std)
        output = vision(pixel_values=pixels.to(device))
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1).float().cpu()

    return extract


def _preprocessing(folder: Path, config) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side of the input (pixels), mean and std, of preprocessor_config.json."""
    if not (folder / "preprocessor_config.json").is_file():
        raise ValueError(f"--fd-model {folder} lacks preprocessor_config.json, which says what pictures the network wants; copy it from where the weights came from")
    about = read_json(folder / "preprocessor_config.json")
    size = about.get("crop_size") or about.get("size") or getattr(config, "image_size", None)
    sides = list(size.values()) if isinstance(size, dict) else [size]
    mean, std = about.get("image_mean"), about.get("image_std")
    if len(set(sides)) != 1 or not isinstance(sides[0], int) or not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise ValueError(f"{folder / 'preprocessor_config.json'} gives no square size, or no image_mean and image_std of 3 values")
    return sides[0], tuple(mean), tuple(std)


def _inception(file: Path, device: torch.device) -> Extractor:
    from proxt2i.evaluation.inception import FidInception

    with torch.device("meta"):
        network = FidInception()
    tensors = read_tensors(file)
    for name in network.state_dict().keys() - tensors.keys():  # an older torch did not keep these counters
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(0)
    network = network.to_empty(device="cpu")
    load_strictly(network, tensors, file)
    network = network.requires_grad_(False).eval().to(device)

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        return network(images.to(device).float() / 255).float().cpu()

    return extract


# -- the reference ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Pictures that those drawn are compared with, each cut and scaled to `size` (height, width).

    source: paths of pictures, an index of tar shards, or a number of held-out portraits.
    """

    name: str
    size: tuple[int, int]
    sha256: str  # of names and sizes (files), or of names and contents (shards), and of `size`
    source: list[Path] | ShardIndex | int = field(repr=False)

    def __len__(self) -> int:
        return self.source if isinstance(self.source, int) else len(self.source)

    @cached_property
    def _shards(self) -> ShardDataset:
        return ShardDataset(self.source, min(self.size), buckets=[self.size])

    def read(self, start: int, stop: int) -> tuple[Tensor, list[Bad]]:
        """Pictures start ... stop - 1 that can be read, uint8 [up to stop - start, 3, H, W], and why the others cannot."""
        found = [self._read(i) for i in range(start, min(stop, len(self)))]
        good = [image for image in found if not isinstance(image, Bad)]
        return torch.stack(good) if good else torch.empty(0, 3, *self.size, dtype=torch.uint8), [bad for bad in found if isinstance(bad, Bad)]

    def _read(self, i: int) -> Tensor | Bad:
        if isinstance(self.source, int):
            from proxt2i.data.portraits import make_portrait
            from proxt2i.embedded import HELD_OUT_SEED

            drawing = make_portrait(HELD_OUT_SEED + 10_000 + i, complete=True)[0]  # as portraits.held_out
            image = np.asarray(ImageOps.fit(Image.fromarray(np.asarray(drawing)), self.size[::-1], Image.Resampling.LANCZOS) if self.size != (64, 64) else drawing)
        elif isinstance(self.source, ShardIndex):
            sample = self._shards[i]
            return sample if isinstance(sample, Bad) else sample["image"]
        else:
            try:
                image = decode_image(self.source[i].read_bytes(), self.size)
            except (Unusable, OSError) as error:
                return Bad(str(error), str(self.source[i].parent), self.source[i].name)
        return torch.from_numpy(image.copy()).permute(2, 0, 1)


def reference_of(path: Path | None, size: tuple[int, int], portraits: int) -> Reference:
    """The reference that --reference names: a folder of pictures (searched in depth) or of tar shards, or one shard. path None: `portraits`
    held-out drawings. ValueError when it holds fewer than 2 pictures."""
    if path is None:
        return Reference("held-out drawings", size, _digest(["portraits", portraits, size]), portraits)
    if not path.exists():
        raise ValueError(f"--reference {path}: no such folder; give a folder of pictures, or of tar shards")
    if path.is_file() or tars_in(path):
        index = index_shards(path)
        reference = Reference(path.name, size, _digest([index.digest, size]), index)
    else:
        files = sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names if name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS and name[0] != ".")
        reference = Reference(path.name, size, _digest([[[str(f.relative_to(path)), f.stat().st_size] for f in files], size]), files)
    if len(reference) < 2:
        raise ValueError(f"--reference {path}: holds {len(reference)} pictures ({', '.join(IMAGE_EXTENSIONS)}, or tar shards of them); at least 2 are needed")
    return reference


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
