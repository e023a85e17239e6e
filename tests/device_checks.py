"""Checks of every native operator on a device, as plain functions: nothing but torch and proxt2i is needed, so that they also run on
machines without pytest and under compute-sanitizer (`python tests/device_checks.py cuda --tiny`).

Each takes a Target and raises AssertionError. The truth is the CPU kernels, whose bits every operator but attention must give, and for
attention exact arithmetic in float64. Inputs are made and results compared on the CPU: what the device runs is our kernels.
tests/test_device_checks.py and tests/emulated/test_device_checks.py hand them to pytest, the latter on the emulated CUDA kernels.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass

import torch

from proxt2i import _C, diffusion  # noqa: F401  (_C registers torch.ops.proxt2i.*)
from proxt2i.diffusion import CudaGraphs, make_plan, trajectory
from proxt2i.ops import attention, guided_eps, noised_pair, prox_matching_loss, prox_step, step_row, transition_log_ratio
from proxt2i.ops.attention import attention_ref

CPU = torch.ops.proxt2i
STEP = step_row(0.8, guidance_scale=2.5, a=1.2, b=0.6, clean_y=1.1, clean_eps=0.7, memory=0.4, draw=2**33 + 1)
TYPES = [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
# One element; an odd number; chunks of 512 and their neighbours; more elements than a block has threads; images with dimensions.
SHAPES = [(0, 3), (3, 0), (2, 1), (2, 511), (3, 513), (2, 4, 700), (2, 5000)]
TINY_SHAPES = [(3, 513), (2, 4, 700)]  # every kernel runs, with whole and partial chunks: a sanitizer makes a launch cost many milliseconds
LARGE_SHAPES = [(3, 300_001), (2, 16, 96, 96), (70_000, 5)]  # striding blocks; more images than a grid has rows


class NotHere(Exception):
    """A check that this target has no means for; the message says why."""


@dataclass(frozen=True)
class Target:
    """Operators and the device of their tensors; `small` leaves out what is slow in the emulator, `tiny` (with small) all but a few sizes besides."""

    ops: object
    device: str
    small: bool = False
    tiny: bool = False

    @property
    def shapes(self):
        return TINY_SHAPES if self.tiny else SHAPES if self.small else SHAPES + LARGE_SHAPES

    def call(self, name, *arguments):
        """The operator on copies of CPU tensors; its results on the CPU."""
        results = getattr(self.ops, name)(*(a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments))
        return [r.cpu() for r in ((results,) if isinstance(results, torch.Tensor) else results)]

    def check_bits(self, name, *arguments):
        """The operator gives the CPU kernels' bits, from aligned tensors and from ones that start an element behind an aligned address."""
        expected = getattr(CPU, name)(*arguments)
        expected = (expected,) if isinstance(expected, torch.Tensor) else expected
        for shift in (0, 1):
            given = [self.shifted(a, shift) if isinstance(a, torch.Tensor) else a for a in arguments]
            ours = getattr(self.ops, name)(*given)
            assert_same_bits((ours,) if isinstance(ours, torch.Tensor) else ours, expected, name)

    def shifted(self, tensor, shift):
        if shift == 0 or not tensor.is_floating_point():
            return tensor.to(self.device)
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=self.device)[1:].view(tensor.shape).copy_(tensor)

    def needs_cuda(self, what):
        if not self.device.startswith("cuda"):
            raise NotHere(f"{what} is CUDA's")


def assert_same_bits(ours, theirs, what=""):
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        mine = mine.cpu()
        assert mine.dtype == other.dtype and mine.shape == other.shape, f"{what} [{i}]: {mine.dtype} {tuple(mine.shape)}"
        numbers = ~mine.isnan()  # the bits of a NaN are nobody's promise
        assert torch.equal(numbers, ~other.isnan()), f"{what} [{i}]: NaNs differ"
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[mine.dtype.itemsize]
        different = int((mine.contiguous().view(bits)[numbers] != other.contiguous().view(bits)[numbers]).sum())
        assert different == 0, \
            f"{what} [{i}] {tuple(mine.shape)} {mine.dtype}: {different} of {mine.numel()} elements differ from the CPU's"


