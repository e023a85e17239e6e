"""Latent shards: the one format that encoded data sets are kept in, small or large. Written by latents.py, read by byte range.

    OUT/about.json            what the latents are of and were made with: buckets, dtype, digests of the VAE and text encoders
    OUT/00000.safetensors     the samples of one tar shard, ordered by bucket (then as in the tar)
    OUT/00000.json            that file's size, SHA-256, number of samples a bucket, and bad samples; written after it
    OUT/index.json            all of these together, written last: a folder without it is not finished
    OUT/bad_samples.jsonl     the samples that were left out: shard, key, reason

A shard of n samples holds, `dtype` being float16, bfloat16 or float32:

    latents.HxW   dtype [n_b, C, H / factor, W / factor]   samples of the bucket of H x W pixels
    mirrored.HxW  the same of the mirrored pictures, where asked for: mirroring latents is not the same
    text.NAME     dtype [all tokens, width]   embeddings of the captions, one sample's after the other's, without padding
    records       uint8 [bytes]               {"key", "caption"} of every sample, as JSON
    table         int64 [n, columns]          where a sample's record and text end, and the CRC-32 of its parts (see `columns`)

A sample is therefore four small reads, whatever the size of the whole; its CRCs are compared at every read. The header of a
shard is compared with index.json when it is opened, and the whole file with its SHA-256 when it is read into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from proxt2i.data.buckets import parse_size
from proxt2i.data.shards import Bad, Unusable
from proxt2i.data.writing import fsync, temporary, write_atomically

ABOUT, INDEX = "about.json", "index.json"
VERSION = 1
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_MAX_OPEN_SHARDS = 256


def fingerprint(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def columns(text_names: Sequence[str], mirrored: bool) -> list[str]:
    """Of a shard's table: ends are exclusive, of `records` in bytes and of text in tokens."""
    parts = ["record", *(f"text.{name}" for name in text_names)]
    return [f"end.{part}" for part in parts] + [f"crc.{part}" for part in [*parts, "latents", *["mirrored"] * mirrored]]


# ------------------------------------------------------------------------------------------------------------
# Writing.

def write_latent_shard(path: Path, about: dict, latents: list[Tensor], mirrored: list[Tensor], text: list[list[Tensor]],
                       records: list[dict]) -> dict:
    """Write one shard and return its entry in the index. latents, mirrored: [n_b, C, h, w] a bucket; text: [L, width] a sample,
    for every encoder; records: {"key", "caption"} of all n samples, bucket after bucket. The same input gives the same bytes."""
    names = [encoder["name"] for encoder in about["text"]]
    dtype = DTYPES[about["dtype"]]
    blobs = [json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass") for record in records]
    widths = [encoder["width"] for encoder in about["text"]]
    tensors = {f"latents.{size}": part for size, part in zip(about["buckets"], latents) if len(part)}
    tensors |= {f"mirrored.{size}": part for size, part in zip(about["buckets"], mirrored) if len(part)}
    tensors |= {f"text.{name}": torch.cat([torch.zeros(0, width, dtype=dtype), *rows]) for name, width, rows in zip(names, widths, text)}
    tensors["records"] = torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8) if blobs else torch.zeros(0, dtype=torch.uint8)
    table = {"end.record": np.cumsum([len(blob) for blob in blobs]), "crc.record": [zlib.crc32(blob) for blob in blobs],
             "crc.latents": _checksums(latents), "crc.mirrored": _checksums(mirrored)}
    for name, rows in zip(names, text):
        table |= {f"end.text.{name}": np.cumsum([len(row) for row in rows]), f"crc.text.{name}": [zlib.crc32(_bytes(row)) for row in rows]}
    head = columns(names, about["mirrored"])
    tensors["table"] = torch.tensor(np.array([table[c] for c in head], dtype=np.int64).reshape(len(head), len(records)).T.copy())
    new = temporary(path)
    new.touch()
    mode = new.stat().st_mode                                 # safetensors would keep the file to its owner
    try:
        save_file(tensors, new, metadata={"about": json.dumps({"fingerprint": fingerprint(about), "columns": head})})
        os.chmod(new, mode)
        fsync(new)
        with open(new, "rb") as f:
            header = f.read(8)
            header += f.read(int.from_bytes(header, "little"))
        entry = {"name": path.name, "bytes": new.stat().st_size, "sha256": file_sha256(new), "header_crc32": zlib.crc32(header),
                 "counts": [len(part) for part in latents]}
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return entry


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _checksums(parts: list[Tensor]) -> list[int]:
    return [zlib.crc32(_bytes(row)) for part in parts for row in part]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read()).hexdigest()


def write_index(folder: Path, about: dict, entries: list[dict]) -> None:
    """entries: of all shards, in order, each with the shard's "source" and "bad" ([key, reason] of the samples left out)."""
    bad = [{"shard": entry["source"], "key": key, "reason": reason} for entry in entries for key, reason in entry["bad"]]
    write_atomically(folder / "bad_samples.jsonl", "".join(json.dumps(line) + "\n" for line in bad))
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries)
    write_atomically(folder / INDEX, f'{{"version": {VERSION}, "fingerprint": "{fingerprint(about)}", "shards": [\n{lines}\n]}}\n')


