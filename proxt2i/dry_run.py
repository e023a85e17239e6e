"""What a training run would need: `proxt2i/train.py --dry-run [--world-size N]`. No GPU, no data drawn, no weights loaded.

Everything that can be checked beforehand is: the config, the DeepSpeed JSON, the shards and the model components. Sizes come
from the network built on the meta device; what its layers keep for the backward pass is counted by running them on shapes alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from proxt2i.config import Config, DataConfig
from proxt2i.data.buckets import assign, describe
from proxt2i.data.latent_shards import LatentDataset, is_latent_folder
from proxt2i.data.latents import check_latents
from proxt2i.data.shards import index_shards
from proxt2i.models.bundle import EMBEDDED
from proxt2i.models.files import component_digests, require_folder
from proxt2i.models.flops import forward_flops, tokens_per_image, training_flops
from proxt2i.models.text import text_sizes
from proxt2i.models.uvit import UViT2DModel
from proxt2i.models.vae import codec_sizes
from proxt2i.training.engine import _parameter_groups, fill_deepspeed_json
from proxt2i.training.feed import check_sizes, wanted_buckets
from proxt2i.training.loop import uvit_of

H100_TFLOPS = 989.0  # dense bf16, where train.peak_tflops names no other
FP32 = 4  # bytes


def dry_run(config: Config, deepspeed_json: dict, world_size: int, say=print) -> None:
    """Check everything and print the run's needs. Raises ValueError where the run would."""
    train = config.train
    components = require_folder(config.model.components or EMBEDDED)
    (channels, factor), (dims, lengths) = codec_sizes(components), text_sizes(components)
    with torch.device("meta"):
        uvit = uvit_of(config, channels, factor, dims, lengths)
    num_params = sum(p.numel() for p in uvit.parameters())
    filled = fill_deepspeed_json(deepspeed_json, train, config.optim, world_size, num_params, on_gpu=True)
    zero, micro_batch = filled["zero_optimization"], filled["train_micro_batch_size_per_gpu"]
    bf16 = train.precision != "fp32"
    data, buckets, bucket = _data(config.data, components, factor * uvit.config.patch_size)
    shares = np.bincount(bucket, minlength=len(buckets)) / max(len(bucket), 1)
    sizes = [(height // factor, width // factor) for height, width in buckets]
    largest = max((size for size, share in zip(sizes, shares) if share), key=lambda size: size[0] * size[1])
    image_flops = sum(share * training_flops(uvit.config, *size) for share, size in zip(shares, sizes))

    say(f"dry run: {world_size:,} rank(s), ZeRO-{zero['stage']}, {'bf16 autocast' if bf16 else 'fp32'}, {train.batch_size:,} images a step "
        f"= {world_size:,} x {filled['gradient_accumulation_steps']} x {micro_batch}")
    say(f"data: {data}")
    say(f"components: {config.model.components or 'the embedded ones'}: {channels} latent channels, {factor} pixels per latent; text encoders: "
        + ", ".join(f"{length} tokens of width {dim}" for dim, length in zip(dims, lengths)))
    folder = Path(train.run_dir)
    has_checkpoints = any((folder / "checkpoints").glob("step-*"))
    say(f"run folder: {folder}" + (" (holds checkpoints: --resume continues them)" if has_checkpoints else ""))
    say(f"\nU-ViT: {num_params / 1e6:,.2f} M parameters; an image at {largest[0] * factor} x {largest[1] * factor} is "
        f"{tokens_per_image(uvit.config, *largest):,} tokens, {_flops(forward_flops(uvit.config, *largest))} forward, "
        f"{_flops(training_flops(uvit.config, *largest))} a training step (VAE and text encoders not counted)"
        + (f"; the mean of all sizes is {_flops(image_flops)} a step" if len(buckets) > 1 else ""))
    _say_memory(say, memory(uvit, config, zero, world_size, micro_batch, bf16, largest), frozen_bytes(components, bf16))
    muon, adamw = optimizer_sizes(uvit, config.optim)
    say(f"a checkpoint: {FP32 * (2 * num_params + muon + 2 * adamw) / 2**30:,.2f} GiB on disk; "
        f"{train.keep_checkpoints} are kept")
    peak = train.peak_tflops or H100_TFLOPS
    flops = image_flops * train.images
    hours = ", ".join(f"{_duration(flops / (mfu * peak * 1e12 * world_size))} at {mfu:.0%}" for mfu in (0.3, 0.4, 0.5))
    say(f"{train.images:,} images are {_flops(flops)}: {hours} MFU of {world_size:,} x {peak:,.0f} TFLOP/s "
        f"({'train.peak_tflops' if train.peak_tflops else 'H100 in bf16; train.peak_tflops changes it'})")


def optimizer_sizes(uvit: nn.Module, optim) -> tuple[int, int]:
    """(parameters that Muon trains, parameters that AdamW trains)."""
    sizes = {True: 0, False: 0}
    for group in _parameter_groups(uvit, optim):
        sizes["momentum" in group] += sum(p.numel() for p in group["params"])
    return sizes[True], sizes[False]


def state_memory(muon: int, adamw: int, stage: int, world_size: int) -> dict[str, int]:
    """Bytes of one rank for what lasts from step to step. All of it is fp32; "shared" parts are 1/world_size each."""
    total, share = muon + adamw, -(-(muon + adamw) // world_size)
    return {
        "weights": FP32 * (share if stage == 3 else total),
        "the optimizer's copy of the weights, shared": FP32 * share,
        "gradients": FP32 * (share if stage > 1 or world_size == 1 else total + share),  # ZeRO-1: all of them, then its share of the sum
        "optimizer state (Muon 1, AdamW 2 moments), shared": FP32 * -(-(muon + 2 * adamw) // world_size),
        "averaged weights (EMA), shared": FP32 * share,
    }


def memory(uvit: UViT2DModel, config: Config, zero: dict, world_size: int, micro_batch: int, bf16: bool,
           size: tuple[int, int] | None = None) -> dict[str, int]:
    """Bytes of one rank at the fullest moment of a step, by purpose. size: of the latents (default: the native square). The buckets are DeepSpeed's communication buffers."""
    muon, adamw = optimizer_sizes(uvit, config.optim)
    parts = state_memory(muon, adamw, zero["stage"], world_size)
    parts["communication buckets"] = FP32 * int(zero.get("reduce_bucket_size", 5e8)) * (2 if zero.get("overlap_comm") else 1)
    if zero["stage"] == 3:
        parts["weights gathered for use, at most"] = FP32 * min(muon + adamw, int(zero.get("stage3_max_live_parameters", 1e9)))
    activations = activation_bytes(uvit, micro_batch, bf16, size)
    # When the activations are gone, Muon holds its share of the matrices about six times: sent, received, whole, stacked, and products.
    exchanged = 6 * FP32 * -(-muon // world_size)
    if exchanged > activations:
        parts["Muon's exchanged matrices, estimate (more than the activations)"] = exchanged
    else:
        recomputed = ", gradient checkpointing" if uvit.gradient_checkpointing else ""
        parts[f"activations of {micro_batch} images, estimate{recomputed}"] = activations
    return parts


def activation_bytes(uvit: UViT2DModel, batch: int, bf16: bool, size: tuple[int, int] | None = None) -> int:
    """What a forward pass of `batch` images keeps for the backward pass, bf16 copies of the weights included. An estimate:
    counted on shapes, with the attention that this machine's CPU takes (native up to 256 tokens, which keeps less; else torch's) and without
    torch.compile. uvit: on any device, the meta device too."""
    config = uvit.config
    height, width = size or (config.sample_size, config.sample_size)
    with FakeTensorMode():
        weights = {name: torch.empty(p.shape, requires_grad=True) for name, p in uvit.named_parameters()}
        time = torch.zeros(batch)
        y = torch.zeros(batch, config.in_channels, height, width)
        text = [torch.zeros(batch, length, dim) for length, dim in zip(config.text_lengths, config.text_dims)]
        if not uvit.gradient_checkpointing:
            return _saved_bytes(uvit, weights, (y, time, time, text), bf16)
        # Kept: every block's input, and either one block's own while it is computed again or the weights in bf16.
        x = torch.zeros(batch, tokens_per_image(config, height, width), config.embed_dim, requires_grad=True)
        block = uvit.mid_block
        own = {name: weights[f"mid_block.{name}"] for name, _ in block.named_parameters()}
        inputs = (2 * (config.depth // 2) + 1) * x.untyped_storage().nbytes()
        copies = sum(2 * w.numel() for w in weights.values() if w.ndim == 2) if bf16 else 0
        return inputs + max(_saved_bytes(block, own, (x,), bf16), copies)


def _saved_bytes(module: nn.Module, weights: dict, inputs: tuple, bf16: bool) -> int:
    """Bytes of the distinct tensors that autograd saves, without `weights` themselves."""
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # holds on to it, so that no address is used twice
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.func.functional_call(module, weights, inputs)
    known = {w.untyped_storage()._cdata for w in weights.values()}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in known)


def frozen_bytes(components: Path, bf16: bool) -> int:
    """Weights of the VAE (fp32) and the text encoders (bf16, or fp32 without autocast), read from the files' headers."""
    total = 0
    for path in [*components.glob("vae/*.safetensors"), *components.glob("text_encoder*/*.safetensors")]:
        with safe_open(path, "pt") as file:
            numel = sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())
        total += numel * (2 if bf16 and path.parent.name != "vae" else FP32)
    return total


def _say_memory(say, parts: dict[str, int], frozen: int) -> None:
    parts = {**parts, "frozen VAE and text encoders (their working memory not counted)": frozen}
    width = max(map(len, parts))
    say("\nmemory of one rank, GiB")
    for name, size in {**parts, "together": sum(parts.values())}.items():
        say(f"  {name:<{width}}  {size / 2**30:>9.3f}")


def _data(data: DataConfig, components: Path, multiple: int) -> tuple[str, list[tuple[int, int]], np.ndarray]:
    """What there is, the (height, width) in pixels of every bucket, and the bucket of every image."""
    wanted = wanted_buckets(data, multiple)
    square = [(data.image_size, data.image_size)]
    if data.shards != "portraits" and is_latent_folder(data.shards):
        dataset = LatentDataset(data.shards)
        check_latents(dataset, data.image_size, wanted, data.flip, component_digests(components, [encoder["name"] for encoder in dataset.about["text"]]))
        text, buckets, bucket = f"{data.shards}: {dataset.summary()}", dataset.buckets, dataset.bucket
    elif data.shards == "portraits":
        text = f"{data.num_images:,} portraits of {data.image_size} x {data.image_size} pixels, drawn into {data.portraits_dir} on first use"
        buckets = wanted or square
        bucket = assign(np.full((data.num_images, 2), data.image_size), buckets)
    else:
        index = index_shards(data.shards)
        text, buckets = f"{data.shards}: {index.summary()}", wanted or square
        bucket = assign(index.sizes, buckets)
    check_sizes(buckets, multiple)
    return text + (f"; {describe(buckets, bucket)}" if len(buckets) > 1 else ""), buckets, bucket


def _flops(count: float) -> str:
    power = min(max(0, len(str(int(count))) - 1) // 3, 6)
    return f"{count / 1000**power:,.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
