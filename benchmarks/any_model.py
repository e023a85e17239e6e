"""Few-step quality of proximal steps without training, on networks of other prediction types, beside diffusers' own schedulers.

    python benchmarks/any_model.py [--steps 4 5 6 8 10 20] [--samples 40000] [--score FOLDER] [--prompts 512] [--out FILE.json]

exact    networks that are perfect for a mixture of two Gaussians on the line: epsilon on Stable Diffusion's betas, and flow with SD3's
         shift of 3. Distance: W1 to the mixture; the same number of exact samples has the distance in the row "exact samples".
portraits  (--score) the score network of a run with diffusion.objective=score, as an epsilon network of 1000 timesteps: Fréchet distance
         in the judge's features to held-out drawings that went through the VAE.

Every sampler runs through the same loop over the scheduler interface of diffusers, on its own timesteps, "trailing" for all, from the
same x_N. Nothing is tuned: neither grids nor guidance (none).
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from proxt2i import ProximalScheduler

MEANS, STDS, WEIGHTS = torch.tensor([-1.2, 0.7]), torch.tensor([0.15, 0.25]), torch.tensor([0.3, 0.7])
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def samplers(betas: dict, flow: bool) -> dict:
    """name -> scheduler, for the noise schedule `betas` of an epsilon network or for a flow network."""
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config if flow else DDIMScheduler(**betas, clip_sample=False).config
    multistep = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0) if flow else dict(**betas, timestep_spacing="trailing")
    ours = {
        "relaxed": {}, "relaxed, no memory": dict(extrapolation=0.0), "relaxed, eta 1": dict(eta=1.0),
        **({} if flow else {plan: dict(plan=plan) for plan in ("hybrid", "variance_preserving", "ode")}),
    }
    theirs = {"euler": FlowMatchEulerDiscreteScheduler(shift=3.0)} if flow else {
        "ddim": DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing"),
        "ddpm": DDPMScheduler(**betas, clip_sample=False, timestep_spacing="trailing"),
    }
    return {name: ProximalScheduler.from_config(config, **options) for name, options in ours.items()} | theirs | {
        "dpm++2m": DPMSolverMultistepScheduler(final_sigmas_type="zero", **multistep),
        "unipc": UniPCMultistepScheduler(final_sigmas_type="zero", **multistep),
    }


@torch.no_grad()
def sample(scheduler, predict, x: torch.Tensor, num_steps: int, generator: torch.Generator) -> torch.Tensor:
    """diffusers' loop: predict(x, timestep) is the network."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)])
    else:
        scheduler.set_timesteps(num_steps)
    noisy = {} if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler) else dict(generator=generator)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t), t, x, **noisy).prev_sample
    return x


def exact_network(betas: dict, flow: bool):
    """The epsilon or flow network of the mixture. The table of alphas is linear in ln alpha between its timesteps."""
    log_alphas = DDPMScheduler(**betas).alphas_cumprod.double().log()
    means, stds, weights = (v.double()[:, None, None] for v in (MEANS, STDS, WEIGHTS))

    def predict(x, timestep):
        t = float(timestep)
        if flow:
            signal, noise = 1 - t / 1000, t / 1000
        else:
            low = max(0, min(int(math.floor(t)), 998))
            alpha = math.exp(torch.lerp(log_alphas[low], log_alphas[low + 1], t - low).item())
            signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
        y = x.double()
        variance = (signal * stds) ** 2 + noise**2
        share = torch.softmax(weights.log() - variance.log() / 2 - (y - signal * means) ** 2 / (2 * variance), dim=0)
        clean = (share * (means + signal * stds**2 / variance * (y - signal * means))).sum(0)
        e = (y - signal * clean) / noise
        return (e - clean if flow else e).to(x.dtype)

    return predict


def wasserstein(x: torch.Tensor) -> float:
    """W1 to the mixture, by quantiles."""
    points = torch.linspace(-4, 4, 400_001, dtype=torch.float64)
    cdf = sum(w * torch.special.ndtr((points - m) / s) for w, m, s in zip(WEIGHTS, MEANS, STDS))
    x = x.double().flatten().sort().values
    exact = points[torch.searchsorted(cdf, (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)).clamp(max=len(points) - 1)]
    return (x - exact).abs().mean().item()


