"""A linear layer whose large products on a CPU are oneDNN's.

torch multiplies float32 matrices on a CPU by MKL, after a copy of the bias into the result. oneDNN adds the bias where it computes, and its products of
thousands of rows with a weight of the U-ViT are 10 to 25 % faster on an AMD EPYC (AVX-512), in the forward pass and for the gradient of the input.
For few rows MKL's are as fast or faster: those stay torch's.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

MIN_ROWS = 1024  # from here on oneDNN's products are the faster ones
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> x weight^T + bias [..., N], as torch.nn.functional.linear (to rounding).

    Products by oneDNN (float32 on a CPU, MIN_ROWS rows and more, outside of autocast and torch.compile) have no second derivative.
    """
    return _OneDnnLinear.apply(x, weight, bias) if _fits(x, weight) else F.linear(x, weight, bias)


class Linear(torch.nn.Linear):
    """torch's layer, computed by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (AVAILABLE and not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and x.numel() >= MIN_ROWS * x.shape[-1] > 0 and not torch.is_autocast_enabled("cpu"))


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        grad_bias = (rows.new_ones(1, len(rows)) @ rows)[0] if ctx.needs_input_grad[2] else None  # faster than a sum over rows
        return grad_x, grad_weight, grad_bias


def _product(x, weight, bias):  # oneDNN is slow where a matrix has gaps, as halves of one have
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


if AVAILABLE:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _(x_shape, weight_shape, *args, **kwargs):
        return 2 * math.prod(x_shape) * weight_shape[0]
