"""The proximal step of the sampler, fused: guidance, prox, and the next noisy state in one pass over memory.

    eps = eps_uncond + w (eps_cond - eps_uncond)        guidance, linear in the prox
    x   = y - sqrt(lambda) eps                          x_{k-1} = prox(y_k)   (ProxDM's learned prox; ProxT2I)
    y'  = a x + b z,  z ~ N(0, I)                       the state that the next prox sees

The native kernels (csrc/cpu, and csrc/cuda, which is *unverified*: compiled in CI, not yet run on a GPU) draw z inside the pass;
`prox_step_ref` is the same in plain torch. Differentiable in y, eps_cond, eps_uncond and noise.
"""

import torch

from proxt2i.ops.native import native_available, use_native
from proxt2i.ops.philox import check_seeds, philox_normal, philox_normal_ref

__all__ = ["native_available", "philox_normal", "prox", "prox_ref", "prox_step", "prox_step_ref"]

EPS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def prox_step(y: torch.Tensor, eps_cond: torch.Tensor, eps_uncond: torch.Tensor | None, *, guidance_scale: float, sqrt_lam: float,
              a: float, b: float, seeds: torch.Tensor | None = None, step: int = 0, noise: torch.Tensor | None = None,
              impl: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One proximal step and the next state: (x, y_next), each [B, ...] in y's dtype and contiguous.

    y: float32 or float64 [B, ...].  eps_cond, eps_uncond: same shape; float32, float64, bfloat16 or float16; computed in y's dtype.
    eps_uncond None: eps = eps_cond and guidance_scale is not used.  z is `noise` (y's shape) if given, else
    philox_normal(seeds, step); b == 0 draws nothing.  ValueError, before any work, for tensors that do not fit together.
    """
    eps_cond, eps_uncond = _prepare_eps(y, eps_cond, eps_uncond)
    if b == 0:
        seeds = noise = None
    elif noise is not None:
        _check_like(y, noise, "noise")
        noise, seeds = noise.to(y.dtype), None
    elif seeds is None:
        raise ValueError("b != 0 needs noise or seeds")
    else:
        check_seeds(seeds, step)
        if seeds.shape[0] != y.shape[0] or seeds.device != y.device:
            raise ValueError(f"seeds must hold one entry for each of y's {y.shape[0]} images, on {y.device}; "
                             f"got {seeds.shape[0]} on {seeds.device}")
    args = (y, eps_cond, eps_uncond, noise, seeds, int(step), float(guidance_scale), float(sqrt_lam), float(a), float(b))
    return torch.ops.proxt2i.prox_step(*args) if use_native(impl, y.device) else prox_step_ref(*args)


def prox(y: torch.Tensor, eps_cond: torch.Tensor, eps_uncond: torch.Tensor | None, *, guidance_scale: float, sqrt_lam: float,
         impl: str | None = None) -> torch.Tensor:
    """The prox alone, for the last step: x [B, ...] in y's dtype. Arguments and errors as of prox_step."""
    eps_cond, eps_uncond = _prepare_eps(y, eps_cond, eps_uncond)
    args = (y, eps_cond, eps_uncond, float(guidance_scale), float(sqrt_lam))
    return torch.ops.proxt2i.prox(*args) if use_native(impl, y.device) else prox_ref(*args)


def prox_ref(y, eps_cond, eps_uncond, guidance_scale, sqrt_lam):
    """Plain-torch reference of the op proxt2i::prox."""
    eps = eps_cond.to(y.dtype)
    if eps_uncond is not None:
        eps_uncond = eps_uncond.to(y.dtype)
        eps = eps_uncond + guidance_scale * (eps - eps_uncond)
    return (y - sqrt_lam * eps).contiguous()


def prox_step_ref(y, eps_cond, eps_uncond, noise, seeds, step, guidance_scale, sqrt_lam, a, b):
    """Plain-torch reference of the op proxt2i::prox_step."""
    x = prox_ref(y, eps_cond, eps_uncond, guidance_scale, sqrt_lam)
    if b == 0:
        return x, a * x
    if noise is None:
        noise = philox_normal_ref(seeds, step, y[0].numel() if y.shape[0] else 0).reshape(y.shape).to(y.dtype)
    return x, a * x + b * noise


def _check_like(y, tensor, name):
    if tensor.shape != y.shape:
        raise ValueError(f"{name} must have y's shape {tuple(y.shape)}, not {tuple(tensor.shape)}")
    if tensor.device != y.device:
        raise ValueError(f"{name} is on {tensor.device}, but y is on {y.device}")
    if tensor.dtype not in EPS_DTYPES:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, not {tensor.dtype}")


def _prepare_eps(y, eps_cond, eps_uncond):
    """Checks the network's outputs against y, and widens the dtype combinations that the kernels do not take."""
    if y.dtype not in (torch.float32, torch.float64) or y.dim() < 1:
        raise ValueError(f"y must be float32 or float64 with shape [B, ...], not {y.dtype} {tuple(y.shape)}")
    _check_like(y, eps_cond, "eps_cond")
    if eps_uncond is not None:
        _check_like(y, eps_uncond, "eps_uncond")
    half = eps_cond.dtype in (torch.bfloat16, torch.float16) and y.dtype == torch.float32
    if half and (eps_uncond is None or eps_uncond.dtype == eps_cond.dtype):
        return eps_cond, eps_uncond
    return eps_cond.to(y.dtype), None if eps_uncond is None else eps_uncond.to(y.dtype)


if native_available():

    @torch.library.register_fake("proxt2i::prox_step")
    def _(y, eps_cond, eps_uncond, noise, seeds, step, guidance_scale, sqrt_lam, a, b):
        return y.new_empty(y.shape), y.new_empty(y.shape)

    @torch.library.register_fake("proxt2i::prox")
    def _(y, eps_cond, eps_uncond, guidance_scale, sqrt_lam):
        return y.new_empty(y.shape)

    def _eps_gradients(grad_x, eps_dtype, guided, guidance_scale, sqrt_lam):
        """d x / d eps_cond and d eps_uncond, applied to grad_x."""
        if not guided:
            return (-sqrt_lam * grad_x).to(eps_dtype), None
        return (-sqrt_lam * guidance_scale * grad_x).to(eps_dtype), (-sqrt_lam * (1 - guidance_scale) * grad_x).to(eps_dtype)

    def _setup_step(ctx, inputs, output):
        _, eps_cond, eps_uncond, noise, _, _, ctx.guidance_scale, ctx.sqrt_lam, ctx.a, ctx.b = inputs
        ctx.eps_dtype, ctx.guided, ctx.noisy = eps_cond.dtype, eps_uncond is not None, noise is not None

    def _backward_step(ctx, grad_x, grad_next):
        total = grad_x + ctx.a * grad_next
        grads = _eps_gradients(total, ctx.eps_dtype, ctx.guided, ctx.guidance_scale, ctx.sqrt_lam)
        return (total, *grads, ctx.b * grad_next if ctx.noisy else None, *[None] * 6)

    def _setup_prox(ctx, inputs, output):
        _, eps_cond, eps_uncond, ctx.guidance_scale, ctx.sqrt_lam = inputs
        ctx.eps_dtype, ctx.guided = eps_cond.dtype, eps_uncond is not None

    def _backward_prox(ctx, grad_x):
        return (grad_x, *_eps_gradients(grad_x, ctx.eps_dtype, ctx.guided, ctx.guidance_scale, ctx.sqrt_lam), None, None)

    torch.library.register_autograd("proxt2i::prox_step", _backward_step, setup_context=_setup_step)
    torch.library.register_autograd("proxt2i::prox", _backward_prox, setup_context=_setup_prox)
