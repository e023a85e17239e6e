"""Duplicates across all shards: by bytes, and by looks. What is kept does not depend on who scanned which shard when.

Samples are ranked by pixels, most first, then by shard and place: of duplicates the first in rank is kept. Everything large lives in files
that are sorted on disk; memory holds two bytes a sample. Two kept pictures, or one and the mirror image of the other, are near duplicates if

- their perceptual hashes agree in one of four bands of 16 bits, but for the two bits of either picture there that are unsure, and differ in at
  most `distance` bits altogether (half as many more where the thumbnails are nearly the same); and their difference hashes in at most 1.25
  times as many;
- their 8x8 colour thumbnails differ, after the best change of brightness and contrast, by at most `color` levels in the mean and by little
  compared with the contrast that there is.

The bands make the pairs few that are looked at; the hashes those whose thumbnails are fetched; the thumbnails decide.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from proxt2i.curation import state
from proxt2i.curation.hashes import BANDS, THUMB
from proxt2i.curation.run import Run
from proxt2i.curation.scan import records_of, scanned
from proxt2i.progress import Progress

KEPT, EXACT, NEAR, PLACEHOLDER = range(4)
CAUSES = ("", "exact duplicate", "near duplicate", "placeholder (repeated bytes)")
ROWS = 65_536  # rows fetched together
PART = 1_000_000  # rows of a band that are in memory at once, about
KEY_BITS = 64 // BANDS
NEARLY_THE_SAME = 0.25  # of `color`
CONTRAST = 0.12  # of the thumbnails' standard deviation: what a difference may come to
FLAT = 0.5  # levels that thumbnails without contrast may differ by
GAIN, SHIFT = 1.6, 64.0  # changes of contrast and of brightness (levels) that are made good
ALIKE = 1_000  # kept pictures of one and the same hash that others of that hash are compared with


@dataclass
class Duplicates:
    codes: np.ndarray  # uint8 [N]: KEPT, EXACT, NEAR or PLACEHOLDER, in the order of the samples
    repeated_keys: int = 0  # samples whose key also occurs in another shard
    pairs: list[tuple[int, int, str]] = field(default_factory=list)  # (kept, dropped, cause): the first few, for the report
    placeholders: list[tuple[str, int]] = field(default_factory=list)  # (SHA-256, how often)


def find_duplicates(samples: Iterable[tuple[int, np.ndarray]], database: Path, *, exact: bool = True, near: bool = True, distance: int = 16,
                    color: float = 6.0, mirrored: bool = True, placeholder_repeats: int = 50, num_pairs: int = 16,
                    advance: Callable[[int], object] = int) -> Duplicates:
    """samples: (number of the unit, structured array with sha256, hashes, key_hash, width, height, thumb) in order. `database` is made anew.

    advance: told how many samples have been looked at, in each of the 1 + BANDS rounds.
    """
    _remove(database)
    db = sqlite3.connect(f"{database.resolve().as_uri()}?nolock=1", uri=True, isolation_level=None)  # nobody else uses it; network disks lack locks
    try:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536", "temp_store=FILE", "locking_mode=EXCLUSIVE"):
            db.execute(f"PRAGMA {pragma}")
        with suppress(sqlite3.Error):  # sort on that disk too, not in /tmp; deprecated, and there is no other way from Python
            db.execute("PRAGMA temp_store_directory = '{}'".format(str(database.parent.resolve()).replace("'", "''")))
        count = _fill(db, samples, advance)
        result = Duplicates(np.zeros(count, np.uint8))
        result.repeated_keys = db.execute("SELECT coalesce(sum(n), 0) FROM (SELECT count(*) AS n FROM samples GROUP BY key HAVING min(unit) < max(unit))").fetchone()[0]
        codes = np.zeros(count + 1, np.uint8)  # by rank, which begins at 1
        pairs: list[tuple[int, int]] = []
        if exact or placeholder_repeats:
            _exact(db, codes, exact, placeholder_repeats, result, pairs, num_pairs)
        if near:
            _same_hash(db, codes, color, pairs, num_pairs)
            if distance:
                _near(db, database, codes, distance, color, mirrored, pairs, num_pairs, advance)
        for rows in _rows(db, "SELECT rank, place FROM ranked"):
            result.codes[rows[:, 1]] = codes[rows[:, 0]]
        place = {rank: db.execute("SELECT place FROM ranked WHERE rank = ?", (rank,)).fetchone()[0] for pair in pairs for rank in pair}
        result.pairs = [(place[kept], place[dropped], CAUSES[codes[dropped]]) for kept, dropped in pairs]
        return result
    finally:
        db.close()
        _remove(database)


def _remove(database: Path) -> None:
    for file in database.parent.glob(database.name + "*"):
        file.unlink()


def _fill(db, samples, advance) -> int:
    db.execute("CREATE TABLE samples (place INTEGER PRIMARY KEY, unit INTEGER, sha BLOB, hash INTEGER, hashes BLOB, key INTEGER, pixels INTEGER, thumb BLOB)")
    place = 0
    db.execute("BEGIN")
    for unit, rows in samples:
        signed = [column.astype("<u8").view("<i8").tolist() for column in (rows["hashes"][:, 0, 0], rows["key_hash"])]
        pixels = (rows["width"].astype(np.int64) * rows["height"]).tolist()
        db.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (
            (place + i, unit, rows["sha256"][i].tobytes(), signed[0][i], rows["hashes"][i].tobytes(), signed[1][i], pixels[i], rows["thumb"][i].tobytes())
            for i in range(len(rows))))
        place += len(rows)
        advance(len(rows))
    db.execute("CREATE TABLE ranked (rank INTEGER PRIMARY KEY, place INTEGER, sha BLOB, hash INTEGER, hashes BLOB, thumb BLOB)")
    db.execute("INSERT INTO ranked SELECT row_number() OVER (ORDER BY pixels DESC, place), place, sha, hash, hashes, thumb FROM samples")
    db.execute("COMMIT")
    return place


def _rows(db, query: str) -> Iterator[np.ndarray]:
    """int64 [up to ROWS, columns]."""
    cursor = db.execute(query)
    while rows := cursor.fetchmany(ROWS):
        yield np.array(rows, dtype=np.int64)


def _groups(db, query: str) -> Iterator[np.ndarray]:
    """Rows that agree in the first column, int64 [n, columns], for n > 1; the query sorts by it."""
    rest = None
    for rows in _rows(db, query):
        rows = rows if rest is None else np.concatenate([rest, rows])
        edges = np.concatenate([[0], np.flatnonzero(np.diff(rows[:, 0])) + 1, [len(rows)]])
        for i in np.flatnonzero(np.diff(edges[:-1]) > 1).tolist():
            yield rows[edges[i]:edges[i + 1]]
        rest = rows[edges[-2]:]
    if rest is not None and len(rest) > 1:
        yield rest


def _exact(db, codes, exact: bool, repeats: int, result: Duplicates, pairs, num_pairs) -> None:
    cursor = db.execute("SELECT sha, rank FROM ranked ORDER BY sha, rank")
    group: list[int] = []
    last = None

    def close() -> None:
        if repeats and len(group) >= repeats:
            codes[group] = PLACEHOLDER
            result.placeholders.append((last.hex(), len(group)))
        elif exact and len(group) > 1:
            codes[group[1:]] = EXACT
            if len(pairs) < num_pairs:
                pairs.append((group[0], group[1]))

    while rows := cursor.fetchmany(ROWS):
        for sha, rank in rows:
            if sha != last:
                close()
                group, last = [], sha
            group.append(rank)
    close()


def _thumb(db, rank: int) -> np.ndarray:
    """float32 [192]."""
    return np.frombuffer(db.execute("SELECT thumb FROM ranked WHERE rank = ?", (int(rank),)).fetchone()[0], np.uint8).astype(np.float32)


def mirror(thumb: np.ndarray) -> np.ndarray:
    return thumb.reshape(THUMB, THUMB, 3)[:, ::-1].ravel()


def difference(thumbs: np.ndarray, thumb: np.ndarray) -> np.ndarray:
    """Mean difference (levels) of float32 [N, 192] and [192] after the best gain and shift of all channels together, in the worse of both directions;
    infinite where it is large compared with the contrast, or the shift is."""
    ones, other = thumbs - thumbs.mean(1, keepdims=True), thumb - thumb.mean()
    products, power, own = ones @ other, (ones * ones).sum(1), other @ other
    gain = np.clip(products / np.maximum(power, 1e-6), 1 / GAIN, GAIN)[:, None]
    back = np.clip(products / max(own, 1e-6), 1 / GAIN, GAIN)[:, None]
    found = np.maximum(np.abs(other - gain * ones).mean(1), np.abs(ones - back * other).mean(1))
    contrast = np.sqrt(np.minimum(power, own) / len(thumb))
    shift = np.abs(thumbs.mean(1) - thumb.mean())
    return np.where((found <= np.maximum(FLAT, CONTRAST * contrast)) & (shift <= SHIFT), found, np.inf)


def _same_hash(db, codes, color: float, pairs, num_pairs) -> None:
    """Within each group of equal hashes, in rank order: a picture near a kept one in colour is dropped. Keeps what comes after from many equal ones."""
    begun = len(pairs)
    for group in _groups(db, "SELECT hash, rank FROM ranked ORDER BY hash, rank"):
        kept = np.zeros((0, 3 * THUMB * THUMB), np.float32)
        ranks: list[int] = []
        for rank in group[codes[group[:, 1]] == KEPT, 1].tolist():
            thumb = _thumb(db, rank)
            close = np.flatnonzero(difference(kept, thumb) <= color)
            if len(close):
                codes[rank] = NEAR
                if len(pairs) - begun < num_pairs:
                    pairs.append((ranks[close[0]], rank))
            elif len(ranks) < ALIKE:
                kept, ranks = np.concatenate([kept, thumb[None]]), [*ranks, rank]


ROW = np.dtype([("key", "<u2"), ("mirrored", "u1"), ("rank", "<i8"), ("phash", "<u8"), ("dhash", "<u8")])


def _near(db, database: Path, codes, distance: int, color: float, mirrored: bool, pairs, num_pairs, advance) -> None:
    begun = len(pairs)
    db.execute("CREATE TABLE edges (high INTEGER, low INTEGER, mirrored INTEGER, bits INTEGER, PRIMARY KEY (high, low, mirrored, bits)) WITHOUT ROWID")
    db.execute("BEGIN")
    for band in range(BANDS):
        for share, rows in _parts(db, database, codes, band, mirrored):
            advance(share)
            for edges in _neighbours(rows, distance):
                db.executemany("INSERT OR IGNORE INTO edges VALUES (?, ?, ?, ?)", edges.tolist())
    db.execute("COMMIT")
    for edges in _rows(db, "SELECT high, low, mirrored, bits FROM edges ORDER BY high, low"):  # when `high` is judged, every lower rank has been
        for high, low, turned, bits in edges.tolist():
            if codes[low] == KEPT and codes[high] == KEPT:
                thumb = _thumb(db, low)
                found = difference(_thumb(db, high)[None], mirror(thumb) if turned else thumb)[0]
                if found <= (color if bits <= distance else NEARLY_THE_SAME * color):
                    codes[high] = NEAR
                    if len(pairs) - begun < num_pairs:
                        pairs.append((low, high))


def variants(hashes: np.ndarray, unsure: np.ndarray, band: int) -> np.ndarray:
    """uint64 [N] twice -> uint16 [4, N]: the band's bits, with the two unsure ones this way and that."""
    key, both = ((values >> np.uint64(KEY_BITS * band)).astype(np.uint16) for values in (hashes, unsure))
    low = both & (~both + np.uint16(1))
    return np.stack([key, key ^ low, key ^ both ^ low, key ^ both])


