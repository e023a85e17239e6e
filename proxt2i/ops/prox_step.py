"""The proximal step of the sampler, fused: guidance, prox, and the next noisy state in one pass over memory.

    eps = eps_uncond + w (eps_cond - eps_uncond)        guidance, linear in the prox
    x   = y - sqrt(lambda) eps                          x_{k-1} = prox(y_k)   (ProxDM's learned prox; ProxT2I)
    D   = c_y y - c_eps eps                             the clean image that the prox implies
    y'  = a x + b z + m (D - D'),  z ~ N(0, I)          the state that the next prox sees; D' is D of the step before

The native kernels (csrc/cpu, and csrc/cuda) draw z inside the pass; `prox_step_ref` is the same in plain torch. The numbers (w, sqrt(lambda), ...) are read from a float64 row in the memory of
the device, so that one captured CUDA graph serves every row of a plan, and every image of a batch may be at a step of its own.
"""

from collections.abc import Sequence

import torch

from proxt2i.ops.checks import FLOATS, elements_per_image
from proxt2i.ops.native import native_available, use_native
from proxt2i.ops.philox import check_seeds, philox_normal, philox_normal_ref

__all__ = ["COEFFICIENTS", "native_available", "philox_normal", "prox_step", "prox_step_ref"]

COEFFICIENTS = ("guidance_scale", "sqrt_lam", "a", "b", "clean_y", "clean_eps", "memory", "draw")  # columns, as in csrc/common/op.h


def step_row(sqrt_lam: float, *, guidance_scale: float = 1.0, a: float = 1.0, b: float = 0.0, clean_y: float = 0.0,
                 clean_eps: float = 0.0, memory: float = 0.0, draw: int = 0) -> list[float]:
    """The numbers of one step in the order of COEFFICIENTS (the module's w, sqrt(lambda), a, b, c_y, c_eps, m).

    draw: which draw of the image z is, see philox_normal.
    """
    if draw < 0:
        raise ValueError(f"draw must be >= 0, not {draw}")
    return [float(guidance_scale), float(sqrt_lam), float(a), float(b), float(clean_y), float(clean_eps), float(memory), float(draw)]


