"""WebDataset tar shards: writing them, and the index that makes every sample addressable.

A shard is a plain tar file in img2dataset's layout: KEY.png|jpg|jpeg|webp, KEY.txt (the caption) and KEY.json (anything
else); the caption may live in the JSON as "caption" instead. Reading starts from an index of byte ranges, not from a
stream, because only then does every sample have a number: the order becomes a pure function of (seed, images seen),
and a sample's identity is (shard, key), so that a cut shard can never lend its image to the next shard's caption.
Nothing is ever extracted to disk or unpickled, and shards are local files: no URLs, no pipes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

log = logging.getLogger(__name__)

INDEX_VERSION = 1
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
IMAGE, TEXT, JSON = 0, 1, 2                                   # rows of ShardIndex.spans[i]
_FIELD = {**dict.fromkeys(IMAGE_EXTENSIONS, IMAGE), "txt": TEXT, "json": JSON}
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")       # webdataset's rule: the key ends at the first dot
_MAX_JSON_BYTES = 1 << 20
_NUM_EXAMPLES = 5                                             # dropped samples named per cause and shard
_POOL_FROM = 64                                               # shards to scan from which processes pay


# ------------------------------------------------------------------------------------------------------------
# Writing.

def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` at once: temporary name, fsync, rename."""
    data = data.encode() if isinstance(data, str) else data
    tmp = _temporary(path)
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.urandom(4).hex()}")     # hidden, so that no reader takes it for a shard


def write_samples(folder: str | os.PathLike, samples: Iterable[dict], shard_size: int = 1000,
                  *, image_format: str = "png", overwrite: bool = False) -> list[Path]:
    """Write samples as shards 00000.tar, 00001.tar, ... of `shard_size` samples each; returns the shards' paths.

    A sample is {"key": str, "image": PIL image or uint8 array [H, W, 3], "caption": str, "json": dict, optional}. All
    shards are written under temporary names and renamed at the end, so a killed run leaves no shard behind. Equal
    samples give equal bytes. ValueError if the folder already holds shards (unless `overwrite`, which replaces them),
    if a key is unusable or repeated within its shard, or if there are no samples.
    """
    import webdataset

    if image_format not in IMAGE_EXTENSIONS:
        raise ValueError(f"image_format={image_format!r}: choose one of {', '.join(IMAGE_EXTENSIONS)}")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    old = _tars_in(folder)
    if old and not overwrite:
        raise ValueError(f"{folder} already holds {len(old)} shards ({old[0].name}, ...): choose another folder, "
                         f"or pass overwrite=True")
    finished: list[tuple[Path, Path]] = []                    # (temporary name, name)
    iterator = iter(samples)
    try:
        while (sample := next(iterator, None)) is not None:
            path = folder / f"{len(finished):05d}.tar"
            tmp = _temporary(path)
            finished.append((tmp, path))
            keys: set[str] = set()
            with open(tmp, "wb") as f:
                with webdataset.TarWriter(f, encoder=False, mtime=0) as tar:
                    while sample is not None:
                        tar.write(_encode_sample(sample, image_format, keys))
                        sample = next(iterator, None) if len(keys) < shard_size else None
                f.flush()
                os.fsync(f.fileno())
        if not finished:
            raise ValueError(f"no samples to write to {folder}")
        for tmp, path in finished:
            os.replace(tmp, path)
        for path in set(old) - {path for _, path in finished}:
            path.unlink()
    finally:
        for tmp, _ in finished:
            tmp.unlink(missing_ok=True)
    return [path for _, path in finished]


def _encode_sample(sample: dict, image_format: str, keys: set[str]) -> dict:
    key, image = sample["key"], sample["image"]
    if not re.fullmatch(r"[^./\s]+", key) or key in keys:
        raise ValueError(f"key {key!r}: keys must be unique within a shard, not empty, and free of '.', '/' and spaces")
    keys.add(key)
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg" if image_format == "jpg" else image_format)
    fields = {"__key__": key, image_format: buffer.getvalue(), "txt": sample["caption"].encode()}
    if sample.get("json") is not None:
        fields["json"] = json.dumps(sample["json"], ensure_ascii=False).encode()
    return fields


