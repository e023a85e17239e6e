"""What the page in the browser (demo.py) does, without the page: check a form, draw it step by step, write the PNGs."""

from __future__ import annotations

import base64
import io
import math
import shlex
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .diffusion import Plan, clean_estimate
from .images import save_png, to_pil, to_uint8
from .models.bundle import Bundle, load_bundle
from .pipeline import guidance_of, plan_of, trajectories
from .sample import SHIPPED_NAME, png_settings, slug

MAX_CHARACTERS = 2000  # of a prompt; what no text encoder hears is said long before
MAX_STEPS = 100
STRIP_ROWS, STRIP_SIDE = 4, 96  # pictures that the strip shows of a draw, and their height in pixels at most


@dataclass(frozen=True)
class Form:
    """What a visitor filled in: the same for both sides of a comparison."""

    prompt: str
    negative: str
    guidance: float
    below: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """One model with one plan."""

    model: str  # the name that the page and the PNGs use
    bundle: Bundle
    plan: Plan


@dataclass(frozen=True)
class Drawn:
    """A draw, on its way or finished: `strip` has one PNG for each step made so far, `files` the pictures at the end."""

    strip: list[bytes]
    files: list[Path] | None = None
    seconds: float = 0.0


def load_models(names: list[str], device: torch.device, shipped: Path) -> dict[str, Bundle]:
    """{name: model} of model folders, "shipped" being the package's own. ValueError names what is missing or corrupt."""
    folders = {SHIPPED_NAME if name == "shipped" else name: shipped if name == "shipped" else Path(name) for name in names or ["shipped"]}
    return {name: load_bundle(folder, device=device) for name, folder in folders.items()}


def read_form(prompt: str, negative: str, guidance, below, seed: str, count, *, max_images: int) -> Form:
    """The form's fields as the page has them (None: left empty), checked. ValueError says which is wrong and what it may be."""
    prompt, negative = (prompt or "").strip(), (negative or "").strip()
    if not prompt:
        raise ValueError("The prompt is empty: describe a picture.")
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"The {name} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are taken.")
    count = whole("Number of images", count, 1, max_images)
    for name, value in (("Guidance scale", guidance), ("Guidance below", below)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{name}: give a number.")
    try:
        first = int(str(seed).strip())
    except ValueError:
        raise ValueError(f"Seed {str(seed)[:40]!r}: give a whole number.") from None
    if not -(2**63) <= first < 2**63 - count:
        raise ValueError(f"Seed {str(seed)[:40]}: must fit in 64 bits.")
    return Form(prompt, negative, float(guidance), float(below), tuple(first + i for i in range(count)))


def whole(name: str, value, low: int, high: int) -> int:
    """`value` as an int of [low, high]; ValueError says what `name` may be."""
    if type(value) not in (int, float) or not low <= value <= high or value != int(value):
        raise ValueError(f"{name}: must be a whole number from {low} to {high}" + (f", not {value:g}." if type(value) in (int, float) else "."))
    return int(value)


def read_side(models: dict[str, Bundle], model: str, plan: str, steps, form: Form) -> Side:
    """One model with one plan, checked against the form. ValueError says what does not fit."""
    if model not in models:
        raise ValueError(f"There is no model {model!r} here; choose one of {', '.join(models)}.")
    steps = whole("Steps", steps, 1, MAX_STEPS)
    guidance_of(models[model].settings, form.guidance, form.below)
    return Side(model, models[model], plan_of(models[model].settings, steps, plan))


def unheard(form: Form, side: Side) -> list[str]:
    """A sentence for each prompt whose end the model's text encoders do not take in."""
    texts = (("prompt", form.prompt), ("negative prompt", form.negative))
    ends = [(name, side.bundle.text.unheard(text)) for name, text in texts if text]
    return [f"{side.model} takes {max(side.bundle.text.lengths)} tokens and does not hear the end of the {name}: “{textwrap.shorten(end, 200, placeholder=' …')}”"
            for name, end in ends if end]


@torch.no_grad()
def draw(form: Form, side: Side, folder: Path) -> Iterator[Drawn]:
    """Draws the pictures of a form in one batch, as `python -m proxt2i.sample` does and with the same bits.

    Yields after every step with the pictures that the model then expects (`clean_estimate`, decoded), and at the end with the PNGs in `folder`.
    """
    start, strip, count = time.perf_counter(), [], len(form.seeds)
    (steps,) = trajectories(
        side.bundle, [form.prompt] * count, form.seeds, negative_prompts=[form.negative] * count if form.negative else None, num_steps=side.plan.num_steps,
        guidance_scale=form.guidance, plan=side.plan.name, guidance_below=form.below, batch_size=count,
    )  # fmt: skip
    for i, y, x in steps:
        if i + 1 < side.plan.num_steps:
            strip.append(column(side.bundle.codec.decode(clean_estimate(side.plan, i, y[:STRIP_ROWS], x[:STRIP_ROWS]))))
            yield Drawn(list(strip))
    pictures = side.bundle.codec.decode(x)
    strip.append(column(pictures[:STRIP_ROWS]))
    pictures = to_uint8(pictures).cpu()
    seconds = time.perf_counter() - start

    settings = png_settings(side.plan, form.guidance, form.below, side.model, form.negative)
    files = [folder / f"{slug(form.prompt)}-{side.plan.name}-{side.plan.num_steps}-seed{seed}.png" for seed in form.seeds]
    for picture, path, seed in zip(pictures, files, form.seeds):
        save_png(to_pil(picture), path, {"prompt": form.prompt, "seed": seed, **settings})
    yield Drawn(strip, files, seconds)


def column(images: Tensor) -> bytes:
    """Decoded pictures [B, 3, H, W] on top of each other as one PNG, made smaller where they are large."""
    image = to_pil(torch.cat(list(to_uint8(images).cpu()), dim=1))
    height = len(images) * STRIP_SIDE
    if image.height > height:
        image = image.resize((max(1, round(image.width * height / image.height)), height))
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def strip_html(strip: list[bytes], plan: Plan) -> str:
    """The strip of a draw by `plan`: one column a step, grey where the step is still to come."""
    cells = []
    for i, tau in enumerate(plan.tau):
        data = base64.b64encode(strip[i]).decode() if i < len(strip) else None
        inner = f'<img src="data:image/png;base64,{data}" alt="step {i + 1}">' if data else '<div class="to-come"></div>'
        cells.append(f'<figure title="step {i + 1}: the noise of time {min(tau, 1):.2f}">{inner}<figcaption>{i + 1}</figcaption></figure>')
    return f'<div class="strip" data-steps="{len(strip)}">{"".join(cells)}</div>'


def command_line(form: Form, side: Side) -> str:
    """The command that draws the same pictures, bit for bit, on the same device."""
    flags = ["--seed", str(form.seeds[0]), "--num-images", str(len(form.seeds)), "--steps", str(side.plan.num_steps), "--plan", side.plan.name,
             "--guidance", repr(form.guidance), "--guidance-below", repr(form.below)]
    flags += ["--negative-prompt", form.negative] if form.negative else []
    flags += [] if side.model == SHIPPED_NAME else ["--model", side.model]
    flags += ["--batch-size", str(len(form.seeds))] if len(form.seeds) > 64 else []
    return shlex.join(["python", "-m", "proxt2i.sample", *flags, "--", form.prompt])
