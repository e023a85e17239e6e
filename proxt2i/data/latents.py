"""Encode image shards into latent shards, once, for training without the VAE (and, if wanted, without the text encoders).

    python -m proxt2i.data.latents SHARDS OUT --components FOLDER --image-size 256 --flip

SHARDS is a folder of img2dataset's tar shards, FOLDER holds vae/, text_encoder/, tokenizer/ and so on, and OUT is then what
`data.shards` of the trainer names. docs/data.md tells the whole way.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from proxt2i.data.buckets import describe, make_buckets
from proxt2i.data.index import index_shards
from proxt2i.data.latent_shards import ABOUT, DTYPES, INDEX, LatentDataset, file_sha256, fingerprint, read_index, write_index, write_latent_shard
from proxt2i.data.loader import BadSamples, ReadAhead
from proxt2i.data.shards import Bad, ShardDataset
from proxt2i.data.writing import write_atomically
from proxt2i.progress import Progress

log = logging.getLogger(__name__)


def describe_latents(dataset: ShardDataset, image_size: int, codec, digests: dict[str, str], *, text=None, names: Sequence[str] = (),
                     dtype: str = "fp16", mirrored: bool = False, compute: str = "fp32", batch_size: int = 64) -> dict:
    """about.json: everything that the bytes of the latents depend on. digests: see models.files.component_digests;
    names: of the encoders of `text`, whose embeddings are all kept, up to text.lengths tokens each."""
    index = dataset.index
    return {
        "source": {"digest": index.digest, "samples": len(index), "shards": len(index.shards)},
        "image_size": image_size, "buckets": [f"{h}x{w}" for h, w in dataset.buckets], "mirrored": mirrored, "dtype": dtype, "compute": compute,
        "batch_size": batch_size, "max_bytes": dataset.max_bytes, "max_pixels": dataset.max_pixels,
        "channels": codec.channels, "factor": codec.factor, "vae": digests["vae"],
        "text": [{"name": name, "tokens": text.lengths[i], "width": text.dims[i], "digest": digests[name]} for i, name in enumerate(names)]}


def encode_shards(dataset: ShardDataset, out: str | os.PathLike, about: dict, codec, text=None, *, device: str | torch.device = "cpu",
                  rank: int = 0, world: int = 1, num_workers: int = 0, verify: bool = False, max_bad: int | None = None,
                  timeout_s: float = 600.0, wait_s: float = 3600.0) -> None:
    """Make OUT hold the latents of `dataset` that `about` (of describe_latents) describes, or what of them is missing.

    Tar shard s is encoded by rank s % world and written whole, so a kill at any moment costs the work on one shard, and what
    comes out has the same bytes after any number of kills, on any number of ranks. verify: compare finished files with their
    SHA-256 and make damaged ones again; otherwise only their size is looked at. Returns when OUT is finished, waiting up to
    `wait_s` for other ranks' next shard. ValueError if OUT holds other latents or cannot be written, and for latents that are
    not finite in the dtype; RuntimeError beyond `max_bad` bad samples (see BadSamples), and for data or ranks that hang.
    """
    out = Path(out)
    _claim(out, about)
    shards = [_Shard(out, number, path.name, fingerprint(about)) for number, path in enumerate(dataset.index.shards)]
    mine = [shard for shard in shards[rank::world] if shard.entry(verify) is None]
    starts = np.searchsorted(dataset.index.shard, np.arange(len(shards) + 1))     # samples are numbered shard after shard
    bad = BadSamples(len(dataset), max_bad)
    with Progress(total=int(sum(starts[s.number + 1] - starts[s.number] for s in mine)), desc="encoding images", unit="image",
                  disable=not mine or (rank > 0 and sys.stderr.isatty())) as bar:
        def requests_of(shard):
            return _requests(dataset, starts[shard.number], starts[shard.number + 1], about["batch_size"])

        batches = ReadAhead(dataset, (request for shard in mine for request in requests_of(shard)), num_workers, timeout_s)
        for shard in mine:
            encoder = _Encoder(about, codec, text, device, dataset)
            for indices, _ in requests_of(shard):
                encoder.add(indices, next(batches))
                bar.update(len(indices))
            for found in encoder.bad:
                bad.add(found)
            shard.write(about, encoder)
    _finish(out, about, shards, rank, world, wait_s)
    for entry in read_index(out)[1]:
        for key, reason in entry["bad"]:
            bad.add(Bad(reason, entry["source"], key))
    if bad.found:
        log.warning("%s, listed in %s", bad.summary(), out / "bad_samples.jsonl")


def _claim(out: Path, about: dict) -> None:
    """Write OUT/about.json, or compare with the one that is there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / ABOUT).exists():
            write_atomically(out / ABOUT, json.dumps(about, indent=1, sort_keys=True) + "\n")
        there = json.loads((out / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot keep latents in {out} ({error}): choose another folder") from error
    for key in about.keys() | there.keys():
        if about.get(key) != there.get(key):
            raise ValueError(f"{out} holds latents made otherwise ({key}: {there.get(key)} there, {about.get(key)} here): choose another folder, or delete it")


def _requests(dataset: ShardDataset, start: int, stop: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of one shard's samples, bucket after bucket."""
    indices = np.arange(start, stop)
    requests = []
    for bucket in range(len(dataset.buckets)):
        chosen = indices[dataset.bucket[start:stop] == bucket]
        requests += [(part, np.zeros(len(part), dtype=bool)) for part in (chosen[i:i + batch_size] for i in range(0, len(chosen), batch_size))]
    return requests


class _Encoder:
    """The latents, embeddings and records of one shard, as they come in."""

    def __init__(self, about: dict, codec, text, device, dataset: ShardDataset):
        self.about, self.codec, self.text_encoder, self.device, self.dataset = about, codec, text, device, dataset
        self.dtype = DTYPES[about["dtype"]]
        self.parts: dict[str, list[list[Tensor]]] = {kind: [[] for _ in about["buckets"]] for kind in ("latents", "mirrored")}
        self.text: list[list[Tensor]] = [[] for _ in about["text"]]
        self.records: list[dict] = []
        self.bad: list[Bad] = []

    @torch.no_grad()
    def add(self, indices: np.ndarray, batch: dict) -> None:
        bucket = int(self.dataset.bucket[indices[0]])
        images = batch["images"].to(self.device).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)
        good = [row for row in range(len(indices)) if row not in batch["bad"]]
        self.bad += batch["bad"].values()
        encoded = {"latents": self.codec.encode(images)}
        if self.about["mirrored"]:
            encoded["mirrored"] = self.codec.encode(images.flip(-1))
        for kind, latents in encoded.items():
            self.parts[kind][bucket].append(self._stored(latents, kind, indices)[good])
        if self.about["text"]:
            for rows, embedding in zip(self.text, self.text_encoder(batch["captions"])):
                embedding = self._stored(embedding, "embeddings", indices)
                rows += [embedding[row, :_num_tokens(embedding[row])] for row in good]
        self.records += [{"key": batch["keys"][row], "caption": batch["captions"][row]} for row in good]

    def _stored(self, tensor: Tensor, what: str, indices: np.ndarray) -> Tensor:
        tensor = tensor.to("cpu", self.dtype)
        if not tensor.isfinite().all():
            raise ValueError(f"{what} of {self.dataset.name(int(indices[0]))} or one of the next {len(indices)} are not finite in "
                             f"{self.about['dtype']}: use bf16 or fp32")
        return tensor

    def tensors(self, kind: str) -> list[Tensor]:
        factor, channels = self.about["factor"], self.about["channels"]
        return [torch.cat([torch.zeros(0, channels, h // factor, w // factor, dtype=self.dtype), *parts])
                for (h, w), parts in zip(self.dataset.buckets, self.parts[kind])]


def _num_tokens(embedding: Tensor) -> int:
    """Of [L, D] without the zeros past the caption's end."""
    used = embedding.ne(0).any(-1).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


class _Shard:
    """One shard of the output: its file, and the entry beside it that says the file is finished."""

    def __init__(self, out: Path, number: int, source: str, fingerprint: str):
        self.number, self.source, self.fingerprint = number, source, fingerprint
        self.path, self.note = out / f"{number:05d}.safetensors", out / f"{number:05d}.json"

    def entry(self, verify: bool = False) -> dict | None:
        """None while the file is not finished, or is damaged."""
        try:
            entry = json.loads(self.note.read_text())
            if entry.pop("fingerprint") != self.fingerprint:
                raise ValueError("it is of other latents")
            if self.path.stat().st_size != entry["bytes"]:
                raise ValueError("its size is wrong")
            if verify and file_sha256(self.path) != entry["sha256"]:
                raise ValueError("its SHA-256 differs")
            return entry
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s): it is made again", self.path, error)
            return None

    def write(self, about: dict, encoder: _Encoder) -> None:
        mirrored = encoder.tensors("mirrored") if about["mirrored"] else []
        entry = write_latent_shard(self.path, about, encoder.tensors("latents"), mirrored, encoder.text, encoder.records)
        entry |= {"source": self.source, "bad": [[bad.key, bad.reason] for bad in encoder.bad], "fingerprint": self.fingerprint}
        write_atomically(self.note, json.dumps(entry, sort_keys=True) + "\n")


def _finish(out: Path, about: dict, shards: list[_Shard], rank: int, world: int, wait_s: float) -> None:
    """Rank 0 waits for all shards and writes the index; the others wait for that."""
    entries: dict[int, dict] = {}
    deadline = time.monotonic() + wait_s
    while True:
        missing = [shard for shard in shards if shard.number not in entries]
        found = {shard.number: entry for shard in missing if (entry := shard.entry()) is not None}
        entries |= found
        if found:
            deadline = time.monotonic() + wait_s
        missing = [shard for shard in missing if shard.number not in found]
        if not missing:
            ordered = [entries[shard.number] for shard in shards]
            if rank == 0:
                write_index(out, about, ordered)
                return
            if _is_written(out, ordered):
                return
        if time.monotonic() > deadline:
            late, maker = (missing[0].path, missing[0].number % world) if missing else (out / INDEX, 0)
            raise RuntimeError(f"waited {wait_s:.0f} s for {late}, which rank {maker} makes: did it fail, or is the folder not shared between the machines?")
        time.sleep(0.1)


def _is_written(out: Path, entries: list[dict]) -> bool:
    try:
        return read_index(out)[1] == entries
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------------
# What a run asks of latents.

def check_latents(dataset: LatentDataset, image_size: int, buckets: Sequence[tuple[int, int]] | None, flip: bool, digests: dict[str, str]) -> None:
    """ValueError unless the latents are what the run needs. buckets: None takes those of the latents; digests: of the run's components."""
    about, folder = dataset.about, dataset.folder
    again = "Encode the images anew with `python -m proxt2i.data.latents`"
    if about["image_size"] != image_size:
        raise ValueError(f"{folder} holds latents for data.image_size={about['image_size']}, the run asks for {image_size}. {again}, or change data.image_size")
    if buckets is not None and list(buckets) != dataset.buckets:
        raise ValueError(f"{folder} holds latents in the buckets {', '.join(about['buckets'])}, not those of data.buckets or data.max_aspect. "
                         f"{again}, or leave both settings out: latents bring their own")
    if about["vae"] != digests["vae"]:
        raise ValueError(f"{folder} holds latents of another VAE (SHA-256 {about['vae'][:12]}) than model.components has ({digests['vae'][:12]}). "
                         f"{again}, or name the components that they were made with")
    for encoder in about["text"]:
        if encoder["digest"] != digests.get(encoder["name"]):
            raise ValueError(f"{folder} holds embeddings of another {encoder['name']} (SHA-256 {encoder['digest'][:12]}) than model.components has "
                             f"({digests.get(encoder['name'], 'none')[:12]}). {again}, or name the components that they were made with")
    if flip and not about["mirrored"]:
        raise ValueError(f"data.flip needs the latents of the mirrored images, and {folder} has none: encode with --flip, or set data.flip=false")


# ------------------------------------------------------------------------------------------------------------
# The command.

EPILOG = """\
examples
  256 x 256, with mirrored latents for data.flip; captions are kept as text, the text encoders run during training:
    python -m proxt2i.data.latents /data/faces /data/faces-256 --components /models/sd35-clip-t5 --image-size 256 --flip
  any shape up to 2:1, in buckets of about 256^2 pixels; the first text encoder's embeddings are kept, up to 77 tokens each:
    python -m proxt2i.data.latents /data/faces /data/faces-ar --components /models/sd35-clip-t5 --max-aspect 2 \\
        --text text_encoder --text-tokens text_encoder=77
  eight GPUs of one machine, or any number of Slurm tasks (RANK and WORLD_SIZE are read from the environment): each takes whole shards
    torchrun --nproc-per-node 8 -m proxt2i.data.latents /data/faces /data/faces-256 --components /models/sd35-clip-t5 --compute bf16

Interrupted (also by kill -9), the same command goes on where it stopped; the result has the same bytes. Repeated on a finished
folder it does nothing; with --verify it compares every file with its SHA-256 and makes damaged ones again.

what it writes, in OUT (see docs/data.md)
  00000.safetensors ...   latents, mirrored latents, captions, keys and embeddings of one tar shard each
  index.json, about.json  what there is, its checksums, and what it was made with   bad_samples.jsonl   what was left out, and why

size: a sample is channels x (H / factor) x (W / factor) values: 32 kB at 256 x 256 in fp16 with 16 channels and factor 8 (0.5 TB for
15 million), as much again with --flip. Embeddings are kept without padding: a caption of 30 tokens is 61 kB at width 1024 and
245 kB at width 4096 (T5-XXL). So T5 is usually better run during training.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m proxt2i.data.latents", description=__doc__.split("\n")[0], epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", help="folder of tar shards (jpg/png/webp + txt + json)")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the latents; ranks on several machines must share it")
    add = parser.add_argument
    add("--components", type=Path, metavar="FOLDER", help="model folder with vae/, text_encoder/, tokenizer/ (default: the embedded ones)")
    add("--image-size", type=int, default=256, metavar="N",
        help="side of the square pictures, or with buckets the root of their area (pixels; default: %(default)s)")
    add("--buckets", nargs="+", default=[], metavar="HxW", help="sizes to cut pictures to, each to that of the nearest shape (pixels)")
    add("--max-aspect", type=float, default=1.0, metavar="R", help="make buckets up to R times as long as wide (default: squares only)")
    add("--multiple", type=int, metavar="N",
        help="pixels that bucket sides are multiples of: the VAE's factor times the U-ViT's patch size (default: 2 factors)")
    add("--flip", action="store_true", help="encode the mirrored pictures too, for data.flip (twice the time and space)")
    add("--text", default="none", metavar="none|all|NAME,...", help="text encoders whose embeddings are kept, e.g. text_encoder_2 (default: %(default)s)")
    add("--text-tokens", nargs="+", default=[], metavar="NAME=N",
        help="cut captions at N tokens for that encoder (default: its own length); training pads with zeros")
    add("--dtype", choices=list(DTYPES), default="fp16", help="of what is kept (default: %(default)s)")
    add("--compute", choices=["fp32", "bf16"], default="fp32", help="precision of the encoding itself (default: %(default)s)")
    add("--batch-size", type=int, default=32, metavar="N", help="pictures encoded together (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="processes that read and decode, a rank (default: %(default)s)")
    add("--device", help="cpu or cuda (default: this rank's GPU if there is one)")
    add("--max-bad", type=int, metavar="N", help="bad samples to leave out before giving up (default: 1 %% of the data)")
    add("--timeout", type=float, default=600, metavar="S", help="seconds without a batch from a process before giving up (default: %(default)s)")
    add("--verify", action="store_true", help="compare finished files with their SHA-256")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        _run(given)
        return 0
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ValueError) else 1


def _run(given: argparse.Namespace) -> None:
    from proxt2i.entry import ranks  # a command is at the end of the data's way
    from proxt2i.models.bundle import EMBEDDED
    from proxt2i.models.files import component_digests, require_folder
    from proxt2i.models.text import TextEncoder, encoder_names
    from proxt2i.models.vae import load_codec

    rank, world, local = ranks()
    if min(given.batch_size, given.image_size) < 1 or given.workers < 0:
        raise ValueError(f"--batch-size {given.batch_size}, --image-size {given.image_size}, --workers {given.workers}: out of range")
    components = require_folder(given.components or EMBEDDED)
    device = torch.device(given.device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    there = encoder_names(components)
    asked = {"none": [], "all": there}.get(given.text, given.text.split(","))
    if not set(asked) <= set(there):
        raise ValueError(f"--text {given.text}: {components} has {', '.join(there)}")
    wanted = [name for name in there if name in asked]
    dtype = torch.bfloat16 if given.compute == "bf16" else torch.float32
    codec = load_codec(components, device, dtype)
    text = TextEncoder.from_pretrained(components, device, dtype, only=wanted) if wanted else None
    for option in given.text_tokens:
        name, _, number = option.partition("=")
        if name not in wanted or not number.isdigit() or not 0 < int(number) <= text.lengths[wanted.index(name)]:
            raise ValueError(f"--text-tokens {option}: expected NAME=N with a NAME of --text and N from 1 to the encoder's own length")
        text.lengths[wanted.index(name)] = int(number)
    buckets = make_buckets(given.image_size, given.multiple or 2 * codec.factor, given.buckets, given.max_aspect)
    index = index_shards(given.shards)
    dataset = ShardDataset(index, given.image_size, buckets=buckets)
    if rank == 0:
        print(f"{given.shards}: {index.summary()}\n{describe(buckets, dataset.bucket)}", flush=True)
    about = describe_latents(dataset, given.image_size, codec, component_digests(components, wanted), text=text, names=wanted,
                             dtype=given.dtype, mirrored=given.flip, compute=given.compute, batch_size=given.batch_size)
    encode_shards(dataset, given.out, about, codec, text, device=device, rank=rank, world=world, num_workers=given.workers,
                  verify=given.verify, max_bad=given.max_bad, timeout_s=given.timeout)
    if rank == 0:
        print(f"{given.out}: {LatentDataset(given.out).summary()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