def tensors(shape, dtype, eps_dtype):
    """y-like, noise-like and three outputs of networks (two in eps_dtype); seeds and steps; three numbers an image."""
    generator = torch.Generator().manual_seed(len(shape))
    y, noise, old, cond, uncond = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(5))
    seeds, steps = (torch.randint(low, 2**62, shape[:1], generator=generator) for low in (-(2**62), 0))
    numbers = torch.rand(shape[0], 3, generator=generator, dtype=dtype) + 0.5
    return y, noise, old, cond.to(eps_dtype), uncond.to(eps_dtype), seeds, steps, numbers


# ---- the same bits as the CPU kernels --------------------------------------------------------------------------------------

def check_philox_normal(target):
    for count in (1027,) if target.tiny else (1, 4, 1027, 5000) if target.small else (1, 4, 1027, 5000, 3_000_001):
        target.check_bits("philox_normal", torch.tensor([3, -5, 2**62]), 2**33 + 5, count)


def check_prox_step(target):
    for shape, (dtype, eps_dtype) in itertools.product(target.shapes, TYPES):
        y, noise, before, cond, uncond, seeds, _, _ = tensors(shape, dtype, eps_dtype)
        one = torch.tensor(STEP, dtype=torch.float64)
        each = one.repeat(shape[0], 1)
        each[::2, 3] = 0  # every other image draws nothing
        for i, (guided, (given, drawn)) in enumerate(itertools.product((uncond, None), ((noise, None), (None, seeds)))):
            wanted = [(True, True, True), (True, False, False), (False, True, False)][i % 3]
            target.check_bits("prox_step", y, cond, guided, before if i % 2 else None, given, drawn, each if i > 1 else one, *wanted)


def check_transition_log_ratio(target):
    for shape, (dtype, eps_dtype) in itertools.product(target.shapes, TYPES):
        ref, noise, old, cond, uncond, seeds, steps, numbers = tensors(shape, dtype, eps_dtype)
        scale, *grads = (column.contiguous() for column in numbers.T)
        drawn, given = (None, seeds, steps), (noise, None, None)
        for guided, reference, z in ((uncond, ref, drawn), (None, ref, given), (uncond, None, given)):
            arguments = (cond, guided, old, reference, *z, scale, 2.5)
            target.check_bits("transition_log_ratio", *arguments)
            target.check_bits("transition_log_ratio_backward", *grads, *arguments)


def check_guided_eps(target):
    for shape, (dtype, eps_dtype) in itertools.product(target.shapes, TYPES):
        _, _, _, cond, uncond, *_ = tensors(shape, dtype, eps_dtype)
        target.check_bits("guided_eps", cond, uncond, 2.5)


def check_matching(target):
    for shape, (dtype, eps_dtype) in itertools.product(target.shapes, TYPES):
        x0, _, y, eps, _, seeds, _, coefficients = tensors(shape, dtype, eps_dtype)
        if eps_dtype == dtype:
            target.check_bits("noised_pair", x0, seeds, coefficients)
        grads = [column.contiguous() for column in coefficients.T[:2]]
        for draw in (None, 0, 1):
            arguments = (eps, x0 if draw is None else None, y if draw is None else None, seeds, coefficients, draw)
            target.check_bits("matching_errors", *arguments)
            target.check_bits("matching_errors_backward", *grads, *arguments)


# ---- attention -------------------------------------------------------------------------------------------------------------