# ------------------------------------------------------------------------------------------------------------
# The index.

@dataclass
class ShardIndex:
    """Where every usable sample of a set of shards lies. Sample i is `spans[i]` of file `shards[shard[i]]`."""
    shards: list[Path]
    stamps: list[tuple[int, int]]          # (size in bytes, mtime in ns) of each shard when it was scanned
    shard: np.ndarray                      # int32 [num_samples]
    keys: np.ndarray                       # utf-8 bytes [num_samples]
    spans: np.ndarray                      # int64 [num_samples, 3, 2]: (offset, size) of image, text, JSON; -1 = absent
    dropped: dict[str, int] = field(default_factory=dict)     # cause -> number of samples
    examples: list[str] = field(default_factory=list)         # the first few, named: "00003.tar/000031: no caption"
    damaged: list[str] = field(default_factory=list)          # shards whose tail is lost, uncounted

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, i: int) -> str:
        return self.keys[i].decode(errors="surrogateescape")

    def name(self, i: int) -> str:
        return f"{self.shards[self.shard[i]].name}/{self.key(i)}"

    @cached_property
    def digest(self) -> str:
        """Identifies the samples (shard names and sizes, keys, byte ranges); a copy of the data has the same."""
        h = hashlib.sha256(json.dumps([[p.name, size] for p, (size, _) in zip(self.shards, self.stamps)]).encode())
        for array in (self.shard, self.keys, self.spans):
            h.update(str(array.dtype).encode() + np.ascontiguousarray(array).tobytes())
        return h.hexdigest()

    def summary(self) -> str:
        text = f"{len(self):,} samples in {len(self.shards):,} shards"
        if self.dropped:
            text += f"; dropped {sum(self.dropped.values()):,}: "
            text += ", ".join(f"{count:,} {cause}" for cause, count in sorted(self.dropped.items()))
            text += f" ({'; '.join(self.examples)}{'; ...' if sum(self.dropped.values()) > len(self.examples) else ''})"
        if self.damaged:
            text += f"; {len(self.damaged):,} damaged: {'; '.join(self.damaged[:_NUM_EXAMPLES])}"
        return text


def index_shards(data: str | os.PathLike | Sequence[str | os.PathLike], *, cache_dir: str | os.PathLike | None = None,
                 num_workers: int | None = None) -> ShardIndex:
    """Index a folder of .tar shards, or a list of .tar files, by reading their headers.

    Unusable samples are left out, counted by cause and named in a warning: no image, no caption, cut short, duplicate
    key. The result is cached as index.jsonl beside the shards (in `cache_dir`, default ~/.cache/proxt2i, if that folder
    cannot be written), one line a shard; a shard is scanned again when its size or modification time has changed.
    With many ranks call it on one first: the others then only read the cache. `num_workers` processes scan (default:
    one a core from 64 shards on). ValueError: a missing folder or file, no shards, no usable sample.
    """
    shards = _find_shards(data)
    entries: dict[Path, dict] = {}
    for folder in dict.fromkeys(path.parent for path in shards):
        entries |= _index_folder(folder, [p for p in shards if p.parent == folder], cache_dir, num_workers)
    index = _assemble(shards, [entries[path] for path in shards])
    if len(index) == 0:
        raise ValueError(f"{data}: no usable sample. {index.summary()}. A sample needs KEY.jpg|jpeg|png|webp and "
                         f"KEY.txt (or \"caption\" in KEY.json)")
    if index.dropped or index.damaged:
        log.warning("%s: %s", shards[0].parent, index.summary())
    return index


