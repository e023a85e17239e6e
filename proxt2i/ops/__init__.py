"""Native operators, each beside its plain-torch reference."""

from proxt2i.ops.matching import noised_pair, prox_matching_loss
from proxt2i.ops.native import native_available
from proxt2i.ops.philox import philox_normal
from proxt2i.ops.prox_step import prox, prox_step
from proxt2i.ops.transition import guided_eps, transition_log_ratio

__all__ = ["guided_eps", "native_available", "noised_pair", "philox_normal", "prox", "prox_matching_loss", "prox_step",
           "transition_log_ratio"]
