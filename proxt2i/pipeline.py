"""Prompt to picture: text encoders, proximal sampler, VAE, in one function.

`python -m proxt2i.sample`, `python -m proxt2i.evaluate` and the trainer's sample grids all draw through `generate`; it and
`ProxT2IPipeline` (pipeline_diffusers.py) share `sample_latents`. The page in the browser (drawing.py) walks its `trajectories`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from .diffusion import CudaGraphs, VPSchedule, guidance_scales, guided, make_plan, prox_from_eps, trajectory
from .diffusion.plan import Plan
from .images import to_uint8
from .models.bundle import Bundle, Settings


def plan_of(settings: Settings, num_steps: int | None = None, plan: str | None = None) -> Plan:
    """The sampling plan that `settings` (scheduler_config.json) describes, with two choices of the caller's."""
    schedule = VPSchedule(settings.beta_min, settings.beta_max)
    return make_plan(plan or settings.plan, settings.num_steps if num_steps is None else num_steps, schedule, settings.grid,
                     eta=settings.eta, extrapolation=settings.extrapolation)


def guidance_of(settings: Settings, scale: float | None = None, below: float | None = None) -> tuple[float, float]:
    """(guidance_scale, guidance_below) of `settings`, with two choices of the caller's. ValueError for values out of range."""
    scale = float(settings.guidance_scale if scale is None else scale)
    below = float(settings.guidance_below if below is None else below)
    if not 0 <= scale <= 100:
        raise ValueError(f"guidance_scale={scale:g}: use 0 (prompt ignored), 1 (no guidance) or more, up to 100")
    if not 0 <= below <= 1:
        raise ValueError(f"guidance_below={below:g}: must be a time between 0 (only the last step is guided) and 1 (all are)")
    return scale, below


def pick_device(name: str | None) -> torch.device:
    """The device `name`, or without one the first GPU, or the CPU. ValueError when it does not exist here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try cpu") from None
    return device


def latent_size(bundle: Bundle, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of the latents of pictures of `size` (height, width in pixels), or of the model's own square.

    ValueError unless both sides are whole numbers of patches.
    """
    config, factor = bundle.uvit.config, bundle.codec.factor
    if size is None:
        return config.sample_size, config.sample_size
    step = factor * config.patch_size
    if min(size) < step or any(side % step for side in size):
        nearest = "x".join(str(max(1, round(side / step)) * step) for side in size)
        raise ValueError(f"size {size[0]}x{size[1]}: height and width must be multiples of {step} pixels for this model; the nearest is {nearest}")
    return size[0] // factor, size[1] // factor


@torch.no_grad()
def trajectories(
    bundle: Bundle,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompts: Sequence[str] | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    plan: str | None = None,
    guidance_below: float | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    want_x: bool = True,
) -> Iterator[Iterator[tuple[int, Tensor, Tensor | None]]]:
    """Step by step: of every batch of up to `batch_size` pictures the iterator of `diffusion.trajectory`, to be walked without gradients.

    device: of the state (default: the U-ViT's).  want_x: see `diffusion.trajectory`; without it, a `CudaGraphs` as the bundle's network makes
    all steps at once, and the iterator has the last one alone.  All else: see `generate`, whose errors it raises.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per picture")
    steps = plan_of(bundle.settings, num_steps, plan)
    scales = guidance_scales(steps.tau, *guidance_of(bundle.settings, guidance_scale, guidance_below))
    device = torch.device(device) if device else next(bundle.uvit.parameters()).device
    shape = (bundle.uvit.config.in_channels, *latent_size(bundle, size))
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)

    def encoded(captions):  # every distinct one once, and the row of each picture's
        distinct = list(dict.fromkeys(captions))
        return bundle.text(distinct), torch.tensor([distinct.index(caption) for caption in captions], device=device)

    def eps_fn(network, text, null_text):
        asked = guided(network, text, null_text)
        return prox_from_eps(asked, steps.schedule) if bundle.settings.objective == "score" else asked

    text, row = encoded(prompts)
    null_text, null_row = encoded(negative_prompts) if negative_prompts is not None else (bundle.text([""]), None)
    for chosen in torch.arange(len(prompts), device=device).split(batch_size):
        texts = [e[row[chosen]] for e in text], null_text if null_row is None else [e[null_row[chosen]] for e in null_text]
        network = bundle.network or bundle.uvit
        if isinstance(network, CudaGraphs) and network.works_on(device) and not want_x:
            yield network.trajectory(eps_fn, bundle.settings.objective, *texts, steps, shape, seeds[chosen], scales)
        else:
            yield trajectory(eps_fn(network, *texts), steps, shape, seeds[chosen], guidance_scale=scales, want_x=want_x)


@torch.no_grad()
def sample_latents(
    bundle: Bundle,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    callback: Callable[[int, Tensor, Tensor], bool | None] | None = None,
    after_step: Callable[[int], object] = lambda i: None,
    **choices,
) -> Iterator[Tensor]:
    """The latents of one picture per (prompt, seed), batch after batch: float32 [up to batch_size, C, h, w].

    callback(i, y, x) after step i of a batch: see `diffusion.sample`; the batch ends with this x when it returns False.
    after_step(i): called after step i, or after the last one alone (see `trajectories`).  choices: those of `trajectories`, whose errors it raises.
    """
    for steps in trajectories(bundle, prompts, seeds, want_x=callback is not None, **choices):
        for i, y, x in steps:
            after_step(i)
            if callback is not None and callback(i, y, x) is False:
                break
        yield x


@torch.no_grad()
def generate(
    bundle: Bundle,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompts: Sequence[str] | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    plan: str | None = None,
    guidance_below: float | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 64,
    progress: bool = False,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """One picture per (prompt, seed): uint8 [len(prompts), 3, H, W] on the CPU.

    A picture's noise is a function of its seed alone; the batch it is made in changes its pixels by rounding at most.
    negative_prompts: what guidance leads away from, one a picture; None: the empty caption.
    num_steps, guidance_scale, plan, guidance_below (see `diffusion.guidance_scales`): None takes the model's own default.
    size: (height, width) of the pictures in pixels; None: the model's own square.
    batch_size: pictures sampled together (guidance doubles the network's batch). callback(i, y, x): see `diffusion.sample`, called for every batch.
    Raises ValueError for an invalid plan, step count, guidance or size, before anything is computed.
    """
    pictures = []
    with tqdm(total=len(prompts), desc="sampling", unit="image", disable=not progress) as bar:
        for latents in sample_latents(
            bundle, prompts, seeds, negative_prompts=negative_prompts, num_steps=num_steps, guidance_scale=guidance_scale, plan=plan,
            guidance_below=guidance_below, size=size, batch_size=batch_size, callback=callback,
        ):  # fmt: skip
            pictures.append(to_uint8(bundle.codec.decode(latents)).cpu())
            bar.update(len(latents))
    return torch.cat(pictures)
