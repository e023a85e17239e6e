"""What there is to curate: tar shards, broken ones too, or parts of a folder of images. Headers and names only, no pictures.

A sample's identity is (shard, key), and only members of one shard are ever joined: a cut shard cannot lend its picture to the caption
of the next. Nothing is extracted, and nothing but pictures, text and JSON is looked at.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FOREIGN = ("gif", "bmp", "tif", "tiff", "avif", "heic", "jp2", "jxl")  # pictures by their name, of a format that is not read
IMAGE, TEXT, JSON = range(3)
_FIELD = {**dict.fromkeys(EXTENSIONS + FOREIGN, IMAGE), "txt": TEXT, "json": JSON}
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")  # webdataset's rule: the key ends at the first dot


@dataclass(frozen=True)
class Raw:
    """A sample before anything of it was read: byte ranges (file number, offset, size) of image, text and JSON, None where absent."""

    key: str
    extension: str
    spans: tuple


@dataclass
class Listing:
    samples: list[Raw]
    dropped: list[tuple[str, str]]  # (key, cause)
    damage: str = ""  # what is wrong with the shard as a whole
    lost: int = 0  # samples that img2dataset wrote (its NAME_stats.json) and that are not there any more


@dataclass
class Unit:
    """A shard, or a part of a folder of images."""

    name: str
    root: Path
    names: list[str]  # of files below root; of a tar shard: its own. No Paths: there may be millions
    is_tar: bool = True

    @property
    def files(self) -> list[Path]:
        return [self.root / name for name in self.names]

    @property
    def keys(self) -> list[str] | None:
        """Of a part of a folder: the key of each file."""
        return None if self.is_tar else [_stem(name) for name in self.names]

    def stamp(self) -> list:
        """Changes when a file does."""
        stats = [path.stat() for path in self.files]
        return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in zip(self.files, stats)]

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.files)

    def list(self) -> Listing:
        """Headers only."""
        return list_tar(self.files[0]) if self.is_tar else self._list_folder()

    def _list_folder(self) -> Listing:
        samples: dict[str, list] = {}
        extensions: dict[str, str] = {}
        twice: set[str] = set()
        for number, (path, key) in enumerate(zip(self.files, self.keys)):
            row = _FIELD[path.suffix[1:].lower()]
            spans = samples.setdefault(key, [None] * 3)
            if spans[row] is not None:
                twice.add(key)
            spans[row] = (number, 0, path.stat().st_size)
            if row == IMAGE:
                extensions[key] = path.suffix[1:].lower()
        return Listing([Raw(key, extensions[key], tuple(spans)) for key, spans in samples.items() if key not in twice],
                       [(key, "key repeated within a shard") for key in samples if key in twice])


def find_units(data: Path, files_per_part: int) -> list[Unit]:
    """The tar shards in a folder, or else its images (in subfolders too) in parts; sorted by name. ValueError when there is nothing."""
    if re.match(r"\s*(pipe:|[A-Za-z][A-Za-z0-9+.-]+:/)", str(data)):  # Path has made s3:/ of s3://
        raise ValueError(f"{data}: shards are local files; download or mount them first")
    if not data.exists():
        raise ValueError(f"{data} does not exist; give a folder of img2dataset shards (`img2dataset --output_format webdataset ...`) or of images")
    if data.is_file():
        if data.suffix != ".tar":
            raise ValueError(f"{data} is no .tar shard; give a folder")
        return [Unit(data.stem, data.parent, [data.name])]
    tars = sorted(path for path in data.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    if tars:
        if odd := next((path for path in tars if not path.is_file()), None):
            raise ValueError(f"{odd} is no file, or a link to none; remove it, or bring it back")
        return [Unit(path.stem, data, [path.name]) for path in tars]
    found = []
    for folder, names, files in os.walk(data):
        names[:] = sorted(name for name in names if not name.startswith("."))
        below = Path(folder).relative_to(data).as_posix()
        found += [name if below == "." else f"{below}/{name}" for name in files if not name.startswith(".") and _field(name) is not None]
    units: list[Unit] = []
    pictures = 0
    for _, group in itertools.groupby(sorted(found, key=lambda name: (_stem(name), name)), _stem):  # a picture, and the text and JSON beside it
        group = list(group)
        if any(_field(name) == IMAGE for name in group):
            if pictures % files_per_part == 0:
                units.append(Unit(f"part-{len(units):05d}", data, [], False))
            units[-1].names += group
            pictures += 1
    if not units:
        raise ValueError(f"{data} holds neither .tar shards nor {', '.join(EXTENSIONS)} images; give a folder of img2dataset shards "
                         "(`img2dataset --output_format webdataset ...`) or of images (captions beside them as NAME.txt)")
    return units


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _field(name: str) -> int | None:
    return _FIELD.get(name.rpartition(".")[2].lower())


def list_tar(path: Path) -> Listing:
    """Samples of one tar by its headers. Where the tar ends early, a last sample that may have lost a member counts as cut short."""
    samples: dict[str, list] = {}
    extensions: dict[str, str] = {}
    causes: dict[str, str] = {}
    with open(path, "rb") as file:
        damage = _read_members(file, path.stat().st_size, samples, extensions, causes)
    if damage and samples:
        *others, last = samples
        usual = [2 * sum(samples[key][row] is not None for key in others) >= len(others) for row in range(3)]  # what most of the others have
        if any(expected and span is None for expected, span in zip(usual, samples[last])):
            causes.setdefault(last, "cut short")
    for key, spans in samples.items():
        if spans[IMAGE] is None:
            causes.setdefault(key, "no image")
    good = [Raw(key, extensions[key], tuple(spans)) for key, spans in samples.items() if key not in causes]
    return Listing(good, list(causes.items()), damage, max(0, _written(path) - len(samples)))


def _written(path: Path) -> int:
    """Samples that img2dataset says it wrote to this shard; 0 if it does not say."""
    try:
        return int(json.loads(path.with_name(f"{path.stem}_stats.json").read_text())["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _read_members(file, file_size: int, samples: dict, extensions: dict, causes: dict) -> str:
    """Collect byte ranges into `samples`; returns what is wrong with the file, or ""."""
    bad = (tarfile.TarError, ValueError, OverflowError, MemoryError)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")
    except bad as error:
        return f"is not a readable tar file ({error})"
    end = 0
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile would keep them all
            if member.size < 0 or tar.offset <= end:
                return f"has a damaged header at byte {end:,} of {file_size:,}"
            end = tar.offset
            match = _NAME.match(member.name)
            if match is None or not member.isreg() or member.issparse():
                continue
            key, extension = match[1], match[2].lower()
            row = _FIELD.get(extension)
            if row is None:
                continue
            spans = samples.setdefault(key, [None] * 3)
            if spans[row] is not None:
                causes[key] = "key repeated within a shard"
            elif member.offset_data + member.size > file_size:
                causes[key] = "cut short"
            else:
                spans[row] = (0, member.offset_data, member.size)
                if row == IMAGE:
                    extensions[key] = extension
    except bad as error:
        return f"ends early at byte {min(end, file_size):,} of {file_size:,} ({error})"
    file.seek(tar.offset)  # tarfile reports a cut or garbled header as a plain end
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        return f"ends early at byte {tar.offset:,} of {file_size:,} (no end-of-archive mark there)"
    if file_size - tar.offset > 2 * tarfile.RECORDSIZE:
        return f"has {file_size - tar.offset:,} bytes after its end-of-archive mark, which are not read"
    return ""
