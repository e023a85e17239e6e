"""Between images and what the U-ViT sees: a diffusers AutoencoderKL, or pixels themselves, behind one interface."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .files import check_component, check_loaded

MAX_PIXELS = 16 * 512 * 512  # bigger batches go through the VAE in slices


class LatentCodec(nn.Module):
    """A frozen AutoencoderKL with its latents shifted and scaled: latents = (z - shift_factor) * scaling_factor.

    `channels`: latent channels; `factor`: pixels per latent along each side. The factors come from the VAE's config
    (SD3.5: 1.5305 and 0.0609; missing ones are 1 and 0). Weights are float32; `encode_dtype` bfloat16 or float16
    encodes under autocast; decoding is float32 unless a call asks for another dtype.
    """

    def __init__(self, vae: AutoencoderKL, encode_dtype: torch.dtype = torch.float32, max_pixels: int = MAX_PIXELS):
        super().__init__()
        self.vae = vae.float().requires_grad_(False).eval()
        self.channels = vae.config.latent_channels
        self.factor = _factor(vae.config.block_out_channels)
        self.scale = vae.config.scaling_factor or 1.0
        self.shift = vae.config.shift_factor or 0.0
        self.encode_dtype = encode_dtype
        self.max_pixels = max_pixels

    @classmethod
    def from_pretrained(cls, folder: Path | str, device="cpu", dtype: torch.dtype = torch.float32) -> "LatentCodec":
        """Read FOLDER/vae. ValueError names what is missing, corrupt, or of another class."""
        path = Path(folder) / "vae"
        _vae_config(path)
        vae, info = AutoencoderKL.from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False,
                                                  output_loading_info=True)
        check_loaded(path, info)
        return cls(vae, dtype).to(device)

    def save_pretrained(self, folder: Path | str) -> None:
        self.vae.save_pretrained(Path(folder) / "vae")

    def train(self, mode: bool = True) -> "LatentCodec":
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> latents [B, channels, H/factor, W/factor] float32.

        The posterior's mean, or with `sample` a draw from it (noise from `generator`).
        """
        if images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(f"images have shape {tuple(images.shape)}; [B, 3, H, W] with H and W divisible by "
                             f"{self.factor} is needed")
        latents = []
        for part in self._slices(images, images.shape[-2:].numel()):
            with _computed_in(self.encode_dtype, part.device):
                posterior = self.vae.encode(part.float()).latent_dist
            z = posterior.sample(generator) if sample else posterior.mode()
            latents.append((z.float() - self.shift) * self.scale)
        return torch.cat(latents)

    def decode(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """latents [B, channels, h, w] -> images [B, 3, h*factor, w*factor] float32 in [-1, 1] (clamped).

        Differentiable in the latents. dtype: bfloat16 or float16 decodes under autocast.
        """
        if latents.shape[1] != self.channels:
            raise ValueError(f"latents have {latents.shape[1]} channels, the VAE has {self.channels}")
        images = []
        for part in self._slices(latents, latents.shape[-2:].numel() * self.factor**2):
            with _computed_in(dtype, part.device):
                images.append(self.vae.decode(part.float() / self.scale + self.shift).sample.float())
        return torch.cat(images).clamp(-1, 1)

    def _slices(self, batch: Tensor, pixels: int) -> tuple[Tensor, ...]:
        return batch.split(max(1, self.max_pixels // pixels))


class PixelSpace(nn.Module):
    """LatentCodec's interface for models that work on pixels: 3 channels, factor 1, nothing to load or save."""

    channels = 3
    factor = 1

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> the same as float32."""
        if images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; [B, 3, H, W] is needed")
        return images.float()

    def decode(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, 3, H, W] -> float32, clamped to [-1, 1]. dtype: as LatentCodec's, of no consequence here."""
        if latents.shape[1] != 3:
            raise ValueError(f"latents have {latents.shape[1]} channels, pixel space has 3")
        return latents.float().clamp(-1, 1)

    def save_pretrained(self, folder: Path | str) -> None:
        """Nothing to write: a model folder without vae/ means pixel space."""


def load_codec(folder: Path | str, device="cpu", dtype: torch.dtype = torch.float32) -> LatentCodec | PixelSpace:
    """LatentCodec when FOLDER/vae exists, else PixelSpace. `dtype` is the VAE's encoding precision."""
    if (Path(folder) / "vae").is_dir():
        return LatentCodec.from_pretrained(folder, device, dtype)
    return PixelSpace()


def codec_sizes(folder: Path | str) -> tuple[int, int]:
    """`channels` and `factor` of the codec in a folder, without loading weights. Raises ValueError as loading would."""
    if not (Path(folder) / "vae").is_dir():
        return PixelSpace.channels, PixelSpace.factor
    config = _vae_config(Path(folder) / "vae")
    return config.get("latent_channels", 4), _factor(config.get("block_out_channels", (64,)))  # diffusers' defaults


def _vae_config(path: Path) -> dict:
    config = check_component(path)
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(f"{path / 'config.json'} says _class_name {config.get('_class_name')!r}; AutoencoderKL is needed")
    return config


def _computed_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to a 16-bit dtype; float32 switches off an autocast from outside."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half)


def _factor(block_out_channels: list[int]) -> int:
    return 2 ** (len(block_out_channels) - 1)
