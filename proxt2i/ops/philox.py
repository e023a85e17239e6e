"""Counter-based normal noise: Philox4x32-10 and Box-Muller, natively and as a plain-torch reference.

An image's noise is a pure function of (its seed, the step, the element's index), so it never depends on the batch that the image is
made in, on the number of processes, or on what was drawn before.
"""

import math

import torch

from proxt2i.ops.native import native_available, use_native

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def philox_normal(seeds: torch.Tensor, step: int, shape: tuple[int, ...], impl: str | None = None) -> torch.Tensor:
    """N(0, 1) noise for a batch of images.

    seeds: int64 [B], one 64-bit key an image.  step: which draw of that image, >= 0.  shape: of one image.
    Returns float32 [B, *shape] on the device of seeds; element e of image b is a function of (seeds[b], step, e) alone.
    |z| <= 6.66.  ValueError for a wrong dtype or shape of seeds, a negative step, or an unknown impl.
    """
    check_seeds(seeds, step)
    shape = tuple(shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape must not have negative sizes: {shape}")
    count = math.prod(shape)
    if use_native(impl, seeds.device):
        return torch.ops.proxt2i.philox_normal(seeds, step, count).reshape(seeds.shape[0], *shape)
    return philox_normal_ref(seeds, step, count).reshape(seeds.shape[0], *shape)


def check_seeds(seeds: torch.Tensor, step: int) -> None:
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"seeds must be int64 with shape [B], not {seeds.dtype} {tuple(seeds.shape)}")
    if step < 0:
        raise ValueError(f"step must be >= 0, not {step}")


def philox4x32_10(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words; counter: 4, key: 2 -> 4 words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return [c0, c1, c2, c3]


def _multiply(words: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of words * factor, in two 48-bit products, which int64 holds."""
    low = (words & 0xFFFF) * factor
    high = (words >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def box_muller(w0: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """Two words (int64 tensors [...] of 32 bits) -> float64 [..., 2]: what the kernel's float32 polynomials approximate.

    The radius comes from u = (w0 >> 1) 2^-31 + 2^-32, rounded to float32 as in the kernel; the angle is 2 pi w1 2^-32.
    """
    u = ((w0 >> 1).float() * 2.0**-31 + 2.0**-32).double()
    radius = torch.sqrt(-2.0 * torch.log(u))
    quadrant = ((w1 + (1 << 29)) >> 30) & 3
    t = (((w1 - (quadrant << 30)) + (1 << 31)) & MASK) - (1 << 31)  # as a signed word, in [-2^29, 2^29)
    s, c = torch.sin(t * (math.pi * 2.0**-31)), torch.cos(t * (math.pi * 2.0**-31))
    odd = (quadrant & 1).bool()
    cos = torch.where(odd, s, c) * (1 - ((quadrant + 1) & 2))
    sin = torch.where(odd, c, s) * (1 - (quadrant & 2))
    return torch.stack([radius * cos, radius * sin], dim=-1)


def philox_words_ref(seeds: torch.Tensor, step: int | torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """The four words of blocks 0 ... num_blocks - 1 of each image: int64 [B, num_blocks] each. step: one, or int64 [B]."""
    block = torch.arange(num_blocks, device=seeds.device).expand(seeds.shape[0], -1)
    step = torch.as_tensor(step, device=seeds.device).reshape(-1, 1).expand_as(block)
    low, high = step & MASK, step >> 32
    key = [(seeds & MASK)[:, None], ((seeds >> 32) & MASK)[:, None]]
    return philox4x32_10([block & MASK, block >> 32, low, high], key)


def philox_normal_ref(seeds: torch.Tensor, step: int | torch.Tensor, count: int) -> torch.Tensor:
    """Reference of the op: float32 [B, count]. step: one, or int64 [B], one an image."""
    w0, w1, w2, w3 = philox_words_ref(seeds, step, (count + 3) // 4)
    z = torch.cat([box_muller(w0, w1), box_muller(w2, w3)], dim=-1)
    return z.flatten(1)[:, :count].float()


if native_available():

    @torch.library.register_fake("proxt2i::philox_normal")
    def _(seeds, step, count):
        return seeds.new_empty((seeds.shape[0], count), dtype=torch.float32)
