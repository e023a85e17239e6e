"""From a checkpoint, whatever stage of ZeRO and number of ranks wrote it, to a model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from proxt2i.models.bundle import Settings, save_model
from proxt2i.models.uvit import UViT2DModel
from proxt2i.training.checkpoint import read_state
from proxt2i.training.state import AVERAGE, SavedState


def export(checkpoint: Path, out: Path, weights: str = AVERAGE, dtype: torch.dtype = torch.float32,
           components: Path | None = None) -> None:
    """Write the network in `checkpoint` as the model folder `out`, with the text encoder and VAE that it was trained with.

    weights: "ema" (averaged) or "weight" (as trained). components: a folder to copy text encoder and VAE from instead.
    Raises ValueError for a checkpoint that is not whole.
    """
    state = read_state(checkpoint)
    saved = SavedState(checkpoint)
    uvit = network_of(state["network"])
    saved.load_weights(uvit, weights)
    settings, source = Settings(**state["settings"]), components or Path(state["components"])
    if not source.is_dir():
        raise ValueError(f"the text encoder and VAE of {checkpoint} lay in {source}, which is not there: say where with --components FOLDER")
    save_model(out, nn.Module.to(uvit, dtype=dtype), settings, source)


def network_of(config: dict, weights: dict[str, Tensor] | None = None) -> UViT2DModel:
    """The U-ViT that `config` describes, frozen, with `weights` or room for them, on the CPU."""
    with torch.device("meta"):  # no time spent on an initialisation that is replaced
        uvit = UViT2DModel.from_config(dict(config))
    if weights is None:
        uvit.to_empty(device="cpu")
    else:
        uvit.load_state_dict(weights, assign=True)
    return uvit.requires_grad_(False).eval()
