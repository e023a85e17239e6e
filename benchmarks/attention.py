"""Times the native attention against every backend of torch's scaled_dot_product_attention, forward and forward + backward.

    python benchmarks/attention.py [--tokens 463 1231] [--dims 72 64 128] [--repeats 20] [--device cuda] [--out FILE.json] [--write-table]

Shapes are U-ViT-H's: 16 heads, 463 tokens at 256 x 256 and 1231 at 512 x 512, bfloat16, and a batch at which a forward takes more than
1 ms. All get the packed qkv of the model's one projection and give its gradient; "separate" rows are the SDPA backends on contiguous
q, k and v with a gradient each, as a model with three projections would have them. With QK-norm the opponents normalise by
torch.nn.functional.rms_norm. TFLOP/s count 4 B H N N D for the forward and 3.5 times that for forward + backward; times are medians.

Ours are two: "native", our attention kernels, and "sdpa", torch's own choice of a backend, after our qkv_norm kernel if there is QK-norm.
`--write-table` puts "native" into proxt2i/ops/attention_table.json where its forward + backward is the faster of the two
both with and without QK-norm, else "sdpa"; it keeps what the table says of other devices, head sizes and numbers of tokens.
"""

import argparse
import json
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import medians
from torch.nn.attention import SDPBackend, sdpa_kernel

from proxt2i.ops import attention
from proxt2i.ops.attention import TABLE, attention_ref

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SHAPES = [(463, 72), (1231, 72), (463, 64), (1231, 64), (463, 128), (1231, 128)]
OURS = ("native", "ref", "sdpa")
HEADS, MIN_SECONDS, MAX_ERROR = 16, 1e-3, 2e-2


def sdpa(q, k, v, weights, backend):
    """q, k, v [B, H, N, D] -> [B, N, H, D], with QK-norm as plain torch has it."""
    if weights:
        q, k = (F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6) for x, weight in zip((q, k), weights))
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def candidates(qkv: torch.Tensor, weights: list[torch.Tensor], device: str) -> dict:
    """name -> (function of its leaves, the leaves): ours first, then every backend, packed and separate."""
    pair = ("q_weight", "k_weight")
    native = "native" if device == "cuda" else "ref"  # a dry run has no native kernels
    found = {name: (lambda qkv, *w, name=name: attention(qkv, impl=name, **dict(zip(pair, w))), [qkv, *weights]) for name in (native, "sdpa")}
    separate = [part.transpose(1, 2).detach().contiguous().requires_grad_() for part in qkv.unbind(2)]
    for name, backend in (BACKENDS if device == "cuda" else {"math": SDPBackend.MATH}).items():
        def packed(qkv, *w, backend=backend):
            return sdpa(*(part.transpose(1, 2) for part in qkv.unbind(2)), w, backend)

        def apart(q, k, v, *w, backend=backend):
            return sdpa(q, k, v, w, backend)

        found[name] = (packed, [qkv, *weights])
        found[f"{name}, separate"] = (apart, [*separate, *weights])
    return found


def usable(found: dict) -> tuple[dict, dict]:
    """The candidates that can do this forward and backward, and why the others cannot."""
    good, refused = {}, {}
    for name, (function, leaves) in found.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a backend that refuses says why in warnings, and then raises
                out = function(*leaves)
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            good[name] = (function, leaves)
        except RuntimeError as error:
            if name in OURS:
                raise
            refused[name] = str(error).strip().split("\n")[0][:200]
    return good, refused


def relative_error(function, leaves, qkv, weights) -> float:
    """|ours - exact| / |exact| of the first two images, the larger of output's and qkv's gradient's; exact: float32 arithmetic."""
    results = []
    for run, dtype in ((function, qkv.dtype), (lambda x, *w: attention_ref(x, None, x.shape[1], *w), torch.float32)):
        leaf = qkv[:2].detach().to(dtype, copy=True).requires_grad_()
        out = run(leaf, *(w.detach() for w in weights))
        grad = torch.autograd.grad((out.float() * torch.linspace(-1, 1, out.shape[-1], device=out.device)).sum(), leaf)[0]
        results.append([out.detach().float(), grad.float()])
    return max(float((ours - exact).norm() / exact.norm()) for ours, exact in zip(*results))


