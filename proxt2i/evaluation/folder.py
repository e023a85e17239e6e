"""The output folder: whose it is, and what of it is done.

    about.json                    everything that the figures depend on
    samplers/NAME/00000.safetensors   scores and features of the pictures of one unit, written after
    samplers/NAME/00000.tar           the pictures themselves: PNG, prompt and settings each, a shard that the trainer's loader reads
    samplers/NAME/latency.json        how fast it draws
    reference/NAME/00000.safetensors  features of the reference

Files are whole or absent, and a unit's tell what they are of, so that a kill at any moment costs the units at work.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from proxt2i.data.writing import write_atomically
from proxt2i.evaluation.work import GROWS, Evaluation, Unit, digest
from proxt2i.images import to_pil

ABOUT = "about.json"


# -- whose it is ------------------------------------------------------------------------------------------------------


def check_folder(evaluation: Evaluation) -> dict:
    """The about.json that the folder is to have: samplers, rewards and models may join it. ValueError says what differs, and the fix."""
    out, mine = evaluation.out, evaluation.about()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    strangers = out.exists() and any(not path.name.startswith(".") and path.name not in ("launch", ABOUT) for path in out.iterdir())
    if not (out / ABOUT).exists():  # asked after the listing: another rank may be beginning
        if strangers:
            raise ValueError(f"--out {out}: is not empty, and holds no evaluation with prompts; choose another folder")
        return mine
    try:
        theirs = json.loads((out / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{out / ABOUT} cannot be read ({error}); choose another --out, or delete this folder") from None
    differing = [f"{key}: {theirs.get(key)} there, {mine.get(key)} here" for key in mine if key not in (*GROWS, "prompts") and mine[key] != theirs.get(key)]
    if mine["prompts"] != theirs.get("prompts"):
        there, here = ({**p, "sha256": str(p.get("sha256"))[:12]} for p in (theirs.get("prompts") or {}, mine["prompts"]))
        differing.append("prompts: " + ", not ".join(f"{p.get('number')} of {p.get('source')} (sha256 {p['sha256']})" for p in (there, here)))
    for section in GROWS:
        theirs.setdefault(section, {})
        differing += [f"{section.rstrip('s')} {key}: {theirs[section][key]} there, {value} here" for key, value in mine[section].items() if theirs[section].get(key, value) != value]
    if differing:
        raise ValueError(f"--out {out} holds another evaluation ({'; '.join(differing)}). Choose another --out, or delete that folder to start afresh")
    return {**theirs, **{section: theirs[section] | mine[section] for section in GROWS}}


def claim(evaluation: Evaluation) -> None:
    about = check_folder(evaluation)
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    evaluation.out.mkdir(parents=True, exist_ok=True)
    if not (evaluation.out / ABOUT).exists() or (evaluation.out / ABOUT).read_text() != text:
        write_atomically(evaluation.out / ABOUT, text)


# -- units ------------------------------------------------------------------------------------------------------------


class Record:
    """What is known of a unit's pictures: "reward/NAME" float32 [B], "features" float32 [B, D]; and what it was made with."""

    def __init__(self, path: Path, inputs: str):
        self.path, self.inputs = path, inputs
        self.tensors: dict[str, Tensor] = {}
        self.made_with: dict = {}

    def keys(self) -> set[str]:
        """Without reading the tensors; empty if there is no such file, or it is of something else, or damaged."""
        return self._read(lambda file: set(file.keys())) or set()

    def load(self) -> Record:
        self.tensors = self._read(lambda file: {key: file.get_tensor(key) for key in file.keys()}) or {}
        return self

    def _read(self, take):
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                if about.get("inputs") != self.inputs:
                    return None
                self.made_with = json.loads(about["made_with"])
                return take(file)
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def write(self, made_with: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, save({key: value.contiguous() for key, value in self.tensors.items()}, {"inputs": self.inputs, "made_with": json.dumps(made_with)}))


def record_of(evaluation: Evaluation, unit: Unit) -> Record:
    pictures = [[prompt.text, prompt.negative, prompt.metadata, picture.seed] for picture in unit.pictures for prompt in [evaluation.prompts.prompts[picture.prompt]]]
    inputs = digest([unit.sampler.folder, unit.sampler.model.sha256, evaluation.dtype, evaluation.size, pictures])
    return Record(sampler_folder(evaluation, unit) / f"{unit.number:05d}.safetensors", inputs)


def sampler_folder(evaluation: Evaluation, unit: Unit) -> Path:
    return evaluation.out / "samplers" / unit.sampler.folder


def wanted_keys(evaluation: Evaluation) -> set[str]:
    return {f"reward/{reward.key}" for reward in evaluation.rewards} | ({features_key(evaluation)} if evaluation.features else set())


def features_key(evaluation: Evaluation) -> str:
    return f"features/{evaluation.features.sha256[:12]}"


def missing(evaluation: Evaluation, unit: Unit) -> tuple[set[str], bool]:
    """Keys that the unit's record lacks, and whether pictures that are to be kept are not."""
    wants = {name_of(picture) for picture in unit.pictures if evaluation.wants_picture(picture)}
    return wanted_keys(evaluation) - record_of(evaluation, unit).keys(), not wants <= kept(evaluation, unit)


# -- pictures ---------------------------------------------------------------------------------------------------------


def name_of(picture) -> str:
    return f"{picture.prompt:06d}-{picture.image}"


def tar_of(evaluation: Evaluation, unit: Unit) -> Path:
    return sampler_folder(evaluation, unit) / f"{unit.number:05d}.tar"


def kept(evaluation: Evaluation, unit: Unit) -> set[str]:
    """Names of the pictures in a unit's tar file; empty if it is missing or damaged."""
    try:
        with tarfile.open(tar_of(evaluation, unit)) as tar:
            return {name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")}
    except (OSError, tarfile.TarError):
        return set()


def write_pictures(evaluation: Evaluation, unit: Unit, images: Tensor) -> None:
    """Those of uint8 [B, 3, H, W] that are to be kept. Equal pictures give equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for picture, image in zip(unit.pictures, images):
            if not evaluation.wants_picture(picture):
                continue
            prompt, png = evaluation.prompts.prompts[picture.prompt], io.BytesIO()
            to_pil(image).save(png, "PNG", compress_level=1)
            about = {"prompt": prompt.text, "negative_prompt": prompt.negative, "category": prompt.category, "seed": picture.seed, "dtype": evaluation.dtype, **unit.sampler.settings()}
            for ending, data in (("png", png.getvalue()), ("txt", prompt.text.encode()), ("json", json.dumps(about, sort_keys=True).encode())):
                member = tarfile.TarInfo(f"{name_of(picture)}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path = tar_of(evaluation, unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def read_pictures(evaluation: Evaluation, unit: Unit) -> dict[str, Tensor] | None:
    """The unit's pictures that are kept, by name: uint8 [3, H, W]; None where the file is damaged."""
    import numpy as np
    from PIL import Image

    try:
        with tarfile.open(tar_of(evaluation, unit)) as tar:
            found = {}
            for member in tar:
                if member.name.endswith(".png"):
                    with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:
                        found[member.name.removesuffix(".png")] = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
            return found
    except (OSError, tarfile.TarError, SyntaxError, AttributeError):
        return None
