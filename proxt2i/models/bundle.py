"""A model folder in the diffusers layout: U-ViT, text encoders, VAE and sampling settings, loaded and saved as one.

    MODEL/model_index.json  uvit/  scheduler/scheduler_config.json
          text_encoder/  tokenizer/  [text_encoder_2/ tokenizer_2/]  [vae/]  README.md  pipeline.py

A folder may hold only uvit/ and scheduler/: text encoder and VAE then are the ones embedded in this package. `load_bundle`,
`ProxT2IPipeline.from_pretrained` and, through pipeline.py, `diffusers.DiffusionPipeline.from_pretrained` read it.
"""

import difflib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..config import OBJECTIVES
from ..diffusion.scheduler import ProximalScheduler
from .files import atomic_folder, check_component, check_safetensors, read_json, require_folder
from .text import ENCODERS, TextEncoder
from .uvit import UViT2DModel
from .vae import LatentCodec, PixelSpace, load_codec

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded" / "assets"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"


@dataclass
class Settings:
    """How the model is meant to be sampled unless told otherwise, kept in scheduler/scheduler_config.json."""

    plan: str = "relaxed"
    num_steps: int = 8
    guidance_scale: float = 1.5
    beta_min: float = 0.1
    beta_max: float = 20.0
    grid: str = "uniform"
    guidance_below: float = 0.35  # guide only steps with the noise of a time up to this one (1: all, 0: the last)
    objective: str = "prox"  # what the network was trained as: prox, or score (it is then asked for proxes through the exact equivalence)
    eta: float = 1.0  # fresh noise of the plan "relaxed"
    extrapolation: float = 1.0  # and its memory; 0: none, as GRPO trains it


@dataclass
class Bundle:
    """Everything that turns prompts into images. `source`: the folder text and codec were read from, if any."""

    uvit: UViT2DModel
    text: TextEncoder
    codec: LatentCodec | PixelSpace
    settings: Settings = field(default_factory=Settings)
    source: Path | None = None
    network: Callable | None = None  # what the sampler calls in the U-ViT's place, such as CudaGraphs(uvit)


def load_bundle(folder: Path | str, device="cpu", dtype: torch.dtype = torch.float32,
                components: Path | str | None = None) -> Bundle:
    """Load a model folder, frozen and in eval mode.

    Args:
        dtype: of the U-ViT and the text encoders; the VAE decodes in float32 always.
        components: folder with text_encoder/, tokenizer/, vae/. Default: `folder` itself, or the embedded components
            when `folder` has none of them.

    Raises ValueError naming the missing, corrupt or contradicting part and the fix.
    """
    folder = require_folder(folder)
    settings = load_settings(folder)
    uvit = load_uvit(folder / "uvit", device, dtype).requires_grad_(False).eval()
    source = Path(components) if components else find_components(folder)
    text, codec = load_components(source, device, dtype)
    check_fit(uvit, text, codec, source)
    return Bundle(uvit, text, codec, settings, source)


def load_components(folder: Path | str, device="cpu", dtype: torch.dtype = torch.float32):
    """(TextEncoder, LatentCodec or PixelSpace) of a folder with text_encoder/, tokenizer/ and perhaps vae/."""
    folder = require_folder(folder)
    return TextEncoder.from_pretrained(folder, device, dtype), load_codec(folder, device, dtype)


def find_components(folder: Path) -> Path:
    """`folder` when it holds (or its model_index.json lists) a text encoder or VAE; else the embedded assets."""
    index = folder / "model_index.json"
    entries = read_json(index) if index.exists() else {}
    listed = [name for name, value in entries.items() if isinstance(value, list) and value[0]]  # diffusers lists absent ones as null
    own = [name for name in ("vae", "text_encoder", "tokenizer") if name in listed or (folder / name).exists()]
    for name in own:
        if name in listed and not (folder / name).is_dir():
            raise ValueError(f"{index} lists {name}, but {folder / name} is missing; copy it from the source")
    return folder if own else EMBEDDED


def check_fit(uvit: UViT2DModel, text: TextEncoder, codec: LatentCodec | PixelSpace,
              source: Path | str = "memory") -> None:
    """ValueError when the U-ViT was not made for these components (`source` names them in the message)."""
    if uvit.config.in_channels != codec.channels:
        kind = "pixel space (no vae folder)" if isinstance(codec, PixelSpace) else "the VAE"
        raise ValueError(f"the U-ViT has {uvit.config.in_channels} channels, {kind} in {source} has {codec.channels}; "
                         "give the components folder that the U-ViT was trained with")
    wants, has = (list(zip(*pair)) for pair in ((uvit.config.text_dims, uvit.config.text_lengths),
                                                (text.dims, text.lengths)))
    if wants != has:
        raise ValueError(f"the U-ViT wants text encoders of (width, tokens) {wants}, those in {source} have {has}; "
                         "give the components folder that the U-ViT was trained with")


def load_uvit(folder: Path | str, device="cpu", dtype: torch.dtype = torch.float32) -> UViT2DModel:
    """The U-ViT in a folder of config.json and diffusion_pytorch_model.safetensors; every weight must match."""
    folder = Path(folder)
    config = check_component(folder)
    if config.get("_class_name") != "UViT2DModel":
        raise ValueError(f"{folder / 'config.json'} says _class_name {config.get('_class_name')!r}; "
                         "UViT2DModel is needed")
    path = folder / WEIGHTS_FILE
    try:
        with torch.device("meta"):  # no time spent on an initialisation that the file replaces
            uvit = UViT2DModel.from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} describes no U-ViT: {error}") from None
    load_weights(uvit, path, assign=True)
    return nn.Module.to(uvit, device=device, dtype=dtype)  # diffusers' own `to` warns about every cast


