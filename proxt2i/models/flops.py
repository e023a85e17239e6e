"""What a U-ViT costs: tokens and floating-point operations of one image, from its configuration alone.

Counted are the products (2 operations a multiply-add) of the linear layers, the attention and the final convolution.
Norms, activations and softmax are left out, and so are the frozen parts: the VAE and the text encoders.
"""

from collections.abc import Mapping

# Dense bf16 peak of one GPU (TFLOP/s), as the manufacturer states it without sparsity: (words in the device's name, peak), first match.
PEAK_TFLOPS = (
    (("H100", "PCIe"), 756), (("H100", "NVL"), 835), (("H100",), 989), (("H200", "NVL"), 835), (("H200",), 989), (("GH200",), 989),
    (("B200",), 2250), (("A100",), 312), (("A30",), 165), (("L40S",), 362),
)


def tokens_per_image(config: Mapping, height: int | None = None, width: int | None = None) -> int:
    """Tokens of the sequence, t, lambda and text included, for latents of `height` x `width` (default: the native square).

    config: a U-ViT's constructor arguments (`uvit.config`).
    """
    return 2 + sum(config["text_lengths"]) + _image_tokens(config, height, width)


def forward_flops(config: Mapping, height: int | None = None, width: int | None = None) -> int:
    """Operations of one forward pass of one image. Arguments: see `tokens_per_image`."""
    dim, half_depth = config["embed_dim"], config["depth"] // 2
    hidden, patch_dim = int(dim * config["mlp_ratio"]), config["patch_size"] ** 2 * config["in_channels"]
    image = _image_tokens(config, height, width)
    tokens = tokens_per_image(config, height, width)
    frequencies = min(256, dim // 2)

    def block(queries: int) -> int:  # queries: tokens that ask; all are keys
        return tokens * 3 * dim * dim + 2 * queries * tokens * dim + queries * (dim * dim + 2 * dim * hidden)

    text = sum(length * text_dim * dim for length, text_dim in zip(config["text_lengths"], config["text_dims"]))
    blocks = 2 * half_depth * block(tokens) + block(image) + half_depth * tokens * 2 * dim * dim  # the last block, the long skips
    products = 2 * frequencies * (frequencies + dim) + text + blocks + 2 * image * patch_dim * dim
    if config["final_conv"]:
        products += image * config["patch_size"] ** 2 * 9 * config["in_channels"] ** 2
    return 2 * products


def training_flops(config: Mapping, height: int | None = None, width: int | None = None) -> int:
    """Useful operations of one image's training step: a backward pass costs two forward passes. What gradient checkpointing
    computes again does not count, as is usual for MFU."""
    return 3 * forward_flops(config, height, width)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak (TFLOP/s) of a GPU by torch's name for it, or None where this file knows none."""
    words = device_name.replace("-", " ").split()
    return next((float(peak) for wanted, peak in PEAK_TFLOPS if all(word in words for word in wanted)), None)


def _image_tokens(config: Mapping, height: int | None, width: int | None) -> int:
    height, width = height or config["sample_size"], width or config["sample_size"]
    return height // config["patch_size"] * (width // config["patch_size"])