def _parts(db, database: Path, codes, band: int, mirrored: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(samples this stands for, ROW [n]) of the kept pictures, sorted by key, mirrored and rank: everything with the keys of one part of all keys at a time, through files."""
    bits = max(0, min(9, int(len(codes) * 4 * (1 + mirrored) // PART).bit_length()))
    paths = [database.with_name(f"{database.name}-part-{n}") for n in range(1 << bits)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        cursor = db.execute("SELECT rank, hashes FROM ranked ORDER BY rank")
        while fetched := cursor.fetchmany(ROWS // 4):
            ranks = np.array([rank for rank, _ in fetched])
            hashes = np.frombuffer(b"".join(blob for _, blob in fetched), "<u8").reshape(-1, 2, 3)
            chosen = codes[ranks] == KEPT
            ranks, hashes = ranks[chosen], hashes[chosen]
            rows = np.zeros((1 + mirrored, 4, len(ranks)), ROW)
            for turned in range(1 + mirrored):
                rows[turned]["key"] = variants(hashes[:, turned, 0], hashes[:, turned, 1], band)
                rows[turned]["mirrored"], rows[turned]["rank"] = turned, ranks
                rows[turned]["phash"], rows[turned]["dhash"] = hashes[:, turned, 0], hashes[:, turned, 2]
            rows = rows.ravel()
            part = rows["key"] >> np.uint16(KEY_BITS - bits) if bits else np.zeros(len(rows), np.uint16)
            rows = rows[np.argsort(part, kind="stable")]
            for number, edge in enumerate(np.split(rows, np.cumsum(np.bincount(part, minlength=1 << bits))[:-1])):
                if len(edge):
                    files[number].write(edge.tobytes())
    for number, path in enumerate(paths):
        rows = np.fromfile(path, ROW)
        path.unlink()
        yield (len(codes) - 1 + number) // len(paths), rows[np.lexsort((rows["rank"], rows["mirrored"], rows["key"]))]


def _neighbours(rows: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """int64 [n, 4]: (higher rank, lower rank, whether one is mirrored, bits of the hashes that differ) of rows that agree in the key and nearly in the hashes.

    Row i is compared with row i + 1 for all i at once, then with i + 2, ...; every time the step doubles, rows of smaller groups are left out.
    """
    step = 1
    while len(rows) > step:
        if step & (step - 1) == 0:
            sizes = np.bincount(rows["key"], minlength=1 << KEY_BITS)
            rows = rows[sizes[rows["key"]] > step]
            columns = {name: np.ascontiguousarray(rows[name]) for name in ROW.names}
            if len(rows) <= step:
                return
        bits = np.bitwise_count(columns["phash"][step:] ^ columns["phash"][:-step])
        near = np.bitwise_count(columns["dhash"][step:] ^ columns["dhash"][:-step]) <= distance * 5 // 4  # of other pictures, one in 500 gets through here
        near &= bits <= distance * 3 // 2
        near &= columns["key"][step:] == columns["key"][:-step]
        found = np.flatnonzero(near)
        turned = columns["mirrored"][found] + columns["mirrored"][found + step]
        ranks = np.stack([columns["rank"][found], columns["rank"][found + step]])
        real = (turned < 2) & (ranks[0] != ranks[1])
        if real.any():
            yield np.stack([ranks.max(0), ranks.min(0), turned, bits[found]], 1).astype(np.int64)[real]
        step += 1


# -- the stage --------------------------------------------------------------------------------------------------------


def dedup_inputs(run: Run, markers: list[dict]) -> str:
    return state.digest([[unit.name, marker["sha256"]] for unit, marker in zip(run.units, markers)])


def dedup_marker(run: Run, markers: list[dict]) -> dict | None:
    return state.read_marker(run.out / "work" / "dedup.json", dedup_inputs(run, markers))


def dedup(run: Run) -> dict:
    if run.task:
        return {}
    markers = scanned(run)
    if (marker := dedup_marker(run, markers)) is not None:
        return marker
    c, folder = run.config.dedup, run.out / "work" / "dedup"
    folder.mkdir(parents=True, exist_ok=True)
    counts = [marker["records"] for marker in markers]
    with Progress(total=sum(counts) * (1 + BANDS * (c.near and c.distance > 0)), desc="finding duplicates", unit="", unit_scale=True, disable=run.quiet) as bar:
        def samples():
            for number, marker in enumerate(markers):
                yield number, records_of(run, marker)

        found = find_duplicates(samples(), run.out / "work" / "dedup.sqlite", exact=c.exact, near=c.near, distance=c.distance, color=c.color, mirrored=c.mirrored,
                                placeholder_repeats=run.config.filter.placeholder_repeats, advance=bar.update)
    starts = np.cumsum([0, *counts])
    parts = []
    for unit, start, stop in zip(run.units, starts, starts[1:]):
        part = state.to_bytes(found.codes[start:stop])
        state.write_atomically(folder / f"{unit.name}.npy", part)
        parts.append([len(part), hashlib.sha256(part).hexdigest()])

    def place(i: int) -> list[int]:
        unit = int(np.searchsorted(starts, i, "right")) - 1
        return [unit, i - int(starts[unit])]

    summary = {"dropped": {CAUSES[code]: int(n) for code in (EXACT, NEAR, PLACEHOLDER) if (n := (found.codes == code).sum())},
               "repeated_keys": found.repeated_keys, "pairs": [[place(kept), place(dropped), cause] for kept, dropped, cause in found.pairs],
               "placeholders": sorted(found.placeholders)}
    return state.finish(run.out / "work" / "dedup.codes", json.dumps(parts).encode(), dedup_inputs(run, markers), **summary)


def deduplicated(run: Run, markers: list[dict]) -> list[str]:
    """SHA-256 of every unit's codes. ValueError if the stage has not been run on these scans."""
    marker = dedup_marker(run, markers)
    if marker is None:
        raise ValueError("duplicates have not been looked for, or shards have been scanned anew since: run --stage dedup first")
    return [sha for _, sha in json.loads(state.checked_bytes(run.out / "work", marker))]


def survivors(run: Run, number: int, marker: dict, codes_sha: str) -> np.ndarray:
    """Records of a unit that are no duplicates."""
    codes = state.checked_bytes(run.out / "work" / "dedup", {"file": f"{run.units[number].name}.npy", "sha256": codes_sha})
    return records_of(run, marker)[state.from_bytes(codes) == KEPT]
