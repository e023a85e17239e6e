"""The DeepSpeed engine: its JSON filled in, the optimizer, the learning rate, and the optimizer's state as plain tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from proxt2i.config import OptimConfig, TrainConfig
from proxt2i.training.muon import Muon

AUTO = "auto"
MAX_BUCKET = 50_000_000  # elements


class Autocast(nn.Module):
    """Runs `module` in bf16 autocast, or as it is. Parameters and the result stay fp32."""

    def __init__(self, module: nn.Module, enabled: bool):
        super().__init__()
        self.module, self.enabled = module, enabled

    def forward(self, y, t, lam, text):
        with torch.autocast(y.device.type, torch.bfloat16, enabled=self.enabled):
            return self.module(y, t, lam, text)


def read_deepspeed_json(path: str | Path) -> dict:
    """Read and check a DeepSpeed JSON before any work. Raises ValueError naming the file and the entry."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--deepspeed {path}: no such file")
    try:
        loaded = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--deepspeed {path} is not valid JSON: {error}") from None
    zero = loaded.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise ValueError(f"--deepspeed {path}: zero_optimization.stage must be 1 or 2, got {zero.get('stage')}; "
                         "stage 3 is not supported yet")
    for entry in ("offload_optimizer", "offload_param", "cpu_offload"):
        if zero.get(entry):
            raise ValueError(f"--deepspeed {path}: zero_optimization.{entry} is not supported yet; remove it")
    for entry in ("optimizer", "scheduler"):
        if entry in loaded:
            raise ValueError(f"--deepspeed {path}: remove {entry}; the optim section of the config sets it")
    for entry in ("fp16", "bf16", "torch_autocast"):
        if loaded.get(entry, {}).get("enabled"):
            raise ValueError(f"--deepspeed {path}: remove {entry}; train.precision sets it, and parameters stay fp32")
    return loaded


def fill_deepspeed_json(loaded: dict, train: TrainConfig, optim: OptimConfig, world_size: int, num_params: int,
                        on_gpu: bool) -> dict:
    """Replace "auto" entries by what the config says. Raises ValueError where a number contradicts the config."""
    micro_batch = train.micro_batch or train.batch_size // world_size
    filled = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": train.batch_size // world_size // micro_batch,
        "gradient_clipping": optim.grad_clip,
        "steps_per_print": 2**62,
    }
    for entry, value in filled.items():
        given = loaded.get(entry, AUTO)
        if given != AUTO and given != value and entry != "steps_per_print":
            raise ValueError(f"DeepSpeed JSON: {entry} is {given}, but the config (train.batch_size, train.micro_batch, "
                             f'optim.grad_clip) and {world_size} ranks give {value}; write "auto" in the JSON')
    # Buffers of the size of the model: DeepSpeed allocates a whole bucket, however small the model is.
    bucket = min(num_params, MAX_BUCKET)
    auto_zero = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "overlap_comm": on_gpu}
    zero = {key: auto_zero[key] if value == AUTO else value for key, value in loaded["zero_optimization"].items()}
    return {**loaded, **filled, "zero_optimization": zero}


def initialize(model: nn.Module, deepspeed_json: dict, optim: OptimConfig):
    """Wrap `model` in a DeepSpeed engine with Muon or torch's AdamW; weight decay on matrices only."""
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if Muon not in ZERO_SUPPORTED_OPTIMIZERS:  # it keeps to what ZeRO asks of AdamW: a flat slice, elementwise state
        ZERO_SUPPORTED_OPTIMIZERS.append(Muon)
    optimizer = Muon(_parameter_groups(model, optim), lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_json)
    return engine


def _parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Matrices inside the blocks for Muon (none with optim.name adamw), other matrices, and all that is not decayed."""
    muon, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith("position")
        in_block = is_matrix and parameter.ndim == 2 and "block" in name and optim.name == "muon"
        (muon if in_block else decayed if is_matrix else plain).append(parameter)
    groups = [{"params": muon, "weight_decay": optim.weight_decay, "momentum": optim.momentum, "matrix_shapes": [p.shape for p in muon]},
              {"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(optim: OptimConfig, images_seen: int, total_images: int) -> float:
    """AdamW's: linear warm-up, then cosine or constant, a function of the images seen before the step."""
    if images_seen < optim.warmup_images:
        return optim.lr * (images_seen + 1) / (optim.warmup_images + 1)
    if optim.schedule == "constant":
        return optim.lr
    progress = min(1.0, (images_seen - optim.warmup_images) / max(1, total_images - optim.warmup_images))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(engine, optim: OptimConfig, lr: float) -> None:
    """lr: AdamW's; Muon's follows the same curve to its own peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * optim.muon_lr / optim.lr if "matrix_shapes" in group else lr


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer state. ZeRO-1 and -2 flatten each parameter group into one vector, padded so that the ranks split it evenly;
# rank r's slice is `single_partition_of_fp32_groups[g]` and the optimizer keeps its moments for that slice alone. We store the
# slices as they are. Laid end to end without the padding they are the whole vector, so any number of ranks can load them.


def save_optimizer(engine, folder: Path) -> Path:
    """Write this rank's optimizer state to `folder`; returns the file."""
    tensors = {}
    for group, state in enumerate(_partition_states(engine)):
        for name, value in state.items():
            tensors[f"{group}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    path = folder / f"optimizer-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
    save_file(tensors, path)
    return path


def load_optimizer(engine, folder: Path) -> None:
    """Load what `save_optimizer` of all ranks wrote, on any number of ranks. Raises ValueError if it does not fit."""
    files = sorted(folder.glob("optimizer-*-of-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no optimizer-*.safetensors")
    parts = [safe_open(file, "pt") for file in files]
    zero, rank = engine.optimizer, dist.get_rank()
    num_groups, num_saved = len(zero.bit16_groups), len({key.split(".")[0] for key in parts[0].keys()})
    if num_groups != num_saved:
        raise ValueError(f"{folder}: optimizer state for {num_saved} parameter groups, this run has {num_groups}: "
                         "optim.name must be that of the run which wrote it")
    for group, (partition, parameters) in enumerate(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups)):
        size, total = partition.numel(), sum(p.numel() for p in parameters)
        names = [key.split(".", 1)[1] for key in parts[0].keys() if key.startswith(f"{group}.")]
        state = {}
        for name in names:
            pieces = [part.get_tensor(f"{group}.{name}") for part in parts]
            if pieces[0].ndim == 0:
                state[name] = pieces[0]
                continue
            whole = torch.cat(pieces)
            if whole.numel() < total:
                raise ValueError(f"{folder}: optimizer state for {whole.numel()} values, the model has {total}")
            whole = torch.nn.functional.pad(whole[:total], (0, size * dist.get_world_size() - total))
            state[name] = whole[rank * size:(rank + 1) * size].to(partition.device, copy=True)
        zero.optimizer.state[partition] = state


def _partition_states(engine) -> list[dict]:
    zero = engine.optimizer
    return [zero.optimizer.state[partition] for partition in zero.single_partition_of_fp32_groups]
