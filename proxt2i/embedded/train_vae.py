"""Makes the tiny VAE of the embedded default: a diffusers AutoencoderKL, 3x64x64 -> 16x8x8.

The encoder is not trained. Its weights are written down so that it computes, exactly, the 16 leading principal
components of every 8x8 patch: three strided convolutions gather 2x2 blocks (each a PCA of what the last one gave), the
residual branches are zero, and the last norm and SiLU are undone (see `write_pca_encoder`). Such latents are local,
decorrelated and cost no training. The decoder is trained, on L1 + L1 of finite differences (crisp edges), with a little
noise on the latents, so that small errors of a sampler stay invisible.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from proxt2i.data.portraits import make_arrays
from proxt2i.embedded import ASSETS, HELD_OUT_SEED, TRAIN_SEED

CHANNELS = 16
NOISE_STD = 0.06  # of the posterior; the latents have unit variance
CARRIER = 100.0  # see write_pca_encoder


def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=CHANNELS, sample_size=64, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(16, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def image_batch(images: Tensor, index: Tensor) -> Tensor:
    """uint8 [M, 3, H, W] and indices [B] -> float32 [B, 3, H, W] in [-1, 1], channels last."""
    return images[index].float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- encoder
def gather(x: Tensor) -> Tensor:
    """[M, C, H, W] -> [M, 4C, H/2, W/2]: the 2x2 blocks, channel index (row, column, C)."""
    return torch.cat([x[:, :, r::2, c::2] for r in (0, 1) for c in (0, 1)], 1)


def principal_components(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], directions [count, C] and standard deviations [count] of the C channels of x [M, C, H, W]."""
    flat = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    return flat.mean(0).float(), vectors.T.flip(0)[:count].float(), values.flip(0)[:count].sqrt().float()


