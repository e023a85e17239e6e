"""From a checkpoint, whatever stage of ZeRO and number of ranks wrote it, to a model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from proxt2i.models.bundle import WEIGHTS_FILE, Settings, load_uvit, save_model
from proxt2i.models.files import file_digest
from proxt2i.models.uvit import UViT2DModel
from proxt2i.training.checkpoint import read_state
from proxt2i.training.lora import Lora, add_adapters, merge, save_adapter
from proxt2i.training.state import AVERAGE, SavedState


def export(checkpoint: Path, out: Path, weights: str = AVERAGE, dtype: torch.dtype = torch.float32,
           components: Path | None = None, base: Path | None = None, adapter: Path | None = None) -> None:
    """Write the network in `checkpoint` as the model folder `out`, with the text encoder and VAE that it was trained with.

    weights: "ema" (averaged) or "weight" (as trained). components: a folder to copy text encoder and VAE from instead.
    Of a checkpoint of adapters (LoRA) they are added to the model that they were trained on: base, or where that lay when the run wrote it.
    adapter: a folder that gets them alone besides, as peft reads them.
    Raises ValueError for a checkpoint that is not whole, and for another base.
    """
    state = read_state(checkpoint)
    saved = SavedState(checkpoint)
    if state.get("lora"):
        uvit = _with_adapters(state, saved, weights, base, adapter)
    elif base or adapter:
        raise ValueError(f"{checkpoint} holds a whole network, no adapters of LoRA: leave --base and --adapter out")
    else:
        uvit = network_of(state["network"])
        saved.load_weights(uvit, weights)
    settings, source = Settings(**state["settings"]), components or Path(state["components"])
    if not source.is_dir():
        raise ValueError(f"the text encoder and VAE of {checkpoint} lay in {source}, which is not there: say where with --components FOLDER")
    save_model(out, nn.Module.to(uvit, dtype=dtype), settings, source)


def _with_adapters(state: dict, saved: SavedState, weights: str, base: Path | None, adapter: Path | None) -> UViT2DModel:
    folder, lora = (base or Path(state["base"])) / "uvit", Lora(**state["lora"])
    if not (folder / WEIGHTS_FILE).is_file() or file_digest(folder / WEIGHTS_FILE) != state["initial"]:
        raise ValueError(f"{saved.folder} holds adapters of LoRA, but {folder} is not (or no longer) the network that they were trained on: "
                         "say where that model folder is with --base FOLDER")
    with torch.device("meta"):  # for names and shapes alone
        adapted = UViT2DModel.from_config(dict(state["network"]))
        add_adapters(adapted, lora)
    shapes = {name: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    adapters = {name: saved.read(weights, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}
    if adapter:
        save_adapter(adapter, lora, adapters)
    return merge(load_uvit(folder).requires_grad_(False).eval(), lora, adapters)


def network_of(config: dict, weights: dict[str, Tensor] | None = None) -> UViT2DModel:
    """The U-ViT that `config` describes, frozen, with `weights` or room for them, on the CPU."""
    with torch.device("meta"):  # no time spent on an initialisation that is replaced
        uvit = UViT2DModel.from_config(dict(config))
    if weights is None:
        uvit.to_empty(device="cpu")
    else:
        uvit.load_state_dict(weights, assign=True)
    return uvit.requires_grad_(False).eval()
