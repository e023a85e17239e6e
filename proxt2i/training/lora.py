"""LoRA (Hu et al., 2021): the network stays frozen, and every linear layer of the blocks gets a trained product of two thin matrices besides, by peft.

With the adapters switched off the network is its own reference: no second copy is kept. The long skips are left as they are (their layer takes two inputs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from proxt2i.models.files import atomic_folder
from proxt2i.models.uvit import UViT2DModel

LAYERS = r".*block.*\.(attn\.(qkv|proj)|mlp\.fc[12])"  # names of the layers that are adapted


@dataclass(frozen=True)
class Lora:
    """The update of a weight [out, in] is alpha / rank * B A, B [out, rank] and A [rank, in]."""

    rank: int
    alpha: float

    def peft(self):
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=LAYERS)


def add_adapters(uvit: UViT2DModel, lora: Lora, seed: int = 0) -> None:
    """In place: B is 0, so that the network's function is unchanged to the bit; A is drawn from `seed`. Only adapters require gradients then."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora.peft(), uvit)


@contextlib.contextmanager
def adapters_off(module: nn.Module):
    """The frozen network alone, inside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:  # peft's enable_adapters would change requires_grad besides, under the engine's hooks
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merge(uvit: UViT2DModel, lora: Lora, adapters: Mapping[str, Tensor]) -> UViT2DModel:
    """The plain network `uvit` with adapters (of the names that `add_adapters` gives them) added to its weights, in place."""
    for name, a in adapters.items():
        if ".lora_A." in name:
            layer, b = uvit.get_submodule(name.split(".lora_A.")[0]), adapters[name.replace(".lora_A.", ".lora_B.")]
            layer.weight += (lora.alpha / lora.rank * (b @ a)).to(layer.weight)
    return uvit


def save_adapter(folder: Path, lora: Lora, adapters: Mapping[str, Tensor]) -> None:
    """As peft's own files, for `PeftModel.from_pretrained(uvit, folder)`."""
    with atomic_folder(folder) as temporary:
        save_file({f"base_model.model.{name.replace('.default.', '.')}": values.contiguous() for name, values in adapters.items()},
                  temporary / "adapter_model.safetensors")
        lora.peft().save_pretrained(temporary)
