"""Duplicates across all shards: by bytes, and by looks. What is kept does not depend on who scanned which shard when.

Samples are ranked by pixels, most first, then by shard and place: of duplicates the first in rank is kept. Everything large lives in a
sqlite file that sorts on disk; memory holds two bytes a sample. Near duplicates are two kept pictures whose 64-bit perceptual hashes
differ in at most `distance` bits and whose 8x8 colour thumbnails differ by at most `color` levels in the mean. Hashes that near
agree in at least one of distance + 1 bands of their bits (pigeonhole), so only neighbours within a band's bucket are compared, and none is missed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

KEPT, EXACT, NEAR, PLACEHOLDER = range(4)
CAUSES = ("", "exact duplicate", "near duplicate", "placeholder (repeated bytes)")
ROWS = 65_536  # rows fetched together
BLOCK = 4_000_000  # pairs of hashes compared at once


@dataclass
class Duplicates:
    codes: np.ndarray  # uint8 [N]: KEPT, EXACT, NEAR or PLACEHOLDER, in the order of the samples
    repeated_keys: int = 0  # samples whose key also occurs in another shard
    pairs: list[tuple[int, int, str]] = field(default_factory=list)  # (kept, dropped, cause): the first few, for the report
    placeholders: list[tuple[str, int]] = field(default_factory=list)  # (SHA-256, how often)


def find_duplicates(samples: Iterable[tuple[int, np.ndarray]], database: Path, *, exact: bool = True, near: bool = True, distance: int = 4,
                    color: float = 6.0, placeholder_repeats: int = 50, num_pairs: int = 16) -> Duplicates:
    """samples: (number of the unit, structured array with sha256, phash, key_hash, width, height, thumb) in order. `database` is made anew."""
    for stale in database.parent.glob(database.name + "*"):
        stale.unlink()
    db = sqlite3.connect(database, isolation_level=None)
    try:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536", "temp_store=FILE", "locking_mode=EXCLUSIVE"):
            db.execute(f"PRAGMA {pragma}")
        count = _fill(db, samples)
        result = Duplicates(np.zeros(count, np.uint8))
        result.repeated_keys = db.execute("SELECT coalesce(sum(n), 0) FROM (SELECT count(*) AS n FROM samples GROUP BY key HAVING min(unit) < max(unit))").fetchone()[0]
        codes = np.zeros(count + 1, np.uint8)  # by rank, which begins at 1
        pairs: list[tuple[int, int, int]] = []
        if exact or placeholder_repeats:
            _exact(db, codes, exact, placeholder_repeats, result, pairs, num_pairs)
        if near:
            _same_hash(db, codes, color, pairs, num_pairs)
            if distance:
                _near(db, codes, distance, color, pairs, num_pairs)
        place = np.zeros(count + 1, np.int64)
        for rows in _rows(db, "SELECT rowid, place FROM ranked"):
            place[rows[:, 0]] = rows[:, 1]
        result.codes[place[1:]] = codes[1:]
        result.pairs = [(int(place[kept]), int(place[dropped]), CAUSES[codes[dropped]]) for kept, dropped in pairs]
        return result
    finally:
        db.close()
        for file in database.parent.glob(database.name + "*"):
            file.unlink()


def _fill(db, samples) -> int:
    db.execute("CREATE TABLE samples (place INTEGER PRIMARY KEY, unit INTEGER, sha BLOB, hash INTEGER, key INTEGER, pixels INTEGER, thumb BLOB)")
    place = 0
    db.execute("BEGIN")
    for unit, rows in samples:
        signed = [rows[name].astype("<u8").view("<i8").tolist() for name in ("phash", "key_hash")]
        pixels = (rows["width"].astype(np.int64) * rows["height"]).tolist()
        db.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)", (
            (place + i, unit, rows["sha256"][i].tobytes(), signed[0][i], signed[1][i], pixels[i], rows["thumb"][i].tobytes()) for i in range(len(rows))))
        place += len(rows)
    db.execute("CREATE TABLE ranked (rank INTEGER PRIMARY KEY, place INTEGER, sha BLOB, hash INTEGER, thumb BLOB)")
    db.execute("INSERT INTO ranked SELECT row_number() OVER (ORDER BY pixels DESC, place), place, sha, hash, thumb FROM samples")
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
        starts = np.flatnonzero(np.diff(rows[:, 0])) + 1
        *whole, rest = np.split(rows, starts) if len(starts) < ROWS // 8 else _runs(rows, starts)
        yield from (group for group in whole if len(group) > 1)
    if rest is not None and len(rest) > 1:
        yield rest


def _runs(rows, starts):
    """Like np.split, for many groups of one: only those of more are cut out, and the last."""
    edges = np.concatenate([[0], starts, [len(rows)]])
    for i in np.flatnonzero(np.diff(edges) > 1).tolist():
        if i < len(edges) - 2:
            yield rows[edges[i]:edges[i + 1]]
    yield rows[edges[-2]:]


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
    return np.frombuffer(db.execute("SELECT thumb FROM ranked WHERE rank = ?", (int(rank),)).fetchone()[0], np.uint8).astype(np.int16)


def _same_hash(db, codes, color: float, pairs, num_pairs) -> None:
    """Within each group of equal hashes, in rank order: a picture near a kept one in colour is dropped."""
    begun = len(pairs)
    for group in _groups(db, "SELECT hash, rank FROM ranked ORDER BY hash, rank"):
        kept = np.zeros((0, 192), np.int16)
        ranks: list[int] = []
        for rank in group[:, 1]:
            if codes[rank]:
                continue
            thumb = _thumb(db, rank)
            close = np.flatnonzero(np.abs(kept - thumb).mean(1) <= color)
            if len(close):
                codes[rank] = NEAR
                if len(pairs) - begun < num_pairs:
                    pairs.append((ranks[close[0]], int(rank)))
            else:
                kept, ranks = np.concatenate([kept, thumb[None]]), [*ranks, int(rank)]


def _near(db, codes, distance: int, color: float, pairs, num_pairs) -> None:
    begun = len(pairs)
    db.execute("CREATE TABLE edges (high INTEGER, low INTEGER, PRIMARY KEY (high, low)) WITHOUT ROWID")
    db.execute("BEGIN")
    edges = np.linspace(0, 64, distance + 2).astype(int)  # of the bands, in bits
    for low_bit, high_bit in zip(edges, edges[1:]):
        band = f"(hash >> {low_bit}) & {(1 << int(high_bit - low_bit)) - 1}"
        for group in _groups(db, f"SELECT {band} AS band, rank, hash FROM ranked ORDER BY band, rank"):
            group = group[codes[group[:, 1]] == KEPT]
            hashes = group[:, 2].astype(np.uint64) if len(group) > 1 else []
            step = max(1, BLOCK // max(1, len(hashes)))
            for start in range(0, len(hashes), step):
                bits = np.bitwise_count(hashes[start:start + step, None] ^ hashes[None, start:])
                firsts, seconds = np.nonzero(bits <= distance)
                ahead = firsts < seconds
                found = group[np.stack([seconds[ahead], firsts[ahead]], 1) + start, 1]
                db.executemany("INSERT OR IGNORE INTO edges VALUES (?, ?)", found.tolist())
    db.execute("COMMIT")
    for rows in _rows(db, "SELECT high, low FROM edges ORDER BY high, low"):  # when `high` is judged, every lower rank has been
        for high, low in rows.tolist():
            if codes[low] == KEPT and codes[high] == KEPT and np.abs(_thumb(db, low) - _thumb(db, high)).mean() <= color:
                codes[high] = NEAR
                if len(pairs) - begun < num_pairs:
                    pairs.append((low, high))
