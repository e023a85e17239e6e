"""Times the fused proximal step against the same step in eager torch and against diffusers' DDIM step, in one process.

    python benchmarks/prox_step.py [--shape 8 16 64 64] [--threads 2] [--repeats 60] [--device cpu] [--cpu-time] [--out FILE.json]

fused  proxt2i.ops.prox_step as the sampler calls it: guidance, prox, next state and counter-based noise in one pass; x itself is not
       wanted
both   the same, and x
eager  the same step as one writes it in torch: torch.randn and elementwise operations
ddim   the same guidance, then diffusers' DDIMScheduler.step with eta=1; left out where diffusers is not installed

They take turns, so that other work on the machine hits them alike; times are medians. GB/s counts what a step must move
(y and both network outputs read, the next y written) for all. Ratios are times divided by the fused step's.
"""

import random
import statistics
import time

import torch
from timing import operator_arguments, ran_on, write_result

from proxt2i.ops import prox_step, step_row

GUIDANCE, SQRT_LAM, A, B = 2.0, 0.8, 1.2, 0.6


def make_steps(shape: tuple[int, ...], device: str) -> dict:
    """name -> function of no arguments that does one step on tensors of this shape."""
    y, eps_cond, eps_uncond = (torch.randn(shape, device=device) for _ in range(3))
    seeds = torch.arange(shape[0], device=device)
    row = torch.tensor(step_row(SQRT_LAM, guidance_scale=GUIDANCE, a=A, b=B, draw=1), dtype=torch.float64, device=device)

    def fused():
        return prox_step(y, eps_cond, eps_uncond, row, seeds=seeds, want_x=False, impl="native")

    def both():
        return prox_step(y, eps_cond, eps_uncond, row, seeds=seeds, impl="native")

    def eager():
        eps = eps_uncond + GUIDANCE * (eps_cond - eps_uncond)
        x = y - SQRT_LAM * eps
        return x, A * x + B * torch.randn_like(x)

    return {"fused": fused, "both": both, "eager": eager}


def ddim_step(shape: tuple[int, ...], device: str) -> dict:
    """The same of diffusers' step; nothing where diffusers is not installed."""
    try:
        from diffusers import DDIMScheduler
    except ImportError:
        return {}
    y, eps_cond, eps_uncond = (torch.randn(shape, device=device) for _ in range(3))
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(8)
    timestep = int(scheduler.timesteps[3])
    return {"ddim": lambda: scheduler.step(eps_uncond + GUIDANCE * (eps_cond - eps_uncond), timestep, y, eta=1.0)}


def measure(steps: dict, repeats: int, device: str, cpu_time: bool = False) -> dict[str, list[float]]:
    """Seconds of each call, the steps taking turns in an order that changes: each finds in the caches what the one before left there. cpu_time: of this thread at work alone, see timing.operator_arguments."""
    clock = time.thread_time if cpu_time else time.perf_counter
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times, order, rng = {name: [] for name in steps}, list(steps), random.Random(0)
    for repeat in range(-3, repeats):
        rng.shuffle(order)
        for name in order:
            wait()
            start = clock()
            steps[name]()
            wait()
            if repeat >= 0:
                times[name].append(clock() - start)
    return times


def main():
    args = operator_arguments(__doc__, repeats=60)
    with torch.no_grad():
        steps = make_steps(tuple(args.shape), args.device) | ddim_step(tuple(args.shape), args.device)
        times = measure(steps, args.repeats, args.device, args.cpu_time)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    num_bytes = 4 * 4 * torch.Size(args.shape).numel()
    result = ran_on(args) | {
        "median_ms": {name: 1e3 * value for name, value in seconds.items()},
        "min_ms": {name: 1e3 * min(values) for name, values in times.items()},
        "gb_per_s": {name: num_bytes / value / 1e9 for name, value in seconds.items()},
        "ratio": {name: seconds[name] / seconds["fused"] for name in seconds if name != "fused"},
    }
    for name in times:
        ratio = f"   {result['ratio'][name]:5.1f}x the fused step" if name in result["ratio"] else ""
        print(f"{name:6s} {result['median_ms'][name]:8.3f} ms  (best {result['min_ms'][name]:.3f})  "
              f"{result['gb_per_s'][name]:6.2f} GB/s{ratio}")
    write_result(args.out, result)


if __name__ == "__main__":
    main()