def _find_shards(data) -> list[Path]:
    if isinstance(data, (str, os.PathLike)):
        _refuse_urls(data)
        folder = Path(data)
        if folder.is_file():
            return _find_shards([data])
        fix = ("data.shards names a folder of tar shards: make one with `img2dataset --output_format webdataset "
               "--url_list ... --output_folder FOLDER`, or use the embedded default, data.shards=portraits")
        if not folder.is_dir():
            raise ValueError(f"shard folder {folder} does not exist. {fix}")
        shards = _tars_in(folder)
        if not shards:
            raise ValueError(f"no .tar shard in {folder}. {fix}")
        return shards
    for path in data:
        _refuse_urls(path)
        if not Path(path).is_file():
            raise ValueError(f"shard {path} does not exist")
    if not data:
        raise ValueError("an empty list of shards")
    if len(set(map(Path, data))) < len(data):
        raise ValueError("a shard is listed twice")
    return [Path(path) for path in data]


def _refuse_urls(path) -> None:
    if re.match(r"\s*(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)", str(path)):
        raise ValueError(f"{path}: shards are local files; download or mount them first (no URLs, no pipe:)")


def _tars_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(".tar") and not p.name.startswith("."))


def _index_folder(folder: Path, shards: list[Path], cache_dir, num_workers) -> dict[Path, dict]:
    """The entries of the given shards, from the folder's cache where they still hold, else from a scan."""
    fallback = Path(cache_dir or Path.home() / ".cache" / "proxt2i")
    fallback /= f"index-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.jsonl"
    cached = _read_entries(fallback) | _read_entries(folder / "index.jsonl")
    stale = [p for p in shards if not _is_current(cached.get(p.name), p)]
    if stale:
        if num_workers is None:
            num_workers = (os.cpu_count() or 1) if len(stale) >= _POOL_FROM else 0
        bar = dict(total=len(stale), desc=f"indexing {folder}", unit="shard", disable=None if len(stale) > 1 else True)
        if num_workers > 1:
            with ProcessPoolExecutor(num_workers) as pool:
                scanned = list(tqdm(pool.map(_scan, stale, chunksize=4), **bar))
        else:
            scanned = [_scan(path) for path in tqdm(stale, **bar)]
        cached |= {entry["name"]: entry for entry in scanned}
        lines = "".join(json.dumps(cached[name], default=np.ndarray.tolist) + "\n" for name in sorted(cached) if (folder / name).exists())
        for target in (folder / "index.jsonl", fallback):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, lines)
                break
            except OSError as error:
                log.info("cannot write %s: %s", target, error)
    return {path: cached[path.name] for path in shards}


def _read_entries(path: Path) -> dict[str, dict]:
    """A cache file's entries by shard name; unreadable lines are left out, so their shards are scanned again."""
    entries = {}
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                try:
                    entry = json.loads(line)
                    entry["spans"] = np.array(entry["spans"], dtype=np.int64)     # lists would take 5 times the memory
                    spans = entry["spans"].reshape(len(entry["keys"]), 3, 2)
                    whole = entry["version"] == INDEX_VERSION and all(isinstance(k, str) for k in entry["keys"])
                    if whole and (spans.sum(-1) <= entry["size"]).all() and isinstance(entry["dropped"], dict):
                        entries[entry["name"]] = entry
                except (ValueError, KeyError, TypeError):
                    log.info("%s: an unreadable line is ignored", path)
    except (OSError, UnicodeDecodeError) as error:
        if not isinstance(error, FileNotFoundError):
            log.info("%s is ignored: %s", path, error)
    return entries


def _is_current(entry: dict | None, path: Path) -> bool:
    stat = path.stat()
    return entry is not None and (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)


