"""The index that makes every sample of a set of WebDataset tar shards addressable.

A shard is a plain tar file in img2dataset's layout: KEY.png|jpg|jpeg|webp, KEY.txt (the caption) and KEY.json (anything
else); the caption may live in the JSON as "caption" instead. Indexing reads every shard once, for the size of each picture
(from its header, nothing is decoded) and a CRC-32 of each sample, which every later read is compared with. Reading
starts from an index of byte ranges, not from a stream, because only then does every sample have a number: the order
becomes a pure function of (seed, images seen), and a sample's identity is (shard, key), so that a cut shard can never
lend its image to the next shard's caption.
Nothing is ever extracted to disk or unpickled, and shards are local files: no URLs, no pipes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from proxt2i.data.writing import IMAGE_EXTENSIONS, tars_in, write_atomically

log = logging.getLogger(__name__)

INDEX_VERSION = 2
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
IMAGE, TEXT, JSON = 0, 1, 2                                   # rows of ShardIndex.spans[i]
_FIELD = {**dict.fromkeys(IMAGE_EXTENSIONS, IMAGE), "txt": TEXT, "json": JSON}
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")       # webdataset's rule: the key ends at the first dot
_MAX_JSON_BYTES = 1 << 20
_NUM_EXAMPLES = 5                                             # dropped samples named per cause and shard
_POOL_FROM = 64                                               # shards to scan from which processes pay


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
    sizes: np.ndarray                      # int32 [num_samples, 2]: height, width of the upright picture; 0 = unreadable header
    checksums: np.ndarray                  # uint32 [num_samples]: CRC-32 of image, text and JSON together
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
        """Identifies the samples (shard names and sizes, keys, byte ranges, contents); a copy of the data has the same."""
        h = hashlib.sha256(json.dumps([[p.name, size] for p, (size, _) in zip(self.shards, self.stamps)]).encode())
        for array in (self.shard, self.keys, self.spans, self.checksums):
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
    """Index a folder of .tar shards, or a list of .tar files, by reading each file once.

    Unusable samples are left out, counted by cause and named in a warning: no image, no caption, cut short, duplicate
    key. The result is cached as index.jsonl beside the shards (in `cache_dir`, default ~/.cache/proxt2i, if that folder
    cannot be written), one line a shard, written as soon as it is scanned; a shard is scanned again when its size or
    modification time has changed.
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
        shards = tars_in(folder)
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


def _index_folder(folder: Path, shards: list[Path], cache_dir, num_workers) -> dict[Path, dict]:
    """The entries of the given shards, from the folder's cache where they still hold, else from a scan."""
    fallback = Path(cache_dir or Path.home() / ".cache" / "proxt2i")
    fallback /= f"index-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.jsonl"
    cached = _read_entries(fallback) | _read_entries(folder / "index.jsonl")
    stale = [p for p in shards if not _is_current(cached.get(p.name), p)]
    if stale:
        if num_workers is None:
            num_workers = (os.cpu_count() or 1) if len(stale) >= _POOL_FROM else 0
        target = next((t for t in (folder / "index.jsonl", fallback) if _is_writable(t)), None)
        bar = dict(total=len(stale), desc=f"indexing {folder}", unit="shard", disable=None if len(stale) > 1 else True)
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ProcessPoolExecutor(num_workers)) if num_workers > 1 else None
            lines = stack.enter_context(open(target or os.devnull, "a", encoding="utf-8"))
            for entry in tqdm(pool.map(_scan, stale) if pool else map(_scan, stale), **bar):
                lines.write(f"\n{_line(entry)}")              # a line that a kill cuts short spoils no other
                lines.flush()
                cached[entry["name"]] = entry
        if target:
            write_atomically(target, "".join(_line(cached[name]) + "\n" for name in sorted(cached) if (folder / name).exists()))
    return {path: cached[path.name] for path in shards}


