"""The work of a rank: its units are drawn, scored and written; rank 0 also measures the samplers, and waits for all."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from proxt2i.data.writing import write_atomically
from proxt2i.evaluation import folder
from proxt2i.evaluation.features import Extractor
from proxt2i.evaluation.folder import Record, missing, record_of, sampler_folder
from proxt2i.evaluation.prompts import Picture
from proxt2i.evaluation.work import Evaluation, Sampler, Unit, digest
from proxt2i.images import to_uint8
from proxt2i.models.bundle import Bundle, load_bundle
from proxt2i.pipeline import sample_latents
from proxt2i.progress import Progress
from proxt2i.rewards.base import DTYPES, Reward, score

REFERENCE_UNIT = 64  # pictures


def work(evaluation: Evaluation, rewards: Sequence[Reward], extract: Extractor | None, device: torch.device, rank: int = 0, world: int = 1) -> None:
    """Do this rank's share of what is missing. Unit u of all is rank u % world's, whatever others have done."""
    _reference(evaluation, extract, rank, world)
    everything = [unit for sampler in evaluation.samplers for unit in evaluation.units(sampler)]
    mine = [unit for number, unit in enumerate(everything) if number % world == rank and any(missing(evaluation, unit))]
    with Progress(total=sum(len(unit.pictures) for unit in mine), desc="evaluating", unit="image", disable=rank != 0 or not mine) as bar:
        for model in evaluation.models:
            units = [unit for unit in mine if unit.sampler.model is model]
            unmeasured = [s for s in evaluation.samplers if s.model is model and rank == 0 and evaluation.latency_runs and latency(evaluation, s) is None]
            if units or unmeasured:
                _draw_model(evaluation, model.folder, units, unmeasured, rewards, extract, device, world, bar)


def _draw_model(evaluation, model_folder, units: list[Unit], unmeasured: list[Sampler], rewards, extract, device, world: int, bar: Progress) -> None:
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0  # of rewards: not the sampler's
    bundle = load_bundle(model_folder, device=device, dtype=DTYPES[evaluation.dtype])
    bundle.text.warn_unheard([])  # --cut-long has been given, or there is nothing to say
    made_with = {"torch": torch.__version__, "device": device_name(device)}
    for sampler in unmeasured:
        found = _measure(evaluation, bundle, sampler, device, before) | made_with | {"ranks": world}
        path = evaluation.out / "samplers" / sampler.folder
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "latency.json", json.dumps(found) + "\n")
    with ThreadPoolExecutor(1, thread_name_prefix="scoring") as pool:  # scores one unit while the next is drawn
        last: Future | None = None
        for unit in units:
            images = _drawn(evaluation, unit, lambda unit=unit: draw(evaluation, bundle, unit.sampler, unit.pictures))
            if last is not None:
                last.result()
            last = pool.submit(finish, evaluation, unit, images, rewards, extract, made_with)
            last.add_done_callback(lambda future, count=len(unit.pictures): bar.update(count))
        if last is not None:
            last.result()


def _drawn(evaluation: Evaluation, unit: Unit, draw_it: Callable[[], Tensor]) -> Tensor:
    """From the unit's tar file where all of them are kept: a reward that is added later draws nothing again."""
    names = [folder.name_of(picture) for picture in unit.pictures]
    if set(names) <= folder.kept(evaluation, unit) and (found := folder.read_pictures(evaluation, unit)) and set(names) <= found.keys():
        return torch.stack([found[name] for name in names])
    return draw_it()


@torch.no_grad()
def draw(evaluation: Evaluation, bundle: Bundle, sampler: Sampler, pictures: Sequence[Picture]) -> Tensor:
    """uint8 [len(pictures), 3, H, W] on the CPU. RuntimeError if one is not finite."""
    prompts = [evaluation.prompts.prompts[picture.prompt] for picture in pictures]
    negative = [prompt.negative for prompt in prompts]
    latents = sample_latents(
        bundle, [prompt.text for prompt in prompts], [picture.seed for picture in pictures], negative_prompts=negative if any(negative) else None,
        num_steps=sampler.steps, guidance_scale=sampler.guidance, plan=sampler.plan, guidance_below=sampler.guidance_below, size=evaluation.size, batch_size=evaluation.batch_size,
    )  # fmt: skip
    images, finite = [], []
    for z in latents:
        x = bundle.codec.decode(z)
        images.append(to_uint8(x).cpu())
        finite.append((z.flatten(1).isfinite().all(1) & x.flatten(1).isfinite().all(1)).cpu())
    bad = (~torch.cat(finite)).nonzero()
    if len(bad):
        i = bad[0].item()
        raise RuntimeError(f"{sampler.name}: the picture of {prompts[i].where} (seed {pictures[i].seed}) is not finite in {evaluation.dtype}; try --dtype fp32")
    return torch.cat(images)


