"""Attention on packed queries, keys and values, as the U-ViT's one projection makes them.

    out = softmax(q k^T / sqrt(D)) v        for every image and head, over the first key_lengths[b] tokens

With weights, q and k are RMS-normalised over each head first (QK-norm): q -> q_weight q / sqrt(mean(q^2) + norm_eps).

Three implementations: `ref` (plain torch, exact in the input's dtype), `sdpa` (torch's scaled_dot_product_attention with whatever backend it
picks; on GPUs after csrc/cuda/qkv_norm.cu, if there are weights) and `native`: on GPUs csrc/cuda/attention_*.cu (bfloat16 and float16, heads of 64,
72 and 128), on CPUs csrc/cpu/attention.cpp (heads of a multiple of 16; bfloat16 has other bits where the CPU multiplies it, with the
instruction set "avx512_bf16"). On a GPU `attention_table.json`, written by benchmarks/attention.py from measurements, says which of the last two a shape gets;
what it does not name is torch's. On a CPU short sequences are native.
"""

import functools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from proxt2i.ops.checks import FLOATS
from proxt2i.ops.native import CPU_IS_FAST, native_available

TABLE = Path(__file__).with_name("attention_table.json")
HEAD_DIMS = (64, 72, 128)
HALVES = (torch.bfloat16, torch.float16)
CPU_TOKENS = 256  # up to here the native CPU kernels are preferred: a head's scores fit into the cache
IMPLS = (None, "native", "sdpa", "ref")


def attention(qkv: torch.Tensor, *, key_lengths: torch.Tensor | None = None, num_queries: int | None = None,
              q_weight: torch.Tensor | None = None, k_weight: torch.Tensor | None = None, norm_eps: float = 1e-6,
              impl: str | None = None) -> torch.Tensor:
    """qkv [B, N, 3, H, D] -> [B, M, H, D] in its dtype: the last M = num_queries of the N tokens ask (None: all), keys are all.

    key_lengths: int64 [B]; only the first key_lengths[b] tokens of image b are attended to (None: all N). A length of 0 gives zeros.
    q_weight, k_weight: [D], both or neither; any float dtype.  Differentiable in qkv and the weights.
    impl: None picks the faster of "native" and "sdpa" by the table; a name insists.
    ValueError for a wrong shape, num_queries outside 0 ... N, or impl="native" for what the kernels do not take.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape [B, N, 3, H, D], not {list(qkv.shape)}")
    batch, tokens = qkv.shape[:2]
    num_queries = tokens if num_queries is None else num_queries
    if not 0 <= num_queries <= tokens:
        raise ValueError(f"num_queries={num_queries} must lie in 0 ... {tokens}, the number of tokens")
    if key_lengths is not None and (key_lengths.dtype != torch.int64 or tuple(key_lengths.shape) != (batch,)):
        raise ValueError(f"key_lengths must be int64 [{batch}], not {key_lengths.dtype} {list(key_lengths.shape)}")
    if (q_weight is None) != (k_weight is None) or (q_weight is not None and k_weight is not None and not q_weight.shape == k_weight.shape == qkv.shape[-1:]):
        raise ValueError(f"q_weight and k_weight must both be given with shape [{qkv.shape[-1]}], or neither")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, not {impl!r}")
    impl = impl or preferred(qkv)
    if impl == "native":
        problem = why_not_native(qkv)
        if problem:
            raise ValueError(f"impl='native': {problem}")
        state = qkv.dtype if qkv.dtype == torch.float64 else torch.float32
        weights = [None if weight is None else weight.to(state).contiguous() for weight in (q_weight, k_weight)]
        return torch.ops.proxt2i.attention_forward(qkv.contiguous(), key_lengths, *weights, num_queries, qkv.shape[-1] ** -0.5, norm_eps)[0]
    return (attention_ref if impl == "ref" else _sdpa)(qkv, key_lengths, num_queries, q_weight, k_weight, norm_eps)


def attention_ref(qkv, key_lengths, num_queries, q_weight=None, k_weight=None, norm_eps=1e-6):
    """The definition, product by product."""
    q, k, v = _heads(qkv, num_queries, q_weight, k_weight, norm_eps)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(qkv.shape[-1])
    if key_lengths is not None:
        scores = scores.masked_fill(~_attended(qkv, key_lengths), -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def _sdpa(qkv, key_lengths, num_queries, q_weight, k_weight, norm_eps):
    if q_weight is not None and fuses_norm(qkv):
        state = [weight.float().contiguous() for weight in (q_weight, k_weight)]
        q, k, v = (part.transpose(1, 2) for part in torch.ops.proxt2i.qkv_norm(qkv.contiguous(), *state, norm_eps))
        q = q[:, :, q.shape[2] - num_queries :]
    else:
        q, k, v = _heads(qkv, num_queries, q_weight, k_weight, norm_eps)
    mask = None if key_lengths is None else _attended(qkv, key_lengths)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if key_lengths is not None:
        out = out.masked_fill((key_lengths == 0)[:, None, None, None], 0.0)
    return out.transpose(1, 2)


def _heads(qkv, num_queries, q_weight, k_weight, norm_eps):
    """q, k, v as [B, H, tokens, D], q and k normalised if there are weights."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    q = q[:, :, q.shape[2] - num_queries :]
    if q_weight is not None:
        q, k = (F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), norm_eps) for x, weight in ((q, q_weight), (k, k_weight)))
    return q, k, v


def _attended(qkv, key_lengths):
    return (torch.arange(qkv.shape[1], device=qkv.device) < key_lengths[:, None])[:, None, None]


