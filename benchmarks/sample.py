"""What the sampler costs beside the network, and against loops of diffusers' schedulers over the same network.

    python benchmarks/sample.py [--threads 1] [--repeats 5] [--large] [--device cuda] [--out FILE.json]

overhead   (time of N steps - time inside N network calls) / time of N steps, of the same run: guidance, prox, next state and noise.
against    images/s of `proxt2i.pipeline.sample_latents` divided by those of a diffusers pipeline's loop (concatenate, scale, predict, guide,
           step) with DDIM and DPM-Solver++ on the same U-ViT at as many network evaluations; they take turns, and the ratio is the
           median of the rounds' ratios. "default guidance": ours with the model's own guidance_below, whose unguided steps cost one
           evaluation instead of two; these are fewer evaluations.
           "one graph" (on a GPU): ours as `ProxT2IPipeline.enable_cuda_graphs` draws, all steps as one CUDA graph.
steps      the same without a network, at Stable Diffusion 3's latents 8x16x64x64: one step of each scheduler, guidance included.

--large adds U-ViT-H (506 M, random weights) on 16x32x32 latents with text of 77 + 128 tokens: 2 steps of one guided picture; takes minutes
and 3 GB.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from timing import write_result

from proxt2i import ProximalScheduler
from proxt2i.diffusion import CudaGraphs, guidance_scales, guided, trajectory
from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.models import build_uvit, load_bundle
from proxt2i.ops import native_available
from proxt2i.pipeline import plan_of, sample_latents

BATCH, STEPS, GUIDANCE = 64, 8, 1.5
PROMPTS = [f"a {who} with {hair} hair" for who in ("man", "woman") for hair in ("black", "brown", "blond", "red")] * (BATCH // 8)


def clock() -> float:
    """Seconds, when a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timed:
    """A network that adds up the time spent in it."""

    def __init__(self, network):
        self.network, self.seconds = network, 0.0

    def __call__(self, *args):
        start = clock()
        output = self.network(*args)
        self.seconds += clock() - start
        return output


@torch.no_grad()
def overhead(uvit, text, null_text, plan, batch: int, size: int, repeats: int, warmup: int = 1) -> dict:
    """Medians over runs with guidance in every step."""
    shares, steps, calls = [], [], []
    seeds = torch.arange(batch, device=text[0].device)
    for repeat in range(-warmup, repeats):
        network = Timed(uvit)
        start = clock()
        for _ in trajectory(guided(network, text, null_text), plan, (uvit.config.in_channels, size, size), seeds, guidance_scale=GUIDANCE, want_x=False):
            pass
        seconds = clock() - start
        if repeat >= 0:
            shares.append(1 - network.seconds / seconds)
            steps.append(seconds)
            calls.append(network.seconds)
    return {"share": statistics.median(shares), "shares": shares, "seconds": statistics.median(steps), "network_seconds": statistics.median(calls)}


@torch.no_grad()
def diffusers_loop(scheduler, uvit, text, null_text, shape, num_steps: int) -> torch.Tensor:
    """The loop of StableDiffusionPipeline, with a U-ViT that is asked as a score network."""
    scheduler.set_timesteps(num_steps)
    x = randn_tensor(shape, torch.Generator().manual_seed(0), text[0].device) * scheduler.init_noise_sigma  # as its pipelines do
    both = [torch.cat([null.expand_as(cond), cond]) for cond, null in zip(text, null_text)]
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(torch.cat([x] * 2), t)
        times = (t.float() + 1).div(1000).to(x.device).expand(len(x_in))
        uncond, cond = uvit(x_in, times, torch.zeros_like(times), both).chunk(2)
        x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x).prev_sample
    return x


