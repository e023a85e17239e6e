"""Likelihood ratio and KL divergence of Gaussian transitions whose mean comes from a network: what policy gradients ask of a sampler.

A transition y' = mean + b z, z ~ N(0, I), with mean = const - b c eps, c > 0 a number for each image. For the proximal chain
y_{k-1} | y_k ~ N(a f(y_k), b^2 I) with f = y - rho sqrt(lambda) eps it is c = a rho sqrt(lambda) / b. The sample y' was made by the
old network with the noise z: y' = mean_old + b z, hence y' - mean_new = b (z + d) with

    d         = c (eps - eps_old),   eps = eps_uncond + w (eps_cond - eps_uncond)
    log ratio = log p_new(y') - log p_old(y') = (|z|^2 - |z + d|^2) / 2 = -sum(d (z + d / 2))
    kl        = KL(N_new || N_ref) = sum(q^2) / 2,   q = c (eps - eps_ref)

Neither states nor means appear, so nothing cancels: equal networks give a ratio of exactly 1. The noise need not be stored either; it
is drawn again from the seeds. Sums are in an order that depends on an image's size alone (csrc/common/reduce.h): a result is the same
bits in any batch, on any number of threads and with any instruction set.
"""

import torch

from proxt2i.ops.checks import check_batch, check_like, check_per_image, elements_per_image, network_output, rows, state_dtype, without_second_derivative
from proxt2i.ops.native import native_available, use_native
from proxt2i.ops.philox import philox_normal_ref


