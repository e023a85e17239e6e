"""Training pairs and the proximal matching loss, fused: noise is drawn where it is used, and the target never exists as a tensor.

    y = s x0 + r e + p n          s = sqrt(alpha_t), r = sqrt(1 - alpha_t), p = sqrt(lam): `coefficients`, [B, 3]
    e, n                          draws 0 and 1 of the image's seed (philox_normal)
    target                        n, or its mean given x0 and y, p / (r^2 + p^2) (y - s x0); or e, for a score network
    mse = mean((eps - target)^2)  loss = 1 - exp(-mse / zeta^2)

`proxt2i.diffusion.matching` has the same in plain torch, step by step, and says why. The native operators give the two errors of each
image, mse and mean |eps - target|, and their gradient; what the loss makes of these few numbers is ordinary torch. Sums are in an
order that depends on an image's size alone (csrc/common/reduce.h), so that a result is the same bits in any batch, on any number of
threads and with any instruction set.
"""

import torch

from proxt2i.ops.checks import check_batch, check_like, check_per_image, elements_per_image, network_output, rows, state_dtype, without_second_derivative
from proxt2i.ops.native import native_available, use_native
from proxt2i.ops.philox import philox_normal_ref

E_DRAW, N_DRAW = 0, 1
TARGETS = {"expected": None, "noise": N_DRAW, "diffusion_noise": E_DRAW}
LOSSES = ("prox", "l1", "l2")


def noised_pair(x0: torch.Tensor, seeds: torch.Tensor, coefficients: torch.Tensor, impl: str | None = None) -> torch.Tensor:
    """The network's input y = s x0 + r e + p n, [B, ...] and contiguous, in float32 (float64 if x0 is).

    x0: [B, ...], any float dtype.  seeds: int64 [B].  coefficients: s, r, p of each image, float32 or float64 [B, 3].
    Noise whose coefficient is 0 is not drawn. Differentiable in x0. ValueError, before any work, for tensors that do not fit together.
    """
    check_batch(x0, "x0")
    check_per_image(seeds, x0, "seeds", integer=True)
    check_per_image(coefficients, x0, "coefficients", (3,))
    state = state_dtype(x0)
    args = (x0.to(state), seeds, coefficients.detach().to(state))
    return torch.ops.proxt2i.noised_pair(*args) if use_native(impl, x0.device) else noised_pair_ref(*args)


def prox_matching_loss(eps: torch.Tensor, x0: torch.Tensor | None, y: torch.Tensor | None, seeds: torch.Tensor,
                       coefficients: torch.Tensor, *, target: str, zeta: float = 1.0, kind: str = "prox",
                       weight: torch.Tensor | None = None, impl: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, mse) of each image, [B] each, in float32 (float64 if eps, x0 or y is); differentiable, once, in eps (and in weight).

    eps: the network's answer, [B, ...], float32, float64, bfloat16 or float16.  x0, y: what `noised_pair` was given and returned, the
    same shape; None will do unless target is "expected".  seeds, coefficients: as given to `noised_pair`.
    target: "noise" n, "expected" its mean given x0 and y, "diffusion_noise" e.
    kind: "prox" 1 - exp(-mse / zeta^2), "l2" mse, "l1" mean |eps - target|.  weight: factor of each loss, [B].
    ValueError, before any work, for tensors or settings that do not fit.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; valid: {', '.join(TARGETS)}")
    if kind not in LOSSES:
        raise ValueError(f"unknown loss kind {kind!r}; valid: {', '.join(LOSSES)}")
    check_batch(eps, "eps")
    draw = TARGETS[target]
    if draw is not None:
        x0 = y = None
    elif x0 is None or y is None:
        raise ValueError('target="expected" needs x0 and y')
    for name, tensor in (("x0", x0), ("y", y)):
        if tensor is not None:
            check_like(tensor, eps, name, "eps")
    check_per_image(seeds, eps, "seeds", integer=True)
    check_per_image(coefficients, eps, "coefficients", (3,))
    if weight is not None:
        check_per_image(weight, eps, "weight")
    state = state_dtype(eps, x0, y)
    x0, y, coefficients = (None if t is None else t.detach().to(state) for t in (x0, y, coefficients))
    args = (network_output(eps, state), x0, y, seeds, coefficients, draw)
    native = use_native(impl, eps.device)
    mse, mae = torch.ops.proxt2i.matching_errors(*args) if native else matching_errors_ref(*args)
    loss = {"prox": lambda: proximal_loss(mse, zeta), "l1": lambda: mae, "l2": lambda: mse}[kind]()
    return loss if weight is None else loss * weight, mse


def proximal_loss(mse: torch.Tensor, zeta: float) -> torch.Tensor:
    """1 - exp(-mse / zeta^2) (ProxDM eq. 7), exact for small mse. ValueError unless zeta > 0."""
    if not zeta > 0:
        raise ValueError(f"zeta={zeta}: need a positive number")
    return -torch.expm1(-mse / zeta**2)


def noised_pair_ref(x0, seeds, coefficients):
    """Plain-torch reference of the op proxt2i::noised_pair."""
    signal, noise, prox = _columns(coefficients, x0)
    return (signal * x0 + noise * _draw(seeds, E_DRAW, x0) + prox * _draw(seeds, N_DRAW, x0)).contiguous()


def matching_errors_ref(eps, x0, y, seeds, coefficients, draw):
    """Plain-torch reference of the op proxt2i::matching_errors."""
    eps = eps.to(coefficients.dtype)
    if draw is None:
        signal, noise, prox = _columns(coefficients, eps)
        target = prox / (noise.square() + prox.square()) * (y - signal * x0)
    else:
        target = _draw(seeds, draw, eps)
    error = rows(eps - target)
    return error.square().mean(1), error.abs().mean(1)


def _columns(coefficients, like):
    return coefficients.T.reshape(3, -1, *[1] * (like.dim() - 1))


def _draw(seeds, draw, like):
    return philox_normal_ref(seeds, draw, elements_per_image(like)).reshape(like.shape).to(like.dtype)


if native_available():

    @torch.library.register_fake("proxt2i::noised_pair")
    def _(x0, seeds, coefficients):
        return x0.new_empty(x0.shape)

    @torch.library.register_fake("proxt2i::matching_errors")
    def _(eps, x0, y, seeds, coefficients, draw):
        return coefficients.new_empty(eps.shape[0]), coefficients.new_empty(eps.shape[0])

    @torch.library.register_fake("proxt2i::matching_errors_backward")
    def _(grad_mse, grad_mae, eps, x0, y, seeds, coefficients, draw):
        return eps.new_empty(eps.shape)

    def _setup_pair(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    def _backward_pair(ctx, grad):
        return _columns(ctx.saved_tensors[0], grad)[0] * grad, None, None

    def _setup_errors(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])
        ctx.draw = inputs[-1]

    def _backward_errors(ctx, grad_mse, grad_mae):
        grad = torch.ops.proxt2i.matching_errors_backward(grad_mse, grad_mae, *ctx.saved_tensors, ctx.draw)
        return grad, *[None] * 5

    torch.library.register_autograd("proxt2i::noised_pair", _backward_pair, setup_context=_setup_pair)
    torch.library.register_autograd("proxt2i::matching_errors", _backward_errors, setup_context=_setup_errors)
    without_second_derivative("proxt2i::matching_errors_backward")
