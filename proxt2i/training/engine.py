"""The DeepSpeed engine: its JSON filled in, the optimizer, the learning rate."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from proxt2i.config import OptimConfig, TrainConfig
from proxt2i.training.muon import Exchange, Matrix, Muon, Span
from proxt2i.training.partition import Partition

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


def runs_in_bf16(precision: str, device: torch.device) -> bool:
    """What `train.precision` means on this rank's device: "auto" is bf16 on a GPU and on a CPU that has instructions for its products (AVX512-BF16, AMX)."""
    if precision == "auto" and device.type == "cpu":
        has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return precision != "fp32"


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
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(f"--deepspeed {path}: zero_optimization.stage must be 1, 2 or 3, got {zero.get('stage')}")
    if zero.get("cpu_offload"):
        raise ValueError(f'--deepspeed {path}: cpu_offload is DeepSpeed\'s old name; write "offload_optimizer": {{"device": "cpu"}}')
    for entry in ("offload_optimizer", "offload_param"):
        device = (zero.get(entry) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ValueError(f"--deepspeed {path}: zero_optimization.{entry}.device must be cpu or none, got {device}: "
                             "what lies on an NVMe disk could not be averaged and saved every step")
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
    if train.compile and loaded["zero_optimization"]["stage"] == 3:
        raise ValueError("train.compile needs ZeRO stage 1 or 2: under stage 3 the weights come and go inside the blocks; set train.compile=false")
    # Buffers of the size of the model: DeepSpeed allocates a whole bucket, however small the model is.
    bucket = min(num_params, MAX_BUCKET)
    # Gradients are gathered in one buffer where memory could fragment; on a CPU the copies would cost more than they save. To overlap sums with the
    # backward pass DeepSpeed waits for the device at the end of each: not where there is nobody to sum with.
    auto_zero = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "overlap_comm": on_gpu and world_size > 1, "contiguous_gradients": on_gpu,
                 "stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 10 * MAX_BUCKET}
    zero = {key: auto_zero[key] if value == AUTO else value for key, value in loaded["zero_optimization"].items()}
    # Our optimizer runs wherever the state lies: DeepSpeed's CPU Adam, compiled at the first start, is not needed.
    return {**loaded, **filled, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


def initialize(model: nn.Module, deepspeed_json: dict, optim: OptimConfig):
    """Wrap `model` in a DeepSpeed engine with Muon or torch's AdamW; weight decay on matrices only.

    Returns (engine, partition): what this rank owns of the parameters, which are the model's at the call.
    """
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if Muon not in ZERO_SUPPORTED_OPTIMIZERS:  # it keeps to what ZeRO asks of AdamW: flat tensors, elementwise state
        ZERO_SUPPORTED_OPTIMIZERS.append(Muon)
    optimizer = Muon(_parameter_groups(model, optim), lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_json)
    if deepspeed_json["zero_optimization"]["stage"] < 3:  # (offloaded, DeepSpeed takes the norm in another way)
        engine.optimizer.get_grad_norm_direct = functools.partial(gradient_norm, engine.optimizer)
    partition = Partition(engine)
    optimizer.exchanges = {flat: Exchange(_matrices(partition, number)) for number, flat in enumerate(partition.flat)
                           if "momentum" in optimizer.param_groups[partition.groups[number]]}
    optimizer.device = engine.device
    return engine, partition


def gradient_norm(zero, gradients: list[Tensor], params, norm_type: int = 2) -> Tensor:
    """For DeepSpeed's ZeRO optimizer `zero`, instead of its get_grad_norm_direct, which asks every parameter by itself: the norm of all ranks'
    gradients together, a float32 scalar, or -1 where it is not finite. gradients: this rank's, and padding. Collective."""
    own = [g for g in gradients if not getattr(g, "_zero_padding", False)]
    squares = torch.stack(torch._foreach_norm(own)).square().sum() if own else torch.zeros((), device=zero.device)
    dist.all_reduce(squares, group=zero.dp_process_group)
    return torch.where(squares.isfinite(), squares.sqrt(), -1.0)


def _matrices(partition: Partition, number: int) -> list[Matrix]:
    spans = {name: [] for name in partition.names[number]}
    for rank, pieces in enumerate(partition.pieces):
        for piece in pieces:
            if piece.partition == number:
                spans[piece.name].append(Span(rank, piece.start, piece.stop, piece.offset))
    return [Matrix(partition.shapes[name], its_spans) for name, its_spans in spans.items()]


def _parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Of the trained parameters: matrices inside the blocks for Muon (none with optim.name adamw), other matrices, and all that is not decayed."""
    muon, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim >= 2 and not name.endswith("position")
        in_block = is_matrix and parameter.ndim == 2 and "block" in name and optim.name == "muon"
        (muon if in_block else decayed if is_matrix else plain).append(parameter)
    groups = [{"params": muon, "weight_decay": optim.weight_decay, "momentum": optim.momentum},
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
        group["lr"] = lr * optim.muon_lr / optim.lr if "momentum" in group else lr