def transition_log_ratio(eps_cond: torch.Tensor, eps_uncond: torch.Tensor | None, eps_old: torch.Tensor,
                         eps_ref: torch.Tensor | None = None, *, scale: torch.Tensor, guidance_scale: float = 1.0,
                         noise: torch.Tensor | None = None, seeds: torch.Tensor | None = None, steps: torch.Tensor | None = None,
                         impl: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(log ratio, kl) of each image's transition, [B] each, float32 (float64 if a network's output is).

    eps_cond, eps_uncond: [B, ...], float32, float64, bfloat16 or float16; eps_uncond None: eps = eps_cond, guidance_scale is not used.
    eps_old, eps_ref: the same shape, already guided; of eps_ref None kl is 0. Keep what `guided_eps` returns, not rounded to 16 bits,
    and the ratio of equal networks is exactly 1.  scale: c, float32 or float64 [B].
    z is `noise` (same shape) if given, else philox_normal(seeds[b], steps[b]) of image b; seeds, steps: int64 [B], steps >= 0.
    Differentiable, once, in eps_cond and eps_uncond alone. ValueError, before any work, for tensors that do not fit together.
    """
    check_batch(eps_cond, "eps_cond")
    for name, tensor in (("eps_uncond", eps_uncond), ("eps_old", eps_old), ("eps_ref", eps_ref), ("noise", noise)):
        if tensor is not None:
            check_like(tensor, eps_cond, name, "eps_cond")
    check_per_image(scale, eps_cond, "scale")
    if noise is not None:
        seeds = steps = None
    elif seeds is None or steps is None:
        raise ValueError("either noise, or both seeds and steps, must be given")
    else:
        check_per_image(seeds, eps_cond, "seeds", integer=True)
        check_per_image(steps, eps_cond, "steps", integer=True)
    state = state_dtype(eps_cond, eps_uncond, eps_old, eps_ref)
    eps_cond, eps_uncond = _same_dtype(eps_cond, eps_uncond, state)
    eps_old, eps_ref, noise, scale = (None if t is None else t.detach().to(state) for t in (eps_old, eps_ref, noise, scale))
    args = (eps_cond, eps_uncond, eps_old, eps_ref, noise, seeds, steps, scale, float(guidance_scale))
    native = use_native(impl, eps_cond.device)
    return torch.ops.proxt2i.transition_log_ratio(*args) if native else transition_log_ratio_ref(*args)


def guided_eps(eps_cond: torch.Tensor, eps_uncond: torch.Tensor | None, guidance_scale: float,
               impl: str | None = None) -> torch.Tensor:
    """eps_uncond + w (eps_cond - eps_uncond), to the bit as transition_log_ratio computes it: eps_old and eps_ref of later calls.

    eps_cond, eps_uncond: [B, ...] as there.  Returns [B, ...] in float32 (float64 if they are). Differentiable; ValueErrors as there.
    """
    check_batch(eps_cond, "eps_cond")
    if eps_uncond is not None:
        check_like(eps_uncond, eps_cond, "eps_uncond", "eps_cond")
    state = state_dtype(eps_cond, eps_uncond)
    eps_cond, eps_uncond = _same_dtype(eps_cond, eps_uncond, state)
    native = use_native(impl, eps_cond.device)
    if eps_uncond is None:
        return eps_cond.to(state)
    args = (eps_cond, eps_uncond, float(guidance_scale))
    return torch.ops.proxt2i.guided_eps(*args) if native else guided_eps_ref(*args)


def guided_eps_ref(eps_cond, eps_uncond, guidance_scale):
    """Plain-torch reference of the op proxt2i::guided_eps."""
    state = state_dtype(eps_cond)
    eps_cond, eps_uncond = eps_cond.to(state), eps_uncond.to(state)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def transition_log_ratio_ref(eps_cond, eps_uncond, eps_old, eps_ref, noise, seeds, steps, scale, guidance_scale):
    """Plain-torch reference of the op proxt2i::transition_log_ratio."""
    eps = eps_cond.to(eps_old.dtype) if eps_uncond is None else guided_eps_ref(eps_cond, eps_uncond, guidance_scale)
    z = philox_normal_ref(seeds, steps, elements_per_image(eps)).to(eps.dtype) if noise is None else rows(noise)
    d = scale[:, None] * rows(eps - eps_old)
    log_ratio = -(d * (z + d / 2)).sum(1)
    kl = torch.zeros_like(log_ratio) if eps_ref is None else (scale[:, None] * rows(eps - eps_ref)).square().sum(1) / 2
    return log_ratio, kl


def _same_dtype(eps_cond, eps_uncond, state):
    """Both network outputs in one dtype that the kernels take."""
    if eps_uncond is not None and eps_uncond.dtype != eps_cond.dtype:
        return eps_cond.to(state), eps_uncond.to(state)
    return network_output(eps_cond, state), None if eps_uncond is None else network_output(eps_uncond, state)


if native_available():

    @torch.library.register_fake("proxt2i::transition_log_ratio")
    def _(eps_cond, eps_uncond, eps_old, eps_ref, noise, seeds, steps, scale, guidance_scale):
        return eps_old.new_empty(eps_old.shape[0]), eps_old.new_empty(eps_old.shape[0])

    @torch.library.register_fake("proxt2i::transition_log_ratio_backward")
    def _(grad_log_ratio, grad_kl, eps_cond, eps_uncond, *others):
        return eps_cond.new_empty(eps_cond.shape), eps_cond.new_empty(0 if eps_uncond is None else eps_cond.shape)

    @torch.library.register_fake("proxt2i::guided_eps")
    def _(eps_cond, eps_uncond, guidance_scale):
        return eps_cond.new_empty(eps_cond.shape, dtype=state_dtype(eps_cond))

    def _setup_log_ratio(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])
        ctx.guidance_scale = inputs[-1]

    def _backward_log_ratio(ctx, grad_log_ratio, grad_kl):
        args = (*ctx.saved_tensors, ctx.guidance_scale)
        cond, uncond = torch.ops.proxt2i.transition_log_ratio_backward(grad_log_ratio, grad_kl, *args)
        return cond, None if args[1] is None else uncond, *[None] * 7

    def _setup_guided(ctx, inputs, output):
        ctx.eps_dtype, ctx.guidance_scale = inputs[0].dtype, inputs[2]

    def _backward_guided(ctx, grad):
        return (ctx.guidance_scale * grad).to(ctx.eps_dtype), ((1 - ctx.guidance_scale) * grad).to(ctx.eps_dtype), None

    torch.library.register_autograd("proxt2i::transition_log_ratio", _backward_log_ratio, setup_context=_setup_log_ratio)
    torch.library.register_autograd("proxt2i::guided_eps", _backward_guided, setup_context=_setup_guided)
    without_second_derivative("proxt2i::transition_log_ratio_backward")