# ------------------------------------------------------------------------------------------------------------
# Reading.

def is_latent_folder(folder: str | os.PathLike) -> bool:
    """Whether it is, or is going to be, a folder of latent shards."""
    return (Path(folder) / ABOUT).is_file()


def read_index(folder: Path) -> tuple[dict, list[dict]]:
    """(about, entries of the shards). ValueError when the folder is unfinished or not readable."""
    again = "run `python -m proxt2i.data.latents` with the same arguments again: it makes what is missing"
    if not (folder / INDEX).is_file():
        raise ValueError(f"the latents in {folder} are not finished ({INDEX} is missing): {again}")
    try:
        about, index = (json.loads((folder / name).read_text()) for name in (ABOUT, INDEX))
        entries = index["shards"]
        if index["version"] != VERSION or index["fingerprint"] != fingerprint(about) or not all(len(e["counts"]) == len(about["buckets"]) for e in entries):
            raise ValueError(f"{INDEX} and {ABOUT} do not belong together")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the latents in {folder} cannot be read ({type(error).__name__}: {error}): {again}") from None
    return about, entries


class LatentDataset(Dataset):
    """Samples of a folder of latent shards, read by byte range; `in_memory`: all shards are read into memory, and verified, at once.

    [i] is Bad or {"latents": dtype [C, h, w], "text": [dtype [L_i, width_i]] padded with zeros, "caption", "key"}.
    `about`: see latents.describe. ValueError for a folder, RuntimeError for a shard, that is not what index.json says.
    Safe in forked and spawned workers.
    """

    def __init__(self, folder: str | os.PathLike, in_memory: bool = False):
        self.folder, self.in_memory = Path(folder), in_memory
        self.about, self.entries = read_index(self.folder)
        self.buckets = [parse_size(size) for size in self.about["buckets"]]
        counts = np.array([entry["counts"] for entry in self.entries], dtype=np.int64).reshape(len(self.entries), len(self.buckets))
        self.bucket = np.repeat(np.tile(np.arange(len(self.buckets), dtype=np.int16), len(counts)), counts.ravel())
        self._starts = np.concatenate([[0], np.cumsum(counts)])            # first sample of (shard, bucket)
        if len(self.bucket) == 0:
            raise ValueError(f"the latents in {folder} hold no sample")
        self._open_shards: OrderedDict[int, _LatentShard] = OrderedDict()
        if in_memory:
            for number in range(len(self.entries)):
                self._shard(number)

    def __len__(self) -> int:
        return len(self.bucket)

    def summary(self) -> str:
        bad = sum(len(entry["bad"]) for entry in self.entries)
        text = ", ".join(encoder["name"] for encoder in self.about["text"])
        return (f"{len(self):,} latents ({self.about['dtype']}{', mirrored ones too' if self.about['mirrored'] else ''}) in {len(self.entries):,} shards"
                f"{f', with embeddings of {text}' if text else ''}{f'; {bad:,} bad samples were left out' if bad else ''}")

    def name(self, i: int) -> str:
        shard, _, row = self._place(i)
        return f"{self.folder / self.entries[shard]['name']}, row {row}"

    def __getitem__(self, i: int) -> dict | Bad:
        batch = self.read_batch(np.array([i]), np.zeros(1, dtype=bool))
        if batch["bad"]:
            return batch["bad"][0]
        return {"latents": batch["latents"][0], "text": [t[0] for t in batch["text"]], "caption": batch["captions"][0], "key": batch["keys"][0]}

    def read_batch(self, indices: np.ndarray, mirrored: np.ndarray, reading: Callable[[int], None] = lambda i: None) -> dict:
        """Samples of one bucket: {"latents": dtype [B, C, h, w], "text": [dtype [B, L_i, width_i]], "captions", "keys", "bad": {row: Bad}}.

        mirrored: bool [B], samples whose mirrored latents are wanted. reading(i) is called before sample i is read.
        """
        about, dtype, num = self.about, DTYPES[self.about["dtype"]], len(indices)
        height, width = self.buckets[self.bucket[indices[0]]]
        latents = torch.zeros(num, about["channels"], height // about["factor"], width // about["factor"], dtype=dtype)
        text = [torch.zeros(num, encoder["tokens"], encoder["width"], dtype=dtype) for encoder in about["text"]]
        batch = {"latents": latents, "text": text, "captions": [""] * num, "keys": [""] * num, "bad": {}}
        latents_bytes, *text_bytes = (t.view(torch.uint8).numpy().reshape(num, -1) for t in (latents, *text))
        for row, i in enumerate(indices.tolist()):
            reading(i)
            shard, start, at = self._place(i)
            try:
                record, image, *embeddings = self._shard(shard).sample(at, start, "mirrored" if mirrored[row] else "latents",
                                                                       about["buckets"][self.bucket[i]])
            except (Unusable, OSError) as error:
                batch["bad"][row] = Bad(str(error), self.entries[shard]["name"], f"row {at}")
                continue
            latents_bytes[row] = image
            for whole, embedding in zip(text_bytes, embeddings):
                whole[row, :len(embedding)] = embedding
            batch["captions"][row], batch["keys"][row] = record["caption"], record["key"]
        return batch

    def _place(self, i: int) -> tuple[int, int, int]:
        """(shard, row in the shard where the sample's bucket starts, the sample's row in the shard)."""
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        shard = group // len(self.buckets)
        first = int(self._starts[shard * len(self.buckets)])
        return shard, int(self._starts[group]) - first, i - first

    def _shard(self, number: int) -> _LatentShard:
        shard = self._open_shards.pop(number, None) or _LatentShard(self.folder, self.entries[number], self.about, self.in_memory)
        self._open_shards[number] = shard
        if len(self._open_shards) > _MAX_OPEN_SHARDS and not self.in_memory:
            self._open_shards.popitem(last=False)
        return shard

    def __getstate__(self):                                   # file handles stay in their process
        return {**self.__dict__, "_open_shards": OrderedDict()}


class _LatentShard:
    """An open shard, or one in memory. Its safetensors header says where things lie."""

    def __init__(self, folder: Path, entry: dict, about: dict, in_memory: bool):
        self.fd, self.data, path = None, None, folder / entry["name"]
        damaged = f"{path} is damaged ({{}}): python -m proxt2i.data.latents ... --verify makes it again"
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if (size := os.fstat(self.fd).st_size) != entry["bytes"]:
                raise RuntimeError(damaged.format(f"{size:,} bytes instead of {entry['bytes']:,}"))
            if in_memory:
                self.data = np.fromfile(path, dtype=np.uint8)
                if hashlib.sha256(self.data).hexdigest() != entry["sha256"]:
                    raise RuntimeError(damaged.format("SHA-256 differs"))
            length = int.from_bytes(self.read(0, 8).tobytes(), "little")
            header = self.read(0, 8 + min(length, entry["bytes"] - 8))
        except (OSError, Unusable) as error:
            raise RuntimeError(damaged.format(error)) from None
        if zlib.crc32(header) != entry["header_crc32"]:
            raise RuntimeError(damaged.format("its header's CRC-32 differs"))
        tensors = json.loads(header[8:].tobytes())
        self.columns = {name: column for column, name in enumerate(columns([e["name"] for e in about["text"]], about["mirrored"]))}
        self.starts = {name: 8 + length + t["data_offsets"][0] for name, t in tensors.items() if name != "__metadata__"}
        itemsize = DTYPES[about["dtype"]].itemsize
        self.text = [(f"text.{encoder['name']}", encoder["width"] * itemsize) for encoder in about["text"]]
        self.row_bytes = {name: np.prod(t["shape"][1:], dtype=int) * itemsize for name, t in tensors.items() if name != "__metadata__"}

    def read(self, offset: int, size: int) -> np.ndarray:
        """uint8 [size]."""
        data = self.data[offset:offset + size] if self.data is not None else np.frombuffer(os.pread(self.fd, size, offset), dtype=np.uint8)
        if len(data) < size:
            raise Unusable("cut short")
        return data

    def sample(self, row: int, bucket_start: int, kind: str, bucket: str) -> list:
        """[record, latents of `kind`, text of every encoder]: a dict, then uint8 [bytes]. Unusable where a CRC differs."""
        width = 8 * len(self.columns)
        first = max(row - 1, 0)                               # the row before says where this one's parts start
        rows = self.read(self.starts["table"] + first * width, (row + 1 - first) * width).view("<i8").reshape(-1, len(self.columns)).tolist()
        before, here = ([0] * len(self.columns) if row == 0 else rows[0]), rows[-1]

        def part(name: str, tensor: str, unit: int) -> np.ndarray:
            start, stop = (values[self.columns[f"end.{name}"]] * unit for values in (before, here))
            if not 0 <= start <= stop:
                raise Unusable("damaged (its table)")
            return self._checked(tensor, start, stop - start, here[self.columns[f"crc.{name}"]])

        record = json.loads(part("record", "records", 1).tobytes())
        size = self.row_bytes[f"{kind}.{bucket}"]
        latents = self._checked(f"{kind}.{bucket}", (row - bucket_start) * size, size, here[self.columns[f"crc.{kind}"]])
        return [record, latents, *(part(name, name, unit) for name, unit in self.text)]

    def _checked(self, tensor: str, offset: int, size: int, crc: int) -> np.ndarray:
        data = self.read(self.starts[tensor] + offset, size)
        if self.data is None and zlib.crc32(data) != crc:     # in memory: the whole file was compared
            raise Unusable(f"damaged (CRC-32 of its {tensor.split('.')[0]} differs)")
        return data

    def __del__(self):
        if self.fd is not None:
            os.close(self.fd)