def _assemble(shards: list[Path], entries: list[dict]) -> ShardIndex:
    spans = [e["spans"].reshape(-1, 3, 2) for e in entries]
    dropped: dict[str, int] = {}
    examples: list[str] = []
    for path, entry in zip(shards, entries):
        for cause, (count, names) in entry["dropped"].items():
            dropped[cause] = dropped.get(cause, 0) + count
            examples += [f"{path.name}/{name}: {cause}" for name in names]
    return ShardIndex(
        shards=shards, stamps=[(e["size"], e["mtime_ns"]) for e in entries],
        shard=np.repeat(np.arange(len(entries), dtype=np.int32), [len(s) for s in spans]),
        keys=np.array([key.encode(errors="surrogateescape") for e in entries for key in e["keys"]], dtype=np.bytes_),
        spans=np.concatenate(spans), dropped=dropped, examples=examples[:_NUM_EXAMPLES],
        damaged=[f"{path.name} {e['damage']}" for path, e in zip(shards, entries) if e["damage"]])


# ------------------------------------------------------------------------------------------------------------
# Scanning one shard.

def _scan(path: Path) -> dict:
    """The cache entry of one shard: {"name", "size", "mtime_ns", "keys", "spans", "dropped", "damage", "version"}."""
    stat = path.stat()
    samples: dict[str, list] = {}                             # key -> [(offset, size) or None] * 3
    causes: dict[str, str] = {}                               # key -> why it is dropped
    with open(path, "rb") as f:
        damage = _scan_members(f, stat.st_size, samples, causes)
        for key, fields in samples.items():
            if key not in causes:
                if fields[IMAGE] is None:
                    causes[key] = "no image"
                elif not _has_caption(f, fields):
                    causes[key] = "no caption"
    dropped: dict[str, list] = {}
    for key, cause in causes.items():
        count_names = dropped.setdefault(cause, [0, []])
        count_names[0] += 1
        if len(count_names[1]) < _NUM_EXAMPLES:
            count_names[1].append(key)
    kept = {key: fields for key, fields in samples.items() if key not in causes}
    spans = [n for fields in kept.values() for span in fields for n in (span or (-1, -1))]
    return {"version": INDEX_VERSION, "name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            "dropped": dropped, "damage": damage, "keys": list(kept), "spans": np.array(spans, dtype=np.int64)}


def _scan_members(f, file_size: int, samples: dict[str, list], causes: dict[str, str]) -> str:
    """Collect the byte ranges of a shard's fields into `samples`; returns what is wrong with the file, or ""."""
    try:
        tar = tarfile.open(fileobj=f, mode="r:")
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        return f"is not a readable tar file ({error})"
    end = 0
    try:
        while (member := tar.next()) is not None:
            tar.members = []                                  # tarfile would keep them all
            if member.size < 0 or tar.offset <= end:
                return f"has a damaged header at byte {end:,} of {file_size:,}"
            end = tar.offset
            match = _NAME.match(member.name)
            if match is None or not member.isreg() or member.issparse():
                continue
            key, extension = match.groups()
            fields = samples.setdefault(key, [None, None, None])
            row = _FIELD.get(extension.lower())
            if row is None:
                continue
            if fields[row] is not None:
                causes[key] = "duplicate key"
            elif member.offset_data + member.size > file_size:
                causes[key] = "cut short"
            else:
                fields[row] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        return f"ends early at byte {min(end, file_size):,} of {file_size:,} ({error})"
    f.seek(tar.offset)                                        # tarfile reports a cut or garbled header as a plain end
    if f.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        return f"ends early at byte {tar.offset:,} of {file_size:,} (no end-of-archive mark there)"
    if file_size - tar.offset > 2 * tarfile.RECORDSIZE:
        return f"has {file_size - tar.offset:,} bytes after its end-of-archive mark, which are not read"
    return ""


def _has_caption(f, fields: list) -> bool:
    if fields[TEXT] is not None:
        return fields[TEXT][1] > 0
    if fields[JSON] is None or fields[JSON][1] > _MAX_JSON_BYTES:
        return False
    f.seek(fields[JSON][0])
    try:
        caption = json.loads(f.read(fields[JSON][1]))["caption"]
        return isinstance(caption, str) and bool(caption.strip())
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