def against(bundle, repeats: int) -> dict:
    size = bundle.uvit.config.sample_size
    text, null_text = bundle.text(PROMPTS), bundle.text([""])
    shape = (BATCH, bundle.uvit.config.in_channels, size, size)
    schedulers = {"ddim": DDIMScheduler(clip_sample=False), "dpm++2m": DPMSolverMultistepScheduler()}

    def ours(below, bundle=bundle):
        return lambda: next(sample_latents(bundle, PROMPTS, range(BATCH), num_steps=STEPS, guidance_scale=GUIDANCE, guidance_below=below))

    runs = {name: (lambda s=s: diffusers_loop(s, bundle.uvit, text, null_text, shape, STEPS)) for name, s in schedulers.items()}
    runs |= {"ours": ours(1.0), "ours, default guidance": ours(None)}
    if text[0].is_cuda:
        runs["ours, one graph"] = ours(1.0, replace(bundle, network=CudaGraphs(bundle.uvit)))
    times = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            start = clock()
            run()
            if repeat >= 0:
                times[name].append(clock() - start)
    ratios = {f"{mine} / {theirs}": statistics.median(b / a for a, b in zip(times[mine], times[theirs]))
              for mine in runs if mine not in schedulers for theirs in schedulers}
    plan = plan_of(bundle.settings, STEPS)
    guided_steps = sum(scale != 1 for scale in guidance_scales(plan.tau, GUIDANCE, bundle.settings.guidance_below))
    return {"images_per_s": {name: BATCH / statistics.median(values) for name, values in times.items()}, "ratios": ratios,
            "evaluations_per_image": {"ours, default guidance": STEPS + guided_steps, "all others": 2 * STEPS}}


@torch.no_grad()
def bare_steps(repeats: int, device: str) -> dict:
    """Milliseconds of the second of 8 steps of each scheduler with guidance."""
    x, uncond, cond = (torch.randn(8, 16, 64, 64, device=device) for _ in range(3))
    config = DDIMScheduler(clip_sample=False).config
    schedulers = {"ours": ProximalScheduler.from_config(config), "ours, eta 1": ProximalScheduler.from_config(config, eta=1.0),
                  "ddim": DDIMScheduler(clip_sample=False), "dpm++2m": DPMSolverMultistepScheduler(),
                  "sde-dpm++2m": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")}
    times = {name: [] for name in schedulers}
    for repeat in range(-3, 10 * repeats):
        for name, scheduler in schedulers.items():
            scheduler.set_timesteps(8)
            state = scheduler.step(cond, scheduler.timesteps[0], x).prev_sample
            start = clock()
            scheduler.step(uncond + GUIDANCE * (cond - uncond), scheduler.timesteps[1], state)
            if repeat >= 0:
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="also U-ViT-H, on the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bundle = load_bundle(SHIPPED_MODEL, args.device)
    plan = plan_of(bundle.settings, STEPS)
    result = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "threads": args.threads, "torch": torch.__version__, "native": native_available(), "batch": BATCH, "steps": STEPS}
    result["overhead"] = {"portraits x 64": overhead(bundle.uvit, bundle.text(PROMPTS), bundle.text([""]), plan, BATCH, bundle.uvit.config.sample_size, args.repeats)}
    result["against"] = against(bundle, args.repeats)
    result["step_ms"] = bare_steps(args.repeats, args.device)
    if args.large:
        uvit = build_uvit("H").eval()
        text = [torch.randn(1, length, dim) for length, dim in zip(uvit.config.text_lengths, uvit.config.text_dims)]
        result["overhead"]["U-ViT-H x 1"] = overhead(uvit, text, [torch.zeros_like(e) for e in text], plan_of(bundle.settings, 2), 1, 32, 1, warmup=0)
    for name, values in result["overhead"].items():
        print(f"overhead, {name:16s} {100 * values['share']:6.2f} %  ({values['seconds']:.3f} s, of which network {values['network_seconds']:.3f} s)")
    for name, rate in result["against"]["images_per_s"].items():
        print(f"{name:28s} {rate:8.1f} images/s")
    for name, ratio in result["against"]["ratios"].items():
        print(f"{name:38s} {ratio:6.3f}")
    for name, ms in result["step_ms"].items():
        print(f"a step of {name:18s} {ms:8.3f} ms")
    write_result(args.out, result)


if __name__ == "__main__":
    main()
