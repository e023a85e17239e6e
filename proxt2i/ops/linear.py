"""Linear layers: torch's, or csrc/cpu/linear.cpp where that is faster."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from proxt2i.ops.checks import FLOATS, without_second_derivative
from proxt2i.ops.native import PRODUCTS, native_available

IMPLS = (None, "native", "torch")
MULTIPLE = 32  # of all widths that the native kernels take
FEW_ROWS = 256  # of x, below which packing the weight costs more than is won


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, skip: Tensor | None = None, impl: str | None = None) -> Tensor:
    """[x, skip] weight^T + bias over the last dimension, without the concatenation, in x's dtype or autocast's; differentiable, by the native kernels once.

    x [..., inputs], skip [..., more inputs] or None, weight [outputs, inputs + more], bias [outputs] or None.
    impl: "native", for float tensors on a CPU with a weight in float32 (float64 for float64) and widths of multiples of 32, or "torch", which
    insist; None: native for 256 rows and more in float32 or bfloat16 on a CPU where these products are faster than torch's (AMD's with AVX-512 and
    with AVX512-BF16), torch's elsewhere and under torch.compile. There a row of the result does not depend on the other rows.
    ValueError where native kernels are insisted on and cannot be had.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, not {impl!r}")
    if impl == "native" or (impl is None and PRODUCTS and x.device.type == "cpu" and not torch.compiler.is_compiling()):
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
            skip = None if skip is None else skip.to(x.dtype)
        problem = _why_not_native(x, weight, skip)
        if impl == "native" and problem:
            raise ValueError(f"impl='native': {problem}")
        if impl == "native" or (not problem and x.dtype in PRODUCTS and x.numel() >= FEW_ROWS * x.shape[-1]):
            return torch.ops.proxt2i.linear(x, skip, weight, bias)
    if skip is None:
        return F.linear(x, weight, bias)
    x_weight, skip_weight = weight.split([x.shape[-1], skip.shape[-1]], dim=1)
    return F.linear(x, x_weight, bias) + F.linear(skip, skip_weight)


def _why_not_native(x: Tensor, weight: Tensor, skip: Tensor | None) -> str:
    if not native_available() or x.device.type != "cpu" or x.dtype not in FLOATS:
        return f"the native kernels, if built, take float tensors on a CPU, not {x.dtype} on {x.device}"
    if weight.dtype != (torch.float64 if x.dtype == torch.float64 else torch.float32):
        return f"weight must be float32, or float64 if x is, not {weight.dtype} for x in {x.dtype}"
    widths = [*weight.shape, x.shape[-1], 0 if skip is None else skip.shape[-1]]
    if any(width % MULTIPLE for width in widths) or 0 in widths[:3]:
        return f"all widths must be multiples of {MULTIPLE}, not {widths}"
    return ""


if native_available():

    @torch.library.register_fake("proxt2i::linear")
    def _(x, skip, weight, bias):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    @torch.library.register_fake("proxt2i::linear_backward")
    def _(grad, x, skip, weight, has_bias, wants_x, wants_weight):
        return (x.new_empty(x.shape if wants_x else 0), x.new_empty(0 if skip is None or not wants_x else skip.shape),
                weight.new_empty(weight.shape if wants_weight else 0), weight.new_empty(weight.shape[0] if wants_weight and has_bias else 0))

    @register_flop_formula(torch.ops.proxt2i.linear)
    def _(x_shape, skip_shape, weight_shape, *args, **kwargs):
        return 2 * math.prod(x_shape[:-1]) * math.prod(weight_shape)

    @register_flop_formula(torch.ops.proxt2i.linear_backward)
    def _(grad_shape, x_shape, skip_shape, weight_shape, has_bias, wants_x, wants_weight, **kwargs):
        return 2 * math.prod(grad_shape[:-1]) * math.prod(weight_shape) * (wants_x + wants_weight)

    def _setup(ctx, inputs, output):
        x, skip, weight, bias = inputs
        ctx.save_for_backward(x, skip, weight)
        ctx.has_bias = bias is not None

    def _backward(ctx, grad):
        x, skip, weight = ctx.saved_tensors
        wants_x, wants_weight = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:])
        grads = torch.ops.proxt2i.linear_backward(grad, x, skip, weight, ctx.has_bias, wants_x, wants_weight)
        wanted = (wants_x, wants_x and skip is not None, wants_weight, wants_weight and ctx.has_bias)
        return tuple(g if wants else None for g, wants in zip(grads, wanted))

    torch.library.register_autograd("proxt2i::linear", _backward, setup_context=_setup)
    without_second_derivative("proxt2i::linear_backward")