def why_not_native(qkv: torch.Tensor) -> str | None:
    """What keeps the native kernels from this input, or None."""
    if not native_available(qkv.device.type):
        return f"the native kernels are not built for {qkv.device.type}"
    if qkv.device.type == "cpu":
        fits = qkv.dtype in FLOATS and qkv.shape[-1] % 16 == 0 and qkv.shape[-1] > 0
        return None if fits else f"on a CPU the native kernels take float tensors and heads of a multiple of 16, not {qkv.dtype} and {qkv.shape[-1]}"
    if qkv.dtype not in HALVES or qkv.shape[-1] not in HEAD_DIMS:
        return f"the native kernels take bfloat16 or float16 and heads of {HEAD_DIMS}, not {qkv.dtype} and {qkv.shape[-1]}"
    return None


def fuses_norm(qkv: torch.Tensor) -> bool:
    """Whether queries and keys are normalised by our kernel before torch's attention: on GPUs, where torch.compile does not see to it."""
    return qkv.device.type == "cuda" and not torch.compiler.is_compiling() and why_not_native(qkv) is None


def preferred(qkv: torch.Tensor) -> str:
    """"native" on a CPU up to CPU_TOKENS tokens, and where the table says that it was faster on this kind of GPU at the nearest measured
    number of tokens, else "sdpa"."""
    if why_not_native(qkv):
        return "sdpa"
    if qkv.device.type == "cpu":
        return "native" if CPU_IS_FAST and qkv.dtype != torch.float64 and qkv.shape[1] <= CPU_TOKENS else "sdpa"
    return _measured(qkv.device.index, qkv.shape[-1], qkv.shape[1])


@torch.compiler.assume_constant_result  # asked while torch.compile traces, not traced
def _measured(device: int | None, dim: int, tokens: int) -> str:
    rows = _table().get(torch.cuda.get_device_name(device), {}).get(str(dim), {})
    return rows[min(rows, key=lambda measured: abs(math.log(int(measured) / tokens)))] if rows else "sdpa"


@functools.cache
def _table() -> dict:
    """{device name: {head dim: {tokens: "native" or "sdpa"}}}"""
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {}


if native_available():

    @torch.library.register_fake("proxt2i::attention_forward")
    def _(qkv, key_lengths, q_weight, k_weight, num_queries, scale, norm_eps):
        batch, _, _, heads, dim = qkv.shape
        state = torch.float64 if qkv.dtype == torch.float64 else torch.float32
        return qkv.new_empty((batch, num_queries, heads, dim)), qkv.new_empty((batch, heads, num_queries), dtype=state)

    @torch.library.register_fake("proxt2i::attention_backward")
    def _(grad_out, qkv, out, lse, key_lengths, q_weight, k_weight, scale, norm_eps):
        blocks = [1, 1] if qkv.device.type == "cpu" else [0 if out.shape[1] == 0 else 4 * -(-n // 64) for n in (out.shape[1], qkv.shape[1])]
        rows = [0 if q_weight is None else qkv.shape[0] * qkv.shape[3] * n for n in blocks]
        return torch.empty_like(qkv), *(lse.new_empty((n, qkv.shape[-1])) for n in rows)

    @register_flop_formula(torch.ops.proxt2i.attention_forward)
    def _(qkv_shape, key_lengths, q_weight, k_weight, num_queries, *args, **kwargs):
        batch, tokens, _, heads, dim = qkv_shape
        return 4 * batch * heads * num_queries * tokens * dim

    @register_flop_formula(torch.ops.proxt2i.attention_backward)
    def _(grad_out_shape, qkv_shape, *args, **kwargs):  # without the scores that are computed again, as is the custom
        batch, queries, heads, dim = grad_out_shape
        return 8 * batch * heads * queries * qkv_shape[1] * dim

    @torch.library.register_fake("proxt2i::qkv_norm")
    def _(qkv, q_weight, k_weight, norm_eps):
        batch, tokens, _, heads, dim = qkv.shape
        return tuple(qkv.new_empty((batch, tokens, heads, dim)) for _ in range(3))

    @torch.library.register_fake("proxt2i::qkv_norm_backward")
    def _(grad_q, grad_k, grad_v, qkv, q_weight, k_weight, norm_eps):
        heads = qkv.shape[0] * qkv.shape[1] * 3 * qkv.shape[3]
        blocks = min(1024, -(-heads // (32 if qkv.shape[4] <= 64 else 16)))
        return torch.empty_like(qkv), *(q_weight.new_empty((blocks, qkv.shape[4])) for _ in range(2))

    def _norm_setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.norm_eps = inputs[3]

    def _norm_backward(ctx, grad_q, grad_k, grad_v):
        grad_qkv, *of_weights = torch.ops.proxt2i.qkv_norm_backward(grad_q, grad_k, grad_v, *ctx.saved_tensors, ctx.norm_eps)
        return grad_qkv, *(partial.sum(0) for partial in of_weights), None

    torch.library.register_autograd("proxt2i::qkv_norm", _norm_backward, setup_context=_norm_setup)

    def _setup(ctx, inputs, output):
        qkv, key_lengths, q_weight, k_weight, _, *ctx.numbers = inputs
        ctx.save_for_backward(qkv, *output, key_lengths, q_weight, k_weight)

    def _backward(ctx, grad_out, _):
        qkv, out, lse, key_lengths, q_weight, k_weight = ctx.saved_tensors
        grad_qkv, *of_weights = torch.ops.proxt2i.attention_backward(grad_out.contiguous(), qkv, out, lse, key_lengths, q_weight, k_weight,
                                                                     *ctx.numbers)
        of_weights = [None, None] if q_weight is None else [partial.sum(0) for partial in of_weights]
        return grad_qkv, None, *of_weights, None, None, None

    torch.library.register_autograd("proxt2i::attention_forward", _backward, setup_context=_setup)
