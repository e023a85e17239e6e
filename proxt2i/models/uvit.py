"""U-ViT backbone: one transformer over [t, lambda, text..., image] tokens with long skip connections.

The architecture is U-ViT's (Bao et al., CVPR 2023, `uvit_t2i`): pre-norm LayerNorm blocks, no qkv bias, learned
positions over the whole sequence, `depth // 2` blocks, one middle block, `depth // 2` blocks that each receive the
output of their mirror image through a linear layer. Ours: the lambda token, the input scaling 1/sqrt(1 + lambda), the
preconditioned output, and one LayerNorm + Linear per text encoder. Weights keep the diffusers layout (config.json + safetensors).
"""

import difflib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..diffusion.precondition import precondition
from ..diffusion.schedule import VPSchedule
from ..ops import attention, gelu, linear

LAMBDA_FLOOR = 1e-4  # lambda below it (the score baseline passes 0) reads as this value; plans stay far above

# U-ViT's sizes. Depth counts as in U-ViT: 2 * (depth // 2) + 1 blocks, so H (28) has 14 + 1 + 14.
_LATENT_256 = dict(sample_size=32, in_channels=16, patch_size=2, text_dims=[1024, 4096], text_lengths=[77, 128])
PRESETS: dict[str, dict] = {
    "portraits": dict(sample_size=8, in_channels=16, patch_size=2, embed_dim=128, depth=7, num_heads=4,
                      text_dims=[96], text_lengths=[24], qk_norm=True),
    "S": dict(_LATENT_256, embed_dim=512, depth=12, num_heads=8),
    "B": dict(_LATENT_256, embed_dim=768, depth=16, num_heads=12),
    "L": dict(_LATENT_256, embed_dim=1024, depth=20, num_heads=16),
    "H": dict(_LATENT_256, embed_dim=1152, depth=28, num_heads=16),
}


