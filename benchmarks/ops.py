"""Times the fused training operators, forward and backward, against eager torch as one writes it, in one process.

    python benchmarks/ops.py [--shape 8 16 64 64] [--threads 2] [--repeats 40] [--device cpu] [--cpu-time] [--out FILE.json]

matching   a training example and its loss. fused: noised_pair and prox_matching_loss. eager: torch.randn for both noises, the noised
           latents, the expected noise, and the loss 1 - exp(-mse / zeta^2)
log-ratio  likelihood ratio of a transition (guided network outputs, noise drawn again from seeds) and the divergence from a reference
           network. fused: transition_log_ratio. eager: the means of the three networks, torch.distributions.Normal's log_prob of the
           stored next state under the new and the old one, kl_divergence from the third. "without kl": no reference network
gelu       of float32 and bfloat16 tensors, on a CPU alone. eager: torch.nn.functional.gelu
linear     "fc1" and "fc2" of the portraits network's MLPs on 64 images, 2,688 x 128 to 512 and back, and its long skip, 2 x 128 to 128, with float32
           weights and gradients of all there is, on a CPU alone, whatever --shape. eager: torch.nn.functional.linear, in bfloat16 under autocast
muon       orthogonalisation of the portraits network's 31 matrices, on a CPU alone. eager: the same polynomials by torch's batched products

Backward gives the gradients of the network outputs. Fused and eager take turns, so that other work on the machine hits them alike;
times are medians. Ratios are times divided by the fused one's.
"""

import statistics

import torch
from prox_step import measure
from timing import operator_arguments, ran_on, write_result
from torch.distributions import Normal, kl_divergence

from proxt2i.ops import gelu, linear, noised_pair, prox_matching_loss, transition_log_ratio
from proxt2i.ops.orthogonalize import orthogonalize

GUIDANCE, ZETA = 2.0, 1.0
A, B, RHO, SQRT_LAM = 1.2, 0.6, 1.0, 0.8


def matching(shape: tuple[int, ...], device: str, compiled: bool = False) -> dict:
    """name -> function of no arguments that makes an example, scores an answer and differentiates; compiled: by torch.compile too."""
    x0, eps = torch.randn(shape, device=device), torch.randn(shape, device=device, requires_grad=True)
    seeds = torch.arange(shape[0], device=device)
    coefficients = torch.tensor([0.8, 0.6, 0.9], device=device).repeat(shape[0], 1)
    columns = [column.reshape(-1, *[1] * (len(shape) - 1)) for column in coefficients.T]

    def fused():
        y = noised_pair(x0, seeds, coefficients, impl="native")
        loss, _ = prox_matching_loss(eps, x0, y, seeds, coefficients, target="expected", zeta=ZETA, impl="native")
        return torch.autograd.grad(loss.mean(), eps)

    def plain(eps, x0, signal, noise, prox):
        y = signal * x0 + noise * torch.randn_like(x0) + prox * torch.randn_like(x0)
        target = prox / (noise**2 + prox**2) * (y - signal * x0)
        return (1 - torch.exp(-(eps - target).square().flatten(1).mean(1) / ZETA**2)).mean()

    return {"fused": fused, **plain_versions(plain, (eps, x0, *columns), eps, compiled)}


def plain_versions(function, arguments, leaves, compiled: bool) -> dict:
    """A scalar function in plain torch and its gradient, eager and, if asked for, by torch.compile."""
    versions = {"eager": function} | ({"compiled": torch.compile(function)} if compiled else {})
    return {name: lambda f=f: torch.autograd.grad(f(*arguments), leaves) for name, f in versions.items()}