def _is_writable(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a"):
            return True
    except OSError as error:
        log.info("cannot write %s: %s", path, error)
        return False


_ARRAYS = {"spans": (np.dtype("<i8"), (-1, 3, 2)), "sizes": (np.dtype("<i4"), (-1, 2)), "checksums": (np.dtype("<u4"), (-1,))}


def _line(entry: dict) -> str:
    """An entry as JSON, its arrays in base64: as short as decimal numbers, and read ten times as fast."""
    return json.dumps({key: base64.b64encode(value.tobytes()).decode() if key in _ARRAYS else value for key, value in entry.items()})


def index_line(shard: Path) -> str:
    """What index.jsonl says of one shard but for its time stamp: for writers of shards, who can so put the index together without reading them all again."""
    return _line({**_scan(shard), "mtime_ns": 0}) + "\n"


def check_line(line: str, shard: Path) -> tuple[str, int]:
    """(`line`, of index_line, with the shard's present time stamp; samples that it indexes). ValueError if it is not of this shard."""
    entry = json.loads(line)
    stat = shard.stat()
    if (entry["name"], entry["size"]) != (shard.name, stat.st_size) or entry["dropped"] or entry["damage"]:
        raise ValueError(f"{shard} is not as it was written")
    return json.dumps({**entry, "mtime_ns": stat.st_mtime_ns}) + "\n", len(entry["keys"])


def _read_entries(path: Path) -> dict[str, dict]:
    """A cache file's entries by shard name; unreadable lines are left out, so their shards are scanned again."""
    entries = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in filter(str.strip, f):
                try:
                    entry = json.loads(line)
                    if entry["version"] != INDEX_VERSION:
                        continue
                    for name, (dtype, shape) in _ARRAYS.items():
                        entry[name] = np.frombuffer(base64.b64decode(entry[name], validate=True), dtype).reshape(shape)
                    whole = len({len(entry["keys"]), *(len(entry[name]) for name in _ARRAYS)}) == 1 and all(isinstance(k, str) for k in entry["keys"])
                    if whole and (entry["spans"].sum(-1) <= entry["size"]).all() and isinstance(entry["dropped"], dict):
                        entries[entry["name"]] = entry
                except (ValueError, KeyError, TypeError):
                    log.info("%s: an unreadable line is ignored", path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.info("%s is ignored: %s", path, error)
    return entries


def _is_current(entry: dict | None, path: Path) -> bool:
    stat = path.stat()
    return entry is not None and (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)


def _assemble(shards: list[Path], entries: list[dict]) -> ShardIndex:
    dropped: dict[str, int] = {}
    examples: list[str] = []
    for path, entry in zip(shards, entries):
        for cause, (count, names) in entry["dropped"].items():
            dropped[cause] = dropped.get(cause, 0) + count
            examples += [f"{path.name}/{name}: {cause}" for name in names]
    return ShardIndex(
        shards=shards, stamps=[(e["size"], e["mtime_ns"]) for e in entries],
        shard=np.repeat(np.arange(len(entries), dtype=np.int32), [len(e["keys"]) for e in entries]),
        keys=np.array([key.encode(errors="surrogateescape") for e in entries for key in e["keys"]], dtype=np.bytes_),
        **{name: np.concatenate([e[name] for e in entries]) for name in _ARRAYS}, dropped=dropped, examples=examples[:_NUM_EXAMPLES],
        damaged=[f"{path.name} {e['damage']}" for path, e in zip(shards, entries) if e["damage"]])


# ------------------------------------------------------------------------------------------------------------
# Scanning one shard.

def _scan(path: Path) -> dict:
    """The cache entry of one shard: {"name", "size", "mtime_ns", "keys", "dropped", "damage", "version", and arrays}."""
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
    sizes, checksums = [], []
    with open(path, "rb") as f:
        for fields in kept.values():
            parts = [_read_span(f, span) for span in fields]
            sizes += picture_size(parts[IMAGE])
            checksums.append(checksum(parts))
    return {"version": INDEX_VERSION, "name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
            "dropped": dropped, "damage": damage, "keys": list(kept), "spans": np.array(spans, dtype="<i8").reshape(-1, 3, 2),
            "sizes": np.array(sizes, dtype="<i4").reshape(-1, 2), "checksums": np.array(checksums, dtype="<u4")}


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


def _read_span(f, span: tuple[int, int] | None) -> bytes:
    if span is None:
        return b""
    f.seek(span[0])
    return f.read(span[1])


def checksum(parts: Iterable[bytes]) -> int:
    """CRC-32 of image, text and JSON together (b"" for an absent one)."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a picture when it is upright, from its header; (0, 0) when that cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            turned = may_be_turned(image, data) and image.getexif().get(0x0112) in (5, 6, 7, 8)
            return image.size if turned else image.size[::-1]
    except Exception:                                         # Pillow's parsers raise nearly every type there is
        return 0, 0


def may_be_turned(image: Image.Image, data: bytes) -> bool:
    """Whether there is a note on orientation. Of PNGs Pillow tells only after decoding them, so the note is looked for in the bytes."""
    return image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"Raw profile type exif", b"tiff:Orientation"))


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