ATTENTION_CASES = [  # tokens, heads, head dim, queries, key lengths
    (1, 1, 64, 1, None), (65, 1, 64, 30, [65, 64, 1]), (130, 2, 72, 66, None), (70, 1, 72, 70, [3, 70, 69]),
    (100, 1, 128, 100, [0, 37, 100]),
]
TINY_ATTENTION_CASES = [ATTENTION_CASES[1], ATTENTION_CASES[3], ATTENTION_CASES[4]]  # every head dim
LARGE_ATTENTION_CASES = [(463, 16, 72, 463, None), (463, 16, 72, 256, None), (1231, 4, 72, 1231, [1231, 900]), (463, 8, 64, 463, None),
                         (463, 8, 128, 463, [400, 463])]


def _attention_inputs(tokens, heads, dim, queries, lengths, dtype, normalised):
    batch = len(lengths or [0, 0])
    generator = torch.Generator().manual_seed(tokens)
    qkv = ((2 if normalised else 1) * torch.randn(batch, tokens, 3, heads, dim, generator=generator)).to(dtype)
    grad = torch.randn(batch, queries, heads, dim, generator=generator).to(dtype)
    weights = list((1 + 0.3 * torch.randn(2, dim, generator=generator)).unbind(0)) if normalised else []
    return qkv, grad, None if lengths is None else torch.tensor(lengths), weights


def _plain_attention(qkv, grad, lengths, weights, dtype, device):
    """Output and gradients of plain torch in `dtype`, on the CPU."""
    leaves = [t.to(device).to(dtype, copy=True).requires_grad_() for t in (qkv, *weights)]
    out = attention_ref(leaves[0], None if lengths is None else lengths.to(device), grad.shape[1], *leaves[1:])
    out.backward(grad.to(device, dtype))
    return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


def _our_attention(target, qkv, grad, lengths, weights):
    pair, scale = tuple(weights) or (None, None), qkv.shape[-1] ** -0.5
    out, lse = target.call("attention_forward", qkv, lengths, *pair, grad.shape[1], scale, 1e-6)
    grad_qkv, *partial = target.call("attention_backward", grad, qkv, out, lse, lengths, *pair, scale, 1e-6)
    return [out, grad_qkv, *(p.sum(0) for p in partial if weights)]


def _check_attention(target, normalised):
    """Forward and backward: at most twice the error of plain torch in the same dtype, and the same bits in a second run."""
    if not hasattr(target.ops, "attention_forward") or target.device == "cpu" and target.ops is CPU:
        raise NotHere("the attention kernels are CUDA's")
    truth_on = target.device if not target.small else "cpu"
    cases = TINY_ATTENTION_CASES if target.tiny else ATTENTION_CASES + ([] if target.small else LARGE_ATTENTION_CASES)
    for case, dtype in itertools.product(cases, (torch.bfloat16, torch.float16)):
        qkv, grad, lengths, weights = _attention_inputs(*case, dtype, normalised)
        ours = _our_attention(target, qkv, grad, lengths, weights)
        plain, true = (_plain_attention(qkv, grad, lengths, weights, kind, truth_on) for kind in (dtype, torch.float64))
        for name, mine, theirs, exact in zip(("out", "grad_qkv", "grad_q_weight", "grad_k_weight"), ours, plain, true):
            error, allowed = (mine.double() - exact).abs(), (theirs.double() - exact).abs()
            # plain torch is exact where there is one key or one row: never ask for less than a rounding of the largest
            floor = torch.finfo(dtype).eps * max(float(exact.abs().max()), 1e-2)
            assert error.max() <= max(2 * allowed.max(), floor) and error.mean() <= max(2 * allowed.mean(), floor / 10), \
                f"{case} {dtype} {name}: error {float(error.max()):.3g} (mean {float(error.mean()):.3g}), " \
                f"plain torch's {float(allowed.max()):.3g} ({float(allowed.mean()):.3g})"
        again = _our_attention(target, qkv, grad, lengths, weights)
        assert_same_bits(again, ours, f"{case} {dtype} second run")


def check_attention(target):
    _check_attention(target, normalised=False)


def check_attention_qk_norm(target):
    _check_attention(target, normalised=True)


