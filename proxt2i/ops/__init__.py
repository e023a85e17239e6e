"""Native operators, each beside its plain-torch reference."""

from proxt2i.ops.attention import attention
from proxt2i.ops.gelu import gelu
from proxt2i.ops.linear import linear
from proxt2i.ops.matching import noised_pair, prox_matching_loss
from proxt2i.ops.native import native_available
from proxt2i.ops.philox import philox_normal
from proxt2i.ops.prox_step import prox_step, step_row
from proxt2i.ops.transition import guided_eps, transition_log_ratio

__all__ = ["attention", "gelu", "guided_eps", "linear", "native_available", "noised_pair", "philox_normal", "prox_matching_loss", "prox_step",
           "step_row", "transition_log_ratio"]