def choose_batch(tokens: int, dim: int, heads: int, device: str) -> int:
    """The smallest power of two whose forward by torch's own choice takes more than 1 ms, as far as the free memory allows."""
    if device == "cpu":
        return 2
    batch, free = 4, torch.cuda.mem_get_info()[0]
    while True:
        q, k, v = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=torch.bfloat16).transpose(1, 3).unbind(2)
        seconds = medians({"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}, device, 5)["sdpa"]
        if seconds > MIN_SECONDS or 15 * (3 * q.nbytes) > free / 2:  # all candidates together hold about 15 times qkv
            return batch
        batch *= 2


def measure(tokens: int, dim: int, device: str, repeats: int = 20, heads: int = HEADS) -> dict:
    """All figures of one shape: {"batch": ..., "plain": {...}, "qk-norm": {...}, "choice": "native" or "sdpa"}."""
    batch = choose_batch(tokens, dim, heads, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    flops = 4 * batch * heads * tokens**2 * dim
    result = {"tokens": tokens, "dim": dim, "heads": heads, "batch": batch, "dtype": str(dtype)}
    for norm in ("plain", "qk-norm"):
        torch.manual_seed(0)
        qkv = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=dtype).requires_grad_()
        weights = [(torch.rand(dim, device=device) + 0.5).requires_grad_() for _ in range(2)] if norm == "qk-norm" else []
        good, refused = usable(candidates(qkv, weights, device))
        native = next(iter(good))
        grad = torch.randn(batch, tokens, heads, dim, device=device, dtype=dtype)
        forward = {name: lambda f=f, leaves=[x.detach() for x in leaves]: f(*leaves) for name, (f, leaves) in good.items()}
        both = {name: lambda f=f, leaves=leaves: torch.autograd.grad(f(*leaves), leaves, grad) for name, (f, leaves) in good.items()}
        seconds = {"forward": medians(forward, device, repeats), "both": medians(both, device, repeats)}
        packed = {kind: {n: s for n, s in times.items() if n not in OURS and "separate" not in n} for kind, times in seconds.items()}
        result[norm] = {
            "ms": {kind: {name: 1e3 * s for name, s in times.items()} for kind, times in seconds.items()},
            "tflops": {kind: {name: factor * flops / s / 1e12 for name, s in seconds[kind].items()}
                       for kind, factor in (("forward", 1), ("both", 3.5))},
            "refused": refused, "error": max(relative_error(*good[name], qkv, weights) for name in (native, "sdpa")),
            "best": {kind: min(times, key=times.get, default=None) for kind, times in packed.items()},
            "speedup": {kind: {name: min(times.values()) / seconds[kind][name] for name in (native, "sdpa")} if times else {} for kind, times in packed.items()}}
    result["choice"] = choice(result)
    return result


def choice(result: dict) -> str:
    """ "native" only where it is right, and faster in forward + backward than torch's choice, with and without QK-norm."""
    good = all(result[norm]["error"] <= MAX_ERROR and next(iter(result[norm]["ms"]["both"].values())) < result[norm]["ms"]["both"]["sdpa"]
               for norm in ("plain", "qk-norm"))
    return "native" if good else "sdpa"


def merge_table(path: Path, device_name: str, results: list[dict]) -> dict:
    """Writes the choices into the table of proxt2i.ops.attention, keeping every row that was not measured now; returns the table."""
    table = json.loads(path.read_text()) if path.is_file() else {}
    for result in results:
        rows = table.setdefault(device_name, {}).setdefault(str(result["dim"]), {})
        rows[str(result["tokens"])] = result["choice"]
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    os.replace(staged, path)
    return table


def describe(result: dict) -> str:
    """One line: TFLOP/s and speed-up over the best backend of native and of sdpa, forward and forward + backward, plain and with QK-norm."""
    def part(norm, kind):
        speedup, best = result[norm]["speedup"][kind], result[norm]["best"][kind]
        return f"{norm} {kind} " + ", ".join(f"{name} {result[norm]['tflops'][kind][name]:.0f} TFLOP/s = {ratio:.2f}x {best}" for name, ratio in speedup.items())
    return "; ".join(part(norm, kind) for norm in ("plain", "qk-norm") for kind in ("forward", "both")) + f" -> {result['choice']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[463, 1231])
    parser.add_argument("--dims", type=int, nargs="+", default=[72, 64, 128], help="head sizes")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="cpu: only to try the script; plain torch stands in for native")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--write-table", action="store_true", help=f"merge the choices into {TABLE.name}, which `attention` reads")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if args.device == "cpu" and args.write_table:
        parser.error("--write-table needs measurements on a GPU")
    results = []
    for dim in args.dims:
        for tokens in args.tokens:
            results.append(measure(tokens, dim, args.device, args.repeats, args.heads))
            print(f"N={tokens} D={dim} B={results[-1]['batch']}: {describe(results[-1])}", flush=True)
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"device": device_name, "torch": torch.__version__, "results": results}, indent=2) + "\n")
    if args.write_table:
        merge_table(TABLE, device_name, results)


if __name__ == "__main__":
    main()