def load_weights(module: nn.Module, path: Path | str, assign: bool = False) -> None:
    """Strict load_state_dict of one safetensors file; ValueError names the file and the first tensors that differ."""
    check_safetensors(Path(path))
    try:
        module.load_state_dict(load_file(path), assign=assign)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the model: {' '.join(str(error).split())[:400]}") from None


def load_settings(folder: Path) -> Settings:
    """FOLDER/scheduler/scheduler_config.json as Settings; unknown keys and wrong types are errors."""
    path = folder / SCHEDULER_FILE
    known: dict[str, Any] = {f.name: f.type for f in fields(Settings)}
    values = {}
    for key, value in read_json(path).items():
        if key.startswith("_"):  # diffusers' own notes
            continue
        if key not in known and key in inspect.signature(ProximalScheduler.__init__).parameters:
            continue  # of other models' networks, see ProximalScheduler
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{path}: unknown setting {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        kind = known[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{path}: {key} must be a {kind.__name__}, not {value!r}")
        values[key] = value
    settings = Settings(**values)
    if settings.objective not in OBJECTIVES:
        raise ValueError(f"{path}: objective must be one of {', '.join(OBJECTIVES)}, not {settings.objective!r}")
    return settings


def save_bundle(folder: Path | str, bundle: Bundle, with_components: bool = True) -> None:
    """Write a model folder atomically: a temporary sibling is filled, flushed and renamed.

    Text encoder and VAE never change, so their files are copied from `bundle.source` as they are (or written from
    memory when that is None). `with_components=False` leaves them out, for models that use the embedded ones.
    """
    if with_components and bundle.source is None:
        with tempfile.TemporaryDirectory() as source:
            bundle.text.save_pretrained(source)
            bundle.codec.save_pretrained(source)
            save_model(folder, bundle.uvit, bundle.settings, Path(source))
    else:
        save_model(folder, bundle.uvit, bundle.settings, bundle.source if with_components else None)


def save_model(folder: Path | str, uvit: UViT2DModel, settings: Settings, components: Path | None) -> None:
    """save_bundle without loading text encoder and VAE: their folders are copied from `components` (None: left out)."""
    with atomic_folder(folder) as tmp:
        uvit.save_pretrained(tmp / "uvit", safe_serialization=True)
        (tmp / SCHEDULER_FILE).parent.mkdir()
        (tmp / SCHEDULER_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n")
        for path in sorted(components.iterdir()) if components else ():
            if path.is_dir() and path.name.startswith(("vae", "text_encoder", "tokenizer")):
                shutil.copytree(path, tmp / path.name)
        (tmp / "model_index.json").write_text(json.dumps(_model_index(tmp), indent=2) + "\n")
        write_card(tmp, uvit, settings)


def write_card(folder: Path, uvit: UViT2DModel, settings: Settings) -> None:
    """README.md, the model card, and pipeline.py, which leads diffusers to the pipeline's class."""
    config, parameters = uvit.config, sum(p.numel() for p in uvit.parameters())
    (folder / "pipeline.py").write_text(PIPELINE_FILE)
    (folder / "README.md").write_text(CARD.format(
        parameters=f"{parameters / 1e6:.1f}", channels=config.in_channels, size=config.sample_size, depth=2 * (config.depth // 2) + 1,
        dim=config.embed_dim, **asdict(settings)))


PIPELINE_FILE = """\
\"\"\"DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True) finds its class here; needs the package proxt2i.\"\"\"

from proxt2i.pipeline_diffusers import ProxT2IPipeline

__all__ = ["ProxT2IPipeline"]
"""

CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, proximal-diffusion, proxt2i]
---

A text-to-image model with a learned proximal operator: U-ViT of {parameters} M parameters ({depth} blocks of width {dim}), latents
{channels}x{size}x{size}, trained by the package proxt2i (objective `{objective}`).

```python
from proxt2i import ProxT2IPipeline

pipe = ProxT2IPipeline.from_pretrained(FOLDER)
image = pipe("a prompt", seeds=0).images[0]
```

or `python -m proxt2i.sample --model FOLDER "a prompt"`, or with diffusers alone in your code (the package must be installed):
`DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)`.

Defaults: plan `{plan}`, {num_steps} steps, guidance scale {guidance_scale:g} where the noise is that of a time up to {guidance_below:g}.
"""


def _model_index(folder: Path) -> dict:
    """diffusers' table of contents: component -> [library, class]."""
    index = {"_class_name": "ProxT2IPipeline", "uvit": ["proxt2i.models.uvit", "UViT2DModel"],
             "scheduler": ["proxt2i.diffusion.scheduler", "ProximalScheduler"]}
    for path in sorted(folder.glob("text_encoder*")):
        index[path.name] = ["transformers", ENCODERS[read_json(path / "config.json")["model_type"]].__name__]
    for path in sorted(folder.glob("tokenizer*")):
        index[path.name] = ["transformers", read_json(path / "tokenizer_config.json").get("tokenizer_class", "PreTrainedTokenizerFast")]
    if (folder / "vae").is_dir():
        index["vae"] = ["diffusers", "AutoencoderKL"]
    return index