def finish(evaluation: Evaluation, unit: Unit, images: Tensor, rewards: Sequence[Reward], extract: Extractor | None, made_with: dict) -> None:
    """Score what is not yet scored, and write the unit. images: uint8 [B, 3, H, W]."""
    keys, lacks_pictures = missing(evaluation, unit)
    if lacks_pictures:
        folder.write_pictures(evaluation, unit, images)
    record = record_of(evaluation, unit).load()
    prompts = [evaluation.prompts.prompts[picture.prompt] for picture in unit.pictures]
    asked = [reward for reward in rewards if f"reward/{reward.name}" in keys]
    if asked:
        found = score(asked, images.float() / 255, [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])
        record.tensors |= {f"reward/{name}": values for name, values in found.items()}
    if extract is not None and folder.features_key(evaluation) in keys:
        record.tensors[folder.features_key(evaluation)] = extract(images)
    record.write(record.made_with or made_with)


# -- speed ------------------------------------------------------------------------------------------------------------


def _measure(evaluation: Evaluation, bundle: Bundle, sampler: Sampler, device: torch.device, before: int) -> dict:
    """Prompts to pictures (text encoders, sampler, VAE), one batch after another, after one that warms up."""
    pictures, times = evaluation.pictures[:evaluation.batch_size], []
    draw(evaluation, bundle, sampler, pictures)
    reset_peak_memory(device)
    for _ in range(evaluation.latency_runs):
        start = time.perf_counter()
        draw(evaluation, bundle, sampler, pictures)  # ends on the CPU, so nothing is left in a stream
        times.append(time.perf_counter() - start)
    peak = peak_memory(device)
    return {"ms_per_image": 1000 * statistics.median(times) / len(pictures), "batch": len(pictures), "runs": len(times),
            "peak_memory_mib": None if peak is None else (peak - before) / 2**20}


def latency(evaluation: Evaluation, sampler: Sampler) -> dict | None:
    """What was measured, if it was measured."""
    try:
        found = json.loads((evaluation.out / "samplers" / sampler.folder / "latency.json").read_text())
        return found if isinstance(found, dict) and "ms_per_image" in found else None
    except (OSError, ValueError):
        return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine() or "CPU"
    return f"{name}, {torch.get_num_threads()} thread(s)"


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # of Linux: the process's highest resident memory begins anew
    except OSError:
        pass


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the GPU's allocations, or on a CPU of the whole process (Linux only, else None)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


# -- reference --------------------------------------------------------------------------------------------------------


def reference_records(evaluation: Evaluation) -> list[Record]:
    reference, features = evaluation.reference, evaluation.features
    inputs = digest([reference.sha256, features.sha256])
    path = evaluation.out / "reference" / inputs[:12]
    return [Record(path / f"{i:05d}.safetensors", inputs) for i in range(-(-len(reference) // REFERENCE_UNIT))]


def _reference(evaluation: Evaluation, extract: Extractor | None, rank: int, world: int) -> None:
    if extract is None:
        return
    records = reference_records(evaluation)
    todo = [(i, record) for i, record in enumerate(records) if i % world == rank and not record.keys()]
    for i, record in Progress(todo, desc="reference", unit="batch", disable=rank != 0 or not todo):
        images, bad = evaluation.reference.read(i * REFERENCE_UNIT, (i + 1) * REFERENCE_UNIT)
        record.tensors["features"] = extract(images) if len(images) else torch.empty(0, 0)
        record.write({"bad": [str(b) for b in bad]})


def reference_features(evaluation: Evaluation) -> tuple[Tensor, list[str]]:
    """float32 [R, D], and the pictures that could not be read. ValueError when more than 1 % cannot."""
    records = [record.load() for record in reference_records(evaluation)]
    bad = [reason for record in records for reason in record.made_with["bad"]]
    if len(bad) > max(1, len(evaluation.reference) // 100):
        raise ValueError(f"--reference: {len(bad)} of {len(evaluation.reference)} pictures cannot be used, the first: {bad[0]}; mend the set, or leave them out")
    return torch.cat([record.tensors["features"] for record in records if len(record.tensors["features"])]), bad


# -- waiting ----------------------------------------------------------------------------------------------------------


def wait(evaluation: Evaluation, wait_s: float) -> None:
    """Until every rank's units are there. RuntimeError after `wait_s` seconds without a new one."""
    left: list = [unit for sampler in evaluation.samplers for unit in evaluation.units(sampler)]
    left += reference_records(evaluation) if evaluation.features else []
    deadline, told = time.monotonic() + wait_s, False
    while True:
        still = [one for one in left if (not one.keys() if isinstance(one, Record) else any(missing(evaluation, one)))]
        if not still:
            return
        if len(still) < len(left):
            left, deadline = still, time.monotonic() + wait_s
        if time.monotonic() > deadline:
            name = still[0].path if isinstance(still[0], Record) else sampler_folder(evaluation, still[0]) / f"{still[0].number:05d}"
            raise RuntimeError(f"waited {wait_s:.0f} s for {name} and {len(still) - 1} more units of other ranks: did one fail, or is --out not shared between the machines? "
                               "The same command goes on from here")
        if not told:
            print(f"waiting for {len(still)} units of other ranks", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.2)
