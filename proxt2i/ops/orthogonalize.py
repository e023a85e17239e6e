"""Muon's orthogonalisation (Jordan et al., 2024): plain torch, or csrc/cpu/orthogonalize.cpp, which halves most of its products."""

import torch
from torch import Tensor

from proxt2i.ops.native import CPU_IS_FAST, native_available

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values in (0, 1] go to 0.7 ... 1.2 in five rounds
ROUNDS = 5
MULTIPLE = 32  # of both sides that the native kernel takes
IMPLS = (None, "native", "ref")


def orthogonalize(x: Tensor, rounds: int = ROUNDS, scale: float = 1.0, impl: str | None = None) -> Tensor:
    """[K, m, n] float32 -> the same matrices, contiguous, with singular values in about 0.7 ... 1.2 times `scale` (0 stays 0). Not differentiable.

    Newton-Schulz, X <- (a + b X X^T + c (X X^T)^2) X, on the smaller Gram matrix alone: R = X X^T and the product Q of
    the polynomials are k x k with k = min(m, n), and X is touched twice in all instead of twice a round. It starts from
    X / ||X||, a factor that R and Q take for X: ||X||^2 is the trace of R.

    impl: "native", for float32 or float64 on a CPU and sides of multiples of 32, or "ref", which insist; None: native where it can be on a CPU
    with AVX2, if there are as many matrices as threads, which it does not share a matrix among. ValueError where it is insisted on and cannot be had.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, not {impl!r}")
    takes = (native_available() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not any(s % MULTIPLE or s == 0 for s in x.shape[1:]))
    if impl == "native" and not takes:
        raise ValueError(f"impl='native': the native kernel, if built, takes float32 or float64 [K, m, n] on a CPU, m and n multiples of {MULTIPLE}, "
                         f"not {x.dtype} {list(x.shape)} on {x.device}")
    if impl == "native" or (impl is None and takes and CPU_IS_FAST and x.shape[0] >= torch.get_num_threads()):
        return torch.ops.proxt2i.orthogonalize(x, *NEWTON_SCHULZ, rounds, scale)
    return orthogonalize_ref(x, rounds, scale)


def orthogonalize_ref(x: Tensor, rounds: int, scale: float) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[1] <= x.shape[2]
    gram, product = (x @ x.mT if wide else x.mT @ x), None
    inverse = 1 / (gram.diagonal(dim1=1, dim2=2).sum(1).sqrt() + 1e-7)[:, None, None]
    gram *= inverse * inverse
    for i in range(rounds):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if i + 1 < rounds:
            gram = polynomial @ gram @ polynomial
    product = product * (scale * inverse)
    return product @ x if wide else x @ product


if native_available():

    @torch.library.register_fake("proxt2i::orthogonalize")
    def _(x, a, b, c, rounds, scale):
        return x.new_empty(x.shape)
