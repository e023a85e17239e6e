"""Trains the tiny VAE of the embedded default: a diffusers AutoencoderKL, 3x64x64 -> 16x8x8.

Loss: mean |x - x̂| + mean |∇x - ∇x̂| (finite differences, for crisp edges) + kl_weight · mean KL per latent element.
The KL term keeps a posterior width that the decoder learns to ignore, so small errors of the sampler stay invisible.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from proxt2i.data.portraits import make_arrays
from proxt2i.embedded import ASSETS, HELD_OUT_SEED, TRAIN_SEED


def build_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, sample_size=64, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def image_batch(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """uint8 [M, 3, H, W] and indices [B] -> float32 [B, 3, H, W] in [-1, 1], channels last."""
    return images[index].float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    d = x - y
    return d.abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


@torch.no_grad()
def psnr(vae, images: torch.Tensor) -> float:
    """Mean over images of 10 log10(1 / mse) in dB, pixels in [0, 1], of the decoded posterior mode."""
    values = []
    for index in torch.arange(len(images)).split(64):
        x = image_batch(images, index)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10(((x - y) / 2).square().mean((1, 2, 3))))
    return torch.cat(values).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "vae")
    parser.add_argument("--num-images", type=int, default=16_000, help="distinct portraits to train on")
    parser.add_argument("--steps", type=int, default=4_500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of a warm-up + cosine schedule (AdamW)")
    parser.add_argument("--kl-weight", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    start = time.time()
    images = torch.from_numpy(make_arrays(TRAIN_SEED, args.num_images)[0])
    held_out = torch.from_numpy(make_arrays(HELD_OUT_SEED, 512)[0])
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    warmup = args.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, i - warmup) / (args.steps - warmup)))
    )
    bar = tqdm(range(args.steps), desc="VAE", mininterval=5)
    for i in bar:
        x = image_batch(images, torch.randint(len(images), (args.batch_size,)))
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(x, y) + args.kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if i % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}", sigma=f"{posterior.std.mean().item():.3f}")
        if i % 500 == 499:
            tqdm.write(f"step {i + 1}: held-out PSNR {psnr(vae, held_out[:128]):.2f} dB after {time.time() - start:.0f} s")
            vae.save_pretrained(args.out.with_name(args.out.name + ".partial"))

    # latents are normalised by one shift and one scale, as Stable Diffusion 3.5 does
    with torch.no_grad():
        latents = torch.cat([vae.encode(image_batch(images, index)).latent_dist.mode() for index in torch.arange(2048).split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5), shift_factor=round(latents.mean().item(), 5))
    vae.half().save_pretrained(args.out)
    vae.float()
    recipe = vars(args) | {
        "out": None, "parameters": sum(p.numel() for p in vae.parameters()), "held_out_psnr_db": round(psnr(vae, held_out), 2),
        "channel_std": [round(v, 3) for v in (latents.std((0, 2, 3)) * vae.config.scaling_factor).tolist()], "seconds": round(time.time() - start),
    }  # fmt: skip
    (args.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe))


if __name__ == "__main__":
    main()
