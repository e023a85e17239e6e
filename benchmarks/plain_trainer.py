"""A proximal trainer as published ones are written, in plain torch: what benchmarks/train.py measures ours against.

The network has the parameters of our U-ViT, name by name and shape by shape, so that both do the same matrix products. The loop is
that of ProxDM (arXiv 2507.08956): (t, lambda) of a random step of a random step count, two torch.randn, the matching loss on eps, clipping to norm 1,
torch's AdamW with its defaults, an average of the weights every step, and the loss and the gradient norm read every step. ProxDM runs
under accelerate, which adds work to a single process and no speed: it is left out, in this loop's favour.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEP_COUNTS = (4, 5, 6, 8, 10)
BETA_MIN, BETA_MAX = 0.1, 20.0
ZETA, DROPOUT, EMA_DECAY = 1.0, 0.1, 0.9999


class Attention(nn.Module):
    def __init__(self, dim, num_heads, fused):
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // num_heads, eps=1e-6) for _ in range(2))

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, fused, skip):
        super().__init__()
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads, fused)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x, skip=None):
        if skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Scalar(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.width = min(256, dim // 2)
        self.fc1, self.fc2 = nn.Linear(self.width, self.width), nn.Linear(self.width, dim)

    def forward(self, values):
        freqs = torch.exp(-math.log(10000) * torch.arange(self.width // 2, device=values.device) / (self.width // 2))
        args = 1000 * values[:, None] * freqs[None]
        return self.fc2(F.silu(self.fc1(torch.cat([args.cos(), args.sin()], dim=-1)))).unsqueeze(1)


class PlainUViT(nn.Module):
    """uvit: ours, whose sizes and initial weights this takes over; fused: attention by F.scaled_dot_product_attention."""

    def __init__(self, uvit, fused):
        super().__init__()
        c, dim = uvit.config, uvit.config.embed_dim
        self.patch, self.conditions = c.patch_size, uvit.num_condition_tokens
        self.patch_embed = nn.Linear(c.patch_size**2 * c.in_channels, dim)
        self.t_embed, self.lam_embed = Scalar(dim), Scalar(dim)
        self.text_embed = nn.ModuleList(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, dim)) for d in c.text_dims)
        self.position = nn.Parameter(torch.zeros_like(uvit.position))
        self.in_blocks, self.out_blocks = (nn.ModuleList(Block(dim, c.num_heads, fused, skip) for _ in range(c.depth // 2)) for skip in (False, True))
        self.mid_block = Block(dim, c.num_heads, fused, False)
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, c.patch_size**2 * c.in_channels)
        self.load_state_dict(uvit.state_dict())

    def forward(self, y, t, lam, text):
        b, c, h, w = y.shape
        p = self.patch
        patches = y.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
        tokens = [self.t_embed(t), self.lam_embed(lam), *(embed(e) for embed, e in zip(self.text_embed, text)), self.patch_embed(patches)]
        x = torch.cat(tokens, dim=1) + self.position
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.out(self.norm(x))[:, self.conditions:]
        return x.reshape(b, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def beta_integral(t):
    return BETA_MIN * t + 0.5 * (BETA_MAX - BETA_MIN) * t**2


class PlainTrainer:
    """latents [N, C, H, W]; text: one [N, L_i, D_i] per encoder; null_text: the empty caption's, one [1, L_i, D_i] each; bf16: the network in autocast."""

    def __init__(self, uvit, latents, text, null_text, batch_size, fused, bf16, lr=2e-4):
        self.model, self.null_text, self.bf16 = PlainUViT(uvit, fused), null_text, bf16
        self.ema = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.loader = DataLoader(TensorDataset(latents, *text), batch_size, shuffle=True, drop_last=True)
        self.batches = iter(())
        self.losses, self.norms = [], []

    def next_batch(self):
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch

    def step(self):
        x0, *text = (part.float() for part in self.next_batch())
        b = len(x0)
        drop = (torch.rand(b) < DROPOUT)[:, None, None]
        text = [torch.where(drop, null, e) for e, null in zip(text, self.null_text)]
        counts = torch.tensor(STEP_COUNTS)[torch.randint(len(STEP_COUNTS), (b,))]
        t = (torch.rand(b) * counts).floor() / counts
        lam = beta_integral(t + 1 / counts) - beta_integral(t)
        alpha = torch.exp(-beta_integral(t))[:, None, None, None]
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * torch.randn_like(x0)
        n = torch.randn_like(x0)
        y = x_t + lam[:, None, None, None].sqrt() * n

        with torch.autocast(y.device.type, torch.bfloat16, enabled=self.bf16):
            eps = self.model(y, t, lam, text).float()
        loss = (1 - torch.exp(-(eps - n).square().mean(dim=(1, 2, 3)) / ZETA**2)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.norms.append(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.model.parameters()):
                average.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        self.losses.append(loss.item())