def check_qkv_norm(target):
    """QK-norm beside torch's attention, forward and backward: at most twice the error of plain torch in the same dtype."""
    if not hasattr(target.ops, "qkv_norm") or target.device == "cpu" and target.ops is CPU:
        raise NotHere("qkv_norm is CUDA's")
    cases = [(3, 2, 64), (11, 3, 72), (5, 1, 128)] + ([] if target.small else [(463, 16, 72), (1231, 16, 128), (2000, 16, 64)])
    for (tokens, heads, dim), dtype in itertools.product(cases, (torch.bfloat16, torch.float16)):
        qkv, _, _, weights = _attention_inputs(tokens, heads, dim, 0, None, dtype, True)
        grads = [torch.randn(2, tokens, heads, dim, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]

        def plain(kind):
            leaves = [t.to(kind, copy=True).requires_grad_() for t in (qkv, *weights)]
            q, k, v = leaves[0].unbind(2)
            outputs = [torch.nn.functional.rms_norm(x, (dim,), weight, 1e-6) for x, weight in ((q, leaves[1]), (k, leaves[2]))] + [v]
            return [*outputs, *torch.autograd.grad(outputs, leaves, [grad.to(kind) for grad in grads])]

        grad_qkv, *partial = target.call("qkv_norm_backward", *grads, qkv, *weights, 1e-6)
        ours = [*target.call("qkv_norm", qkv, *weights, 1e-6), grad_qkv, *(p.sum(0) for p in partial)]
        for i, (mine, theirs, exact) in enumerate(zip(ours, plain(dtype), plain(torch.float64), strict=True)):
            error, allowed = (mine.double() - exact).abs().max(), (theirs.double() - exact).abs().max()
            floor = torch.finfo(dtype).eps * float(exact.detach().abs().max())
            assert error <= max(2 * allowed, floor), f"{tokens} x {heads} x {dim} {dtype} [{i}]: error {error:.3g}, plain torch's {allowed:.3g}"


# ---- what the operators are used through -----------------------------------------------------------------------------------

def check_autograd(target):
    """The Python faces with impl=None: values and gradients on the device are those of the CPU, to rounding."""
    if target.ops is not CPU:
        raise NotHere("the Python faces call the real operators")
    y, noise, old, cond, uncond, seeds, steps, numbers = tensors((3, 4, 129), torch.float32, torch.float32)

    def run(device):
        leaves = [t.to(device, copy=True).requires_grad_() for t in (cond, uncond, y)]
        at = [t.to(device) for t in (noise, old, seeds, steps, numbers)]
        ratio, kl = transition_log_ratio(leaves[0], leaves[1], at[1], at[0], scale=at[4][:, 0].contiguous(), guidance_scale=2.5,
                                         seeds=at[2], steps=at[3])
        loss, _ = prox_matching_loss(leaves[0], leaves[2].detach(), noised_pair(leaves[2], at[2], at[4]), at[2], at[4], target="expected")
        x, y_next, _ = prox_step(leaves[2], leaves[0], leaves[1], STEP, seeds=at[2])
        eps = guided_eps(leaves[0], leaves[1], 2.5)
        total = 0.01 * (ratio - kl).sum() + loss.sum() + (x * y_next).mean() + eps.square().mean()
        return [t.detach().cpu() for t in (ratio, kl, loss, x, y_next, eps, *torch.autograd.grad(total, leaves))]

    for ours, theirs in zip(run(target.device), run("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def check_attention_autograd(target):
    """The face with impl="native" through autograd, weights in float32 as autocast leaves them."""
    target.needs_cuda("the native attention")
    qkv, grad, _, weights = _attention_inputs(100, 2, 72, 60, None, torch.bfloat16, True)
    leaves = [t.to(target.device).requires_grad_() for t in (qkv, *weights)]
    out = attention(leaves[0], num_queries=60, q_weight=leaves[1], k_weight=leaves[2], impl="native")
    grads = torch.autograd.grad(out, leaves, grad.to(target.device))
    assert_same_bits([out.detach(), grads[0]], _our_attention(target, qkv, grad, None, weights)[:2], "attention through autograd")
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    # torch's softmax attention after our QK-norm
    fused = attention(leaves[0], num_queries=60, q_weight=leaves[1], k_weight=leaves[2], impl="sdpa")
    exact = _plain_attention(qkv, grad, None, weights, torch.float64, target.device)
    for mine, true in zip([fused, *torch.autograd.grad(fused, leaves, grad.to(target.device))], exact, strict=True):
        error = (mine.detach().cpu().double() - true).norm() / true.norm()
        assert error < 2e-2, f"sdpa after qkv_norm: relative error {error:.3g}"


def _step_arguments(device):
    y, _, _, cond, uncond, seeds, _, _ = tensors((4, 16, 24, 24), torch.float32, torch.float32)
    return [t.to(device) for t in (y, cond, uncond, seeds)]


def check_cuda_graph(target):
    """A captured step follows its coefficient row: replayed after the row has changed it does what the new row says."""
    target.needs_cuda("a graph")
    y, cond, uncond, seeds = _step_arguments(target.device)
    other, last = step_row(0.3, guidance_scale=1.5, a=0.9, b=0.2, draw=7), step_row(2.0, a=0.5)
    rows = [torch.tensor(row, dtype=torch.float64) for row in (STEP, other, last)]
    row = rows[0].to(target.device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is created at the first call must not be created during the capture
            prox_step(y, cond, uncond, row, seeds=seeds, impl="native")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = prox_step(y, cond, uncond, row, seeds=seeds, impl="native")[:2]
        for other in rows[1:] + rows[:1]:
            row.copy_(other)
            graph.replay()
            torch.cuda.synchronize()
            expected = prox_step(y.cpu(), cond.cpu(), uncond.cpu(), other, seeds=seeds.cpu(), impl="native")[:2]
            assert_same_bits(captured, expected, "replayed step")


class _Network(torch.nn.Module):
    """Something that is called as a U-ViT is."""

    def __init__(self):
        super().__init__()
        self.of_y, self.of_text = torch.nn.Linear(8, 8), torch.nn.Linear(6, 8)

    def forward(self, y, t, lam, text):
        scale = torch.rsqrt(1 + lam)[:, None, None]
        return self.of_y(y * scale).tanh() + self.of_text(text[0]).mean(1, keepdim=True) * t[:, None, None]


def check_network_graph(target):
    """diffusion.CudaGraphs: what the network computes, for every size, also after its weights have changed in place or moved."""
    target.needs_cuda("a graph")
    torch.manual_seed(0)
    network = _Network().to(target.device).requires_grad_(False)
    graphs = CudaGraphs(network, max_graphs=2)
    for round, batch in itertools.product(range(3), (1, 4, 3)):
        y, t, lam, text = (torch.randn(shape).abs().to(target.device) for shape in ((batch, 5, 8), (batch,), (batch,), (batch, 2, 6)))
        with torch.no_grad():
            if batch == 4:
                network.of_y.weight.mul_(1.5)
            elif batch == 3 and round == 1:
                network.of_y.weight.data = network.of_y.weight.data.clone()
            assert_same_bits([graphs(y, t, lam, [text])], [network(y, t, lam, [text]).cpu()], f"round {round}, batch {batch}")


def check_sampler_graph(target):
    """diffusion.CudaGraphs.trajectory: the bits of the sampler step by step, of other seeds, guidance, plans and texts, and of changed weights."""
    target.needs_cuda("a graph")
    torch.manual_seed(0)
    network = _Network().to(target.device).requires_grad_(False)
    graphs, null_text = CudaGraphs(network), [torch.zeros(1, 2, 6, device=target.device)]
    for round, (plan, scales) in itertools.product(range(2), itertools.product((make_plan("relaxed", 4), make_plan("hybrid", 4)), ([1.0, 1.0, 2.0, 2.0], [3.0] * 4))):
        text, seeds = [torch.randn(3, 2, 6).to(target.device)], torch.randint(2**62, (3,)).to(target.device)
        with torch.no_grad():
            network.of_y.weight.mul_(0.9)
            (*_, (i, _, whole)) = graphs.trajectory(diffusion.guided, "prox", text, null_text, plan, (5, 8), seeds, scales)
            *_, (_, _, steps) = trajectory(diffusion.guided(network, text, null_text), plan, (5, 8), seeds, guidance_scale=scales)
        assert i == 3
        assert_same_bits([whole], [steps.cpu()], f"round {round}, {plan.name}, {scales}")


def check_streams(target):
    """Kernels go to the current stream: a step on a side stream sees what was written there before, and two streams do not mix."""
    target.needs_cuda("a stream")
    y, cond, uncond, seeds = _step_arguments(target.device)
    row = torch.tensor(STEP, dtype=torch.float64, device=target.device)
    large = torch.zeros(64 << 20, device=target.device)  # its fills keep a stream busy for a while
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs, results = [torch.zeros_like(y) for _ in streams], []
    torch.cuda.synchronize()
    with torch.no_grad():
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                for _ in range(20):
                    large.fill_(i)
                inputs[i].copy_(y if i == 0 else -y)  # a kernel in another stream would still read zeros
                results.append(prox_step(inputs[i], cond, uncond, row, seeds=seeds, impl="native")[:2])
    torch.cuda.synchronize()
    for result, state in zip(results, (y, -y)):
        expected = prox_step(state.cpu(), cond.cpu(), uncond.cpu(), STEP, seeds=seeds.cpu(), impl="native")[:2]
        assert_same_bits(result, expected, "a step on a side stream")


def check_second_device(target):
    """Tensors of a device that is not the current one."""
    target.needs_cuda("a second device")
    if torch.cuda.device_count() < 2:
        raise NotHere("there is one device")
    with torch.cuda.device(0):
        check_autograd(Target(target.ops, "cuda:1"))
        check_attention_autograd(Target(target.ops, "cuda:1"))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
SANITIZED = {  # per tool of compute-sanitizer; graphs and streams need the caching allocator, which hides overruns from it
    "memcheck": ["philox_normal", "prox_step", "transition_log_ratio", "guided_eps", "matching", "attention", "attention_qk_norm", "qkv_norm"],
    "racecheck": ["attention", "attention_qk_norm", "qkv_norm"],
}


def plant_overrun(device):
    """A kernel of ours reads behind the end of its memory, which a sanitizer has to notice; for a process of its own."""
    cond = torch.zeros(1 << 23, device=device)  # 32 MiB: more than what may lie behind it by chance
    cond.untyped_storage().resize_(1 << 10)  # bytes: the tensor keeps its size
    CPU.guided_eps(cond, torch.zeros_like(cond), 2.5).sum().item()


def main():
    parser = argparse.ArgumentParser(description="run the checks on a device", epilog="exit status: 0 all passed, 1 otherwise")
    parser.add_argument("device", help="cuda, cuda:1 or cpu")
    parser.add_argument("--small", action="store_true", help="without the large shapes")
    parser.add_argument("--tiny", action="store_true", help="the fewest sizes that run every kernel, for sanitizers")
    parser.add_argument("--plant", action="store_true", help="no check: one kernel reads behind the end of its memory, for a sanitizer to find")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=", ".join(CHECKS))
    given = parser.parse_args()
    if given.plant:
        plant_overrun(given.device)
        return 0
    failures = 0
    for name in given.only:
        try:
            CHECKS[name](Target(CPU, given.device, given.small or given.tiny, given.tiny))
            print(f"{name}: passed", flush=True)
        except NotHere as reason:
            print(f"{name}: skipped, {reason}", flush=True)
        except Exception as error:
            failures += 1
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