def measure_exact(steps: list[int], count: int, flow: bool) -> dict[str, list[float]]:
    predict, x = exact_network(SD, flow), torch.randn(16, count // 16, generator=torch.Generator().manual_seed(0))
    rows = {}
    for name, scheduler in samplers(SD, flow).items():
        rows[name] = [wasserstein(sample(scheduler, predict, x, n, torch.Generator().manual_seed(1))) for n in steps]
    generator = torch.Generator().manual_seed(2)
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    rows["exact samples"] = [wasserstein(MEANS[which] + STDS[which] * torch.randn(count, generator=generator))] * len(steps)
    return rows


def measure_portraits(steps: list[int], folder: Path, count: int) -> dict[str, list[float]]:
    from proxt2i.diffusion import VPSchedule
    from proxt2i.embedded.judge import Judge, frechet_distance
    from proxt2i.evaluation.portraits import held_out, through_codec
    from proxt2i.images import to_uint8
    from proxt2i.models import load_bundle
    from proxt2i.ops import philox_normal

    bundle, judge = load_bundle(folder), Judge()
    if bundle.settings.objective != "score":
        raise SystemExit(f"{folder} is no score network: train one with diffusion.objective=score")
    schedule = VPSchedule(bundle.settings.beta_min, bundle.settings.beta_max)
    alphas = [1.0, *(schedule.alpha((i + 1) / 1000) for i in range(1000))]
    betas = dict(trained_betas=[1 - b / a for a, b in zip(alphas, alphas[1:])])
    drawings, captions, _ = held_out(count)
    real = judge(through_codec(drawings, bundle.codec))[1]
    text, size = bundle.text(captions), bundle.uvit.config.sample_size
    start = philox_normal(torch.arange(count), 0, (bundle.uvit.config.in_channels, size, size))
    rows = {}
    for name, scheduler in samplers(betas, flow=False).items():
        rows[name] = []
        for n in steps:
            pictures = []
            for chosen in torch.arange(count).split(128):
                def predict(x, timestep, chosen=chosen):
                    times = torch.full((len(x),), (float(timestep) + 1) / 1000)
                    return bundle.uvit(x, times, torch.zeros_like(times), [e[chosen] for e in text])

                latents = sample(scheduler, predict, start[chosen], n, torch.Generator().manual_seed(1))
                with torch.no_grad():
                    pictures.append(to_uint8(bundle.codec.decode(latents)))
            rows[name].append(frechet_distance(judge(torch.cat(pictures))[1], real))
        print(f"{name:28s}" + "".join(f"{value:9.3f}" for value in rows[name]), flush=True)
    return rows


def show(title: str, steps: list[int], rows: dict[str, list[float]]) -> None:
    print(f"\n{title}\n{'':28s}" + "".join(f"{n:9d}" for n in steps))
    for name, values in rows.items():
        print(f"{name:28s}" + "".join(f"{value:9.4f}" for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 5, 6, 8, 10, 20])
    parser.add_argument("--samples", type=int, default=40_000, help="of the mixture (default: 40000)")
    parser.add_argument("--score", type=Path, metavar="FOLDER", help="model folder of a score network of portraits")
    parser.add_argument("--prompts", type=int, default=512, help="pictures of portraits, one a prompt (default: 512)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    start = time.perf_counter()
    result = {"steps": args.steps, "samples": args.samples, "torch": torch.__version__,
              "epsilon": measure_exact(args.steps, args.samples, flow=False), "flow": measure_exact(args.steps, args.samples, flow=True)}
    show("W1, exact epsilon network on Stable Diffusion's betas", args.steps, result["epsilon"])
    show("W1, exact flow network, shift 3", args.steps, result["flow"])
    if args.score:
        print("\nFréchet distance, score network of portraits")
        result |= {"portraits": measure_portraits(args.steps, args.score, args.prompts), "prompts": args.prompts}
    result["seconds"] = time.perf_counter() - start
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