def prox_step(y: torch.Tensor, eps_cond: torch.Tensor, eps_uncond: torch.Tensor | None, row: torch.Tensor | Sequence[float], *,
              clean: torch.Tensor | None = None, noise: torch.Tensor | None = None, seeds: torch.Tensor | None = None,
              want_x: bool = True, want_next: bool = True, want_clean: bool = False,
              impl: str | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """One proximal step: (x, y', D), each [B, ...] in y's dtype and contiguous, or None where it is not wanted (and costs nothing).

    y: float32 or float64 [B, ...].  eps_cond, eps_uncond: same shape; float32, float64, bfloat16 or float16; computed in y's dtype.
    eps_uncond None: eps = eps_cond and guidance_scale is not used.  row: `step_row`, float64 [8], or [B, 8] with one row an
    image.  clean: D', y's shape; None: no memory.  z is `noise` (y's shape) if given, else philox_normal(seeds, draw); an image
    with b == 0 draws nothing.  Differentiable in y, eps_cond, eps_uncond, clean and noise.
    ValueError, before any work, for tensors that do not fit together.
    """
    eps_cond, eps_uncond = _prepare_eps(y, eps_cond, eps_uncond)
    if not isinstance(row, torch.Tensor):
        row = torch.tensor(row, dtype=torch.float64, device=y.device)
    _check_row(y, row)
    if clean is not None:
        _check_like(y, clean, "clean")
        clean = clean.to(y.dtype)
    if noise is not None:
        _check_like(y, noise, "noise")
        noise, seeds = noise.to(y.dtype), None
    elif seeds is not None:
        check_seeds(seeds, 0)
        if seeds.shape[0] != y.shape[0] or seeds.device != y.device:
            raise ValueError(f"seeds must hold one entry for each of y's {y.shape[0]} images, on {y.device}; "
                             f"got {seeds.shape[0]} on {seeds.device}")
    elif want_next and row.device.type == "cpu" and row[..., COEFFICIENTS.index("b")].any():  # elsewhere reading it would wait
        raise ValueError("b != 0 needs noise or seeds")
    args = (y, eps_cond, eps_uncond, clean, noise, seeds, row, want_x, want_next, want_clean)
    outputs = torch.ops.proxt2i.prox_step(*args) if use_native(impl, y.device) else prox_step_ref(*args)
    x, y_next, clean_next = (value if wanted else None for value, wanted in zip(outputs, args[-3:]))
    return x, y_next, clean_next


def prox_step_ref(y, eps_cond, eps_uncond, clean, noise, seeds, row, want_x, want_next, want_clean):
    """Plain-torch reference of the op proxt2i::prox_step."""
    w, sqrt_lam, a, b, clean_y, clean_eps, memory = _columns(row, y)
    eps = eps_cond.to(y.dtype)
    if eps_uncond is not None:
        eps_uncond = eps_uncond.to(y.dtype)
        eps = eps_uncond + w * (eps - eps_uncond)
    x = y - sqrt_lam * eps
    y_next = a * x
    if noise is None and seeds is not None:
        noise = _draw(y, seeds, row)
    if noise is not None:
        y_next = torch.where(b == 0, y_next, y_next + b * noise)
    clean_next = clean_y * y - clean_eps * eps
    if clean is not None:
        y_next = y_next + memory * (clean_next - clean)
    nothing = y.new_empty(0)
    return tuple(value.contiguous() if wanted else nothing
                 for value, wanted in ((x, want_x), (y_next, want_next), (clean_next, want_clean)))


def _columns(row, y):
    """The coefficients but for `draw`, each in y's dtype and ready to multiply y."""
    return [column.to(y.dtype).reshape(-1, *[1] * (y.dim() - 1)) for column in row[..., :-1].unbind(-1)]


def _draw(y, seeds, row):
    """z of every image, in y's dtype; images at different steps have different draws."""
    return philox_normal_ref(seeds, row[..., -1].long(), elements_per_image(y)).reshape(y.shape).to(y.dtype)


def _check_row(y, row):
    if row.dtype != torch.float64 or row.device != y.device:
        raise ValueError(f"coefficients must be float64 on {y.device}, not {row.dtype} on {row.device}")
    if tuple(row.shape) not in ((len(COEFFICIENTS),), (y.shape[0], len(COEFFICIENTS))):
        raise ValueError(f"coefficients must have shape [{len(COEFFICIENTS)}] or [{y.shape[0]}, {len(COEFFICIENTS)}], "
                         f"not {list(row.shape)}")


def _check_like(y, tensor, name):
    if tensor.shape != y.shape:
        raise ValueError(f"{name} must have y's shape {tuple(y.shape)}, not {tuple(tensor.shape)}")
    if tensor.device != y.device:
        raise ValueError(f"{name} is on {tensor.device}, but y is on {y.device}")
    if tensor.dtype not in FLOATS:
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
    def _(y, eps_cond, eps_uncond, clean, noise, seeds, row, want_x, want_next, want_clean):
        return tuple(y.new_empty(y.shape if wanted else 0) for wanted in (want_x, want_next, want_clean))

    def _setup(ctx, inputs, output):
        _, eps_cond, eps_uncond, clean, noise, _, row, *ctx.wanted = inputs
        ctx.save_for_backward(row)
        ctx.eps_dtype, ctx.guided, ctx.remembers, ctx.noisy = eps_cond.dtype, eps_uncond is not None, clean is not None, noise is not None

    def _backward(ctx, *grads):
        like = next(grad for grad, wanted in zip(grads, ctx.wanted) if wanted)
        w, sqrt_lam, a, b, clean_y, clean_eps, memory = _columns(*ctx.saved_tensors, like)
        grad_x, grad_next, grad_clean = (grad if wanted else torch.zeros_like(like) for grad, wanted in zip(grads, ctx.wanted))
        through_x = grad_x + a * grad_next
        through_clean = grad_clean + memory * grad_next if ctx.remembers else grad_clean
        grad_y, grad_eps = through_x + clean_y * through_clean, -sqrt_lam * through_x - clean_eps * through_clean
        return (grad_y, *((scale * grad_eps).to(ctx.eps_dtype) for scale in ((w, 1 - w) if ctx.guided else (1,))),
                *[None] * (not ctx.guided), -memory * grad_next if ctx.remembers else None, b * grad_next if ctx.noisy else None,
                *[None] * 5)

    torch.library.register_autograd("proxt2i::prox_step", _backward, setup_context=_setup)