def log_ratio(shape: tuple[int, ...], device: str, with_kl: bool, compiled: bool = False) -> dict:
    """name -> function of no arguments that computes ratio (and kl) of a transition and differentiates; compiled: by torch.compile too."""
    y, eps_old, eps_ref = (torch.randn(shape, device=device) for _ in range(3))
    eps_cond, eps_uncond = (eps_old + 0.01 * torch.randn(shape, device=device) for _ in range(2))
    leaves = eps_cond.requires_grad_(), eps_uncond.requires_grad_()
    seeds, steps = torch.arange(shape[0], device=device), torch.ones(shape[0], dtype=torch.int64, device=device)
    scale = torch.full((shape[0],), A * RHO * SQRT_LAM / B, device=device)
    deviation = torch.tensor(B, device=device)  # from a number, Normal would copy it to the device at every call
    next_y = A * (y - RHO * SQRT_LAM * eps_old) + B * torch.randn(shape, device=device)

    def fused():
        ratio, kl = transition_log_ratio(eps_cond, eps_uncond, eps_old, eps_ref if with_kl else None, scale=scale,
                                         guidance_scale=GUIDANCE, seeds=seeds, steps=steps, impl="native")
        return torch.autograd.grad((ratio - 0.1 * kl).sum() if with_kl else ratio.sum(), leaves)

    def plain(eps_cond, eps_uncond, eps_old, eps_ref, y, next_y):
        eps = eps_uncond + GUIDANCE * (eps_cond - eps_uncond)
        new, old, ref = (Normal(A * (y - RHO * SQRT_LAM * e), deviation, validate_args=False) for e in (eps, eps_old, eps_ref))
        result = (new.log_prob(next_y) - old.log_prob(next_y)).flatten(1).sum(1)
        if with_kl:
            result = result - 0.1 * kl_divergence(new, ref).flatten(1).sum(1)
        return result.sum()

    return {"fused": fused, **plain_versions(plain, (*leaves, eps_old, eps_ref, y, next_y), leaves, compiled)}


def activation(shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    """name -> function of no arguments that applies GELU on the CPU and differentiates."""
    x, grad = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    return {name: lambda impl=impl: torch.autograd.grad(gelu(x, impl), x, grad) for name, impl in (("fused", "native"), ("eager", "torch"))}


def layer(inputs: int, outputs: int, beside: int, dtype: torch.dtype) -> dict:
    """name -> function of no arguments that applies a linear layer on the CPU and differentiates; beside: inputs of a long skip."""
    x, skip = (torch.randn(2688, width).to(dtype).requires_grad_() for width in (inputs, beside))
    weight, bias = torch.randn(outputs, inputs + beside).requires_grad_(), torch.randn(outputs).requires_grad_()
    grad, leaves = torch.randn(2688, outputs).to(dtype), [x, weight, bias, *[skip] * (beside > 0)]

    def run(impl):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            y = linear(x, weight, bias, skip if beside else None, impl=impl)
        return torch.autograd.grad(y, leaves, grad)

    return {"fused": lambda: run("native"), "eager": lambda: run("torch")}


def muon() -> dict:
    """name -> function of no arguments that orthogonalises on the CPU."""
    batches = [torch.randn(shape) for shape in ((7, 384, 128), (7, 128, 128), (7, 512, 128), (7, 128, 512), (3, 128, 256))]
    return {name: lambda impl=impl: [orthogonalize(batch, impl=impl) for batch in batches] for name, impl in (("fused", "native"), ("eager", "ref"))}


def main():
    args = operator_arguments(__doc__, repeats=40)
    shape = tuple(args.shape)
    cases = {"matching": matching(shape, args.device), "log-ratio": log_ratio(shape, args.device, True),
             "log-ratio without kl": log_ratio(shape, args.device, False)}
    if args.device == "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype)[6:]
            cases |= {f"gelu {name}": activation(shape, dtype), f"fc1 {name}": layer(128, 512, 0, dtype), f"fc2 {name}": layer(512, 128, 0, dtype),
                      f"skip {name}": layer(128, 128, 128, dtype)}
        cases["muon"] = muon()
    result = ran_on(args) | {"median_ms": {}, "min_ms": {}, "ratio": {}}
    for name, functions in cases.items():
        times = measure(functions, args.repeats, args.device, args.cpu_time)
        seconds = {key: statistics.median(values) for key, values in times.items()}
        result["median_ms"][name] = {key: 1e3 * value for key, value in seconds.items()}
        result["min_ms"][name] = {key: 1e3 * min(values) for key, values in times.items()}
        result["ratio"][name] = seconds["eager"] / seconds["fused"]
        print(f"{name:21s} fused {1e3 * seconds['fused']:8.3f} ms   eager {1e3 * seconds['eager']:8.3f} ms   "
              f"{result['ratio'][name]:5.1f}x")
    write_result(args.out, result)


if __name__ == "__main__":
    main()