def sinusoid(values: Tensor, dim: int, max_period: float = 1e4) -> Tensor:
    """values [B] -> [B, dim] float32: cosines and sines at dim / 2 frequencies from 1 to 1 / max_period."""
    half = dim // 2
    freqs = torch.exp(torch.arange(half, device=values.device, dtype=torch.float32) * (-math.log(max_period) / half))
    args = values.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class Linear(nn.Linear):
    """nn.Linear by the products of ops.linear."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ScalarEmbedding(nn.Module):
    """One token out of a scalar: sinusoid, then a two-layer MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.frequency_dim = min(256, dim // 2)
        self.fc1 = Linear(self.frequency_dim, self.frequency_dim)
        self.fc2 = Linear(self.frequency_dim, dim)

    def forward(self, values: Tensor) -> Tensor:  # [B] -> [B, 1, dim]
        features = sinusoid(values, self.frequency_dim).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(features))).unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [B, num_queries, D]: only the last `num_queries` tokens ask."""
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))
        norms = {} if self.q_norm is None else dict(q_weight=self.q_norm.weight, k_weight=self.k_norm.weight, norm_eps=self.q_norm.eps)  # type: ignore[union-attr]
        return self.proj(attention(qkv, num_queries=num_queries, **norms).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class LongSkip(nn.Linear):
    """Linear(2D -> D) of the concatenation [x, skip], which is not made."""

    def __init__(self, dim: int):
        super().__init__(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, skip)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, skip: bool):
        super().__init__()
        self.skip = LongSkip(dim) if skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, skip: Tensor | None = None, num_queries: int | None = None) -> Tensor:
        """x, skip [B, L, D] -> [B, L, D], or only its last `num_queries` tokens."""
        if skip is not None:
            x = self.skip(x, skip)  # type: ignore[misc]
        update = self.attn(self.norm1(x), num_queries)
        x = (x if num_queries is None else x[:, -num_queries:]) + update
        return x + self.mlp(self.norm2(x))


class TextProjection(nn.Sequential):
    """LayerNorm + Linear from a text encoder's width to the model's."""

    def __init__(self, text_dim: int, dim: int):
        super().__init__(nn.LayerNorm(text_dim), Linear(text_dim, dim))


class UViT2DModel(ModelMixin, ConfigMixin):
    """eps_theta(y, t, lambda, text), the network behind the proximal operator prox(y) = y - sqrt(lambda) eps.

    Args:
        sample_size: native height and width of y, divisible by `patch_size`. Other sizes work too: the learned image
            positions are interpolated to their grid.
        in_channels: channels of y (16 for SD3.5-like latents, 3 for pixels).
        embed_dim, depth, num_heads: width D, U-ViT's depth (2 * (depth // 2) + 1 blocks), attention heads.
        mlp_ratio: hidden width of each block's MLP over D.
        text_dims, text_lengths: width and fixed number of tokens of each text encoder.
        qk_norm: RMSNorm of every head's queries and keys.
        final_conv: a 3x3 convolution after unpatching (U-ViT's `conv`; off in its large models).
        gradient_checkpointing: recompute each block in the backward pass.
        betas: beta_min and beta_max of the diffusion it is for; the blocks then predict only what y does not tell by
            itself (see diffusion.precondition). None: they predict eps.

    Raises ValueError where the sizes contradict each other, naming the argument.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]  # compile_repeated_blocks(fullgraph=True) compiles each by itself; equal blocks share their code

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int = 16, patch_size: int = 2, embed_dim: int = 1152,
                 depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, text_dims: Sequence[int] = (),
                 text_lengths: Sequence[int] = (), qk_norm: bool = False, final_conv: bool = False,
                 gradient_checkpointing: bool = False, betas: list[float] | None = None):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not divisible by patch_size {patch_size}")
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"embed_dim {embed_dim} must be divisible by num_heads {num_heads} and by 4")
        if len(text_dims) != len(text_lengths):
            raise ValueError(f"text_dims {list(text_dims)} and text_lengths {list(text_lengths)} differ in number")
        self.gradient_checkpointing = gradient_checkpointing
        self.schedule = None if betas is None else VPSchedule(*betas)
        self.num_condition_tokens = 2 + sum(text_lengths)
        patch_dim = patch_size**2 * in_channels

        def blocks(skip: bool) -> nn.ModuleList:
            return nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, qk_norm, skip) for _ in range(depth // 2))

        self.patch_embed = Linear(patch_dim, embed_dim)
        self.t_embed = ScalarEmbedding(embed_dim)
        self.lam_embed = ScalarEmbedding(embed_dim)
        self.text_embed = nn.ModuleList(TextProjection(d, embed_dim) for d in text_dims)
        num_image_tokens = (sample_size // patch_size) ** 2
        self.position = nn.Parameter(torch.zeros(1, self.num_condition_tokens + num_image_tokens, embed_dim))
        self.in_blocks = blocks(skip=False)
        self.mid_block = Block(embed_dim, num_heads, mlp_ratio, qk_norm, skip=False)
        self.out_blocks = blocks(skip=True)
        self.norm = nn.LayerNorm(embed_dim)
        self.out = Linear(embed_dim, patch_dim)
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if final_conv else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U-ViT's initialisation: trunc_normal(std 0.02) for linear weights and positions, zero biases."""
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # U-ViT embeds patches with a convolution and leaves it torch's default initialisation.
        self.patch_embed.reset_parameters()

    def forward(self, y: Tensor, t: Tensor, lam: Tensor, text: list[Tensor]) -> Tensor:
        """Predict the noise n of y = x_t + sqrt(lam) n.

        Args:
            y: [B, C, H, W], H and W divisible by `patch_size`, not yet scaled. t: [B], time in [0, 1]. lam: [B], step
                lambda >= 0.
            text: one [B, L_i, D_i] per text encoder, zero past the caption's end.

        Returns: eps [B, C, H, W] in y's dtype. The score baseline calls with lam = 0 and gets all of the noise in y.
        """
        self._check_inputs(y, text)
        dtype = self.position.dtype
        # Var(y) = 1 + lam for unit-variance data (recommended), so the network sees unit variance.
        scaled = y * torch.rsqrt(1 + lam).to(y.dtype)[:, None, None, None]
        tokens = [
            self.t_embed(1000 * t),
            self.lam_embed(100 * lam.clamp(min=LAMBDA_FLOOR).log()),
            *(project(c.to(dtype)) for project, c in zip(self.text_embed, text)),
            self.patch_embed(self._patchify(scaled).to(dtype)),
        ]
        grid = y.shape[2] // self.config.patch_size, y.shape[3] // self.config.patch_size
        x = torch.cat(tokens, dim=1) + resize_position_embedding(self.position, self.num_condition_tokens, grid)
        x = self._run_blocks(x)
        eps = self._unpatchify(self.out(self.norm(x)), grid)
        if self.conv is not None:
            eps = self.conv(eps)
        if self.schedule is not None:
            c_skip, c_out = (c[:, None, None, None] for c in precondition(t.float(), lam.float(), self.schedule))
            eps = c_skip * y + c_out * eps.float()
        return eps.to(y.dtype)

    def _run_blocks(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, image tokens, D]."""
        num_image_tokens = x.shape[1] - self.num_condition_tokens
        skips = []
        for block in self.in_blocks:
            x = self._call(block, x)
            skips.append(x)
        # Only image tokens are read out, so the last block computes no others.
        x = self._call(self.mid_block, x, None, None if self.out_blocks else num_image_tokens)
        if self.out_blocks and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as the first long skip does anyway: all out_blocks see one dtype, and share their compiled code
        for i, block in enumerate(self.out_blocks):
            last = i == len(self.out_blocks) - 1
            x = self._call(block, x, skips.pop(), num_image_tokens if last else None)
        return x

    def _call(self, block: Block, *args) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _patchify(self, y: Tensor) -> Tensor:  # [B, C, H, W] -> [B, tokens, p p C]
        p = self.config.patch_size
        b, c, h, w = y.shape
        return y.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, tokens, p p C] -> [B, C, H, W]
        p, c, (rows, columns) = self.config.patch_size, self.config.in_channels, grid
        return x.reshape(-1, rows, columns, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(-1, c, rows * p, columns * p)

    def _check_inputs(self, y: Tensor, text: list[Tensor]) -> None:
        cfg = self.config
        if y.ndim != 4 or y.shape[1] != cfg.in_channels or any(n == 0 or n % cfg.patch_size for n in y.shape[2:]):
            raise ValueError(f"y has shape {tuple(y.shape)}; this U-ViT takes [B, {cfg.in_channels}, H, W], H and W "
                             f"divisible by patch_size {cfg.patch_size} ({cfg.sample_size} x {cfg.sample_size} is its own size)")
        shapes = [tuple(c.shape[1:]) for c in text]
        expected = list(zip(cfg.text_lengths, cfg.text_dims))
        if shapes != expected:
            raise ValueError(f"text has (length, width) {shapes}; this U-ViT takes {expected}")

    @torch.no_grad()
    def resize_(self, sample_size: int) -> "UViT2DModel":
        """Adapt to another sample size in place (256 -> 512 pixel stage): the image positions are interpolated."""
        if sample_size % self.config.patch_size:
            raise ValueError(f"sample_size {sample_size} is not divisible by patch_size {self.config.patch_size}")
        grid = sample_size // self.config.patch_size
        self.position = nn.Parameter(resize_position_embedding(self.position, self.num_condition_tokens, (grid, grid)))
        self.register_to_config(sample_size=sample_size)
        return self


def resize_position_embedding(position: Tensor, num_condition_tokens: int, grid: tuple[int, int]) -> Tensor:
    """[1, num_condition_tokens + g*g, D] -> [1, num_condition_tokens + rows*columns, D], differentiable; grid: (rows, columns).

    Condition tokens keep their positions; the image's g x g map is interpolated bilinearly (recommended). `position`
    itself when the grid is its own.
    """
    old = math.isqrt(position.shape[1] - num_condition_tokens)
    if old * old != position.shape[1] - num_condition_tokens:
        raise ValueError(f"{position.shape[1] - num_condition_tokens} image positions are not a square grid; "
                         "is num_condition_tokens right?")
    if grid == (old, old):
        return position
    condition, image = position[:, :num_condition_tokens], position[:, num_condition_tokens:]
    image = image.unflatten(1, (old, old)).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=grid, mode="bilinear", align_corners=False)
    return torch.cat([condition, image.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)], dim=1)


def build_uvit(preset: str, **overrides) -> UViT2DModel:
    """A freshly initialised U-ViT of PRESETS, any constructor argument overridden by keyword."""
    if preset not in PRESETS:
        raise ValueError(f"unknown U-ViT preset {preset!r}; there are {', '.join(PRESETS)}")
    known = UViT2DModel._get_init_keys(UViT2DModel)
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"unknown U-ViT setting {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return UViT2DModel(**{**PRESETS[preset], **overrides})
