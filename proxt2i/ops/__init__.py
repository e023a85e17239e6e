"""Native operators, each beside its plain-torch reference."""

from proxt2i.ops.native import native_available
from proxt2i.ops.philox import philox_normal
from proxt2i.ops.prox_step import coefficients, prox_step

__all__ = ["coefficients", "native_available", "philox_normal", "prox_step"]
