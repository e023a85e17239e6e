"""GELU with the exact normal distribution function, x Phi(x): torch's, or csrc/cpu/gelu.cpp where that is faster."""

import torch
import torch.nn.functional as F

from proxt2i.ops.checks import FLOATS, without_second_derivative
from proxt2i.ops.native import CPU_IS_FAST, native_available

IMPLS = (None, "native", "torch")


def gelu(x: torch.Tensor, impl: str | None = None) -> torch.Tensor:
    """x Phi(x) of every element, in x's shape and dtype; differentiable, by the native kernels once.

    impl: "native", for float tensors on a CPU, or "torch", which insist; None: native on a CPU with AVX2 for all but float64, torch's
    elsewhere and under torch.compile, which fuses it with its neighbours.
    ValueError where native kernels are insisted on and cannot be had.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, not {impl!r}")
    takes = native_available() and x.device.type == "cpu" and x.dtype in FLOATS
    if impl == "native" and not takes:
        raise ValueError(f"impl='native': the native kernels, if built, take float tensors on a CPU, not {x.dtype} on {x.device}")
    if impl is None:
        impl = "native" if takes and CPU_IS_FAST and x.dtype != torch.float64 and not torch.compiler.is_compiling() else "torch"
    return torch.ops.proxt2i.gelu(x) if impl == "native" else F.gelu(x)


if native_available():

    @torch.library.register_fake("proxt2i::gelu")
    def _(x):
        return x.new_empty(x.shape)

    @torch.library.register_fake("proxt2i::gelu_backward")
    def _(grad, x):
        return x.new_empty(x.shape)

    def _setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def _backward(ctx, grad):
        return torch.ops.proxt2i.gelu_backward(grad, *ctx.saved_tensors)

    torch.library.register_autograd("proxt2i::gelu", _backward, setup_context=_setup)
    without_second_derivative("proxt2i::gelu_backward")