def as_stride_two(weight: Tensor, in_channels: int, out_channels: int) -> Tensor:
    """A matrix [K, 4C] on `gather`ed channels as the 3x3 stride-2 kernel [out, in, 3, 3] of a Downsample2D."""
    kernel = torch.zeros(out_channels, in_channels, 3, 3)
    kernel[: len(weight), : weight.shape[1] // 4, :2, :2] = weight.reshape(len(weight), 2, 2, -1).permute(0, 3, 1, 2)
    return kernel


@torch.no_grad()
def write_pca_encoder(vae, images: Tensor) -> None:
    """Sets the encoder's weights from the principal components of `images`, float32 [M, 3, H, W] in [-1, 1].

    Latent i is the i-th component divided by the square root of its standard deviation, all scaled to unit mean square:
    halfway between raw components, whose last ones would drown in the sampler's noise, and whitened ones, where every
    component would weigh the same. The encoder ends in GroupNorm, SiLU and a convolution; both are undone: each group
    holds components z, their negatives and a large constant ±c, so that its mean is 0 and its variance c²/2 up to
    O(1/c²), and SiLU(z) - SiLU(-z) = z.
    """
    encoder = vae.encoder
    for parameter in encoder.parameters():
        parameter.zero_()
    first, second, third, last = encoder.down_blocks
    encoder.conv_in.weight[torch.arange(3), torch.arange(3), 1, 1] = 1.0
    for block in (second, third):  # widening blocks: keep the channels that are there
        shortcut = block.resnets[0].conv_shortcut.weight
        width = shortcut.shape[1]
        shortcut[torch.arange(width), torch.arange(width), 0, 0] = 1.0

    # 2x2: all 12 values; 4x4: 32 of 48; 8x8: 16 of 128
    first.downsamplers[0].conv.weight.copy_(as_stride_two(torch.eye(12), 16, 16))
    level1 = gather(images)
    level2 = gather(level1)
    mean, directions, _ = principal_components(level2, 32)
    second.downsamplers[0].conv.weight.copy_(as_stride_two(directions, 32, 32))
    second.downsamplers[0].conv.bias.copy_(-directions @ mean)
    level3 = gather(torch.einsum("kc,mchw->mkhw", directions, level2 - mean[:, None, None]))
    mean, directions, std = principal_components(level3, CHANNELS)
    directions = directions / std.sqrt()[:, None] / std.mean().sqrt()  # unit mean square over the channels

    # the 64 channels of the last levels: four groups of [4 z, 4 -z, 4 c, 4 -c]
    z = torch.arange(CHANNELS)
    plus, minus = 16 * (z // 4) + z % 4, 16 * (z // 4) + 4 + z % 4
    weight, bias = torch.zeros(64, 128), torch.zeros(64)
    weight[plus], weight[minus] = directions, -directions
    bias[plus], bias[minus] = -directions @ mean, directions @ mean
    bias.view(4, 4, 4)[:, 2], bias.view(4, 4, 4)[:, 3] = CARRIER, -CARRIER
    third.downsamplers[0].conv.weight.copy_(as_stride_two(weight, 64, 64))
    third.downsamplers[0].conv.bias.copy_(bias)
    encoder.conv_norm_out.weight[torch.cat([plus, minus])] = math.sqrt((CARRIER**2 + 1) / 2)
    encoder.conv_out.weight[z, plus, 1, 1] = 1.0
    encoder.conv_out.weight[z, minus, 1, 1] = -1.0
    encoder.conv_out.bias[CHANNELS:] = 2 * math.log(NOISE_STD)


# ---------------------------------------------------------------------------------------------- decoder
def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    d = x - y
    return d.abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


@torch.no_grad()
def psnr(vae, images: Tensor) -> float:
    """Mean over images of 10 log10(1 / mse) in dB, pixels in [0, 1], of the decoded posterior mode."""
    values = []
    for index in torch.arange(len(images)).split(64):
        x = image_batch(images, index)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def train_decoder(vae, images: Tensor, held_out: Tensor, args: argparse.Namespace) -> None:
    with torch.no_grad():
        latents = torch.cat([vae.encode(image_batch(images, index)).latent_dist.mode() for index in torch.arange(len(images)).split(64)])
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    warmup = max(1, args.steps // 40)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warmup) / max(1, args.steps - warmup)))
    )
    bar = tqdm(range(args.steps), desc="decoder", mininterval=5)
    for i in bar:
        index = torch.randint(len(images), (args.batch_size,))
        z = latents[index]
        loss = reconstruction_loss(image_batch(images, index), vae.decode(z + NOISE_STD * torch.randn_like(z)).sample)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if i % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if i % 500 == 499:
            tqdm.write(f"step {i + 1}: held-out PSNR {psnr(vae, held_out[:128]):.2f} dB")
            vae.save_pretrained(args.out.with_name(args.out.name + ".partial"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "vae")
    parser.add_argument("--num-images", type=int, default=16_000, help="distinct portraits to train on")
    parser.add_argument("--steps", type=int, default=3_000, help="batches of the decoder's training")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of a warm-up + cosine schedule (AdamW)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    start = time.time()
    images = torch.from_numpy(make_arrays(TRAIN_SEED, args.num_images)[0])
    held_out = torch.from_numpy(make_arrays(HELD_OUT_SEED, 512)[0])
    vae = build_vae()
    write_pca_encoder(vae, image_batch(images, torch.arange(min(4_000, len(images)))))
    vae.half().float()  # train the decoder for the latents that the shipped, half-precision encoder makes
    vae.to(memory_format=torch.channels_last)
    train_decoder(vae, images, held_out, args)
    vae.half().save_pretrained(args.out)
    vae.float()
    recipe = {k: v for k, v in vars(args).items() if k != "out"} | {
        "parameters": sum(p.numel() for p in vae.parameters()), "held_out_psnr_db": round(psnr(vae, held_out), 2), "seconds": round(time.time() - start),
    }  # fmt: skip
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe))


if __name__ == "__main__":
    main()
