"""The prompts of an evaluation, from a file: one a line, or JSON lines, CSV or TSV with seed, negative prompt and category."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("prompt", "seed", "negative_prompt", "category", "metadata")
SEEDS = 2**63


@dataclass(frozen=True)
class Prompt:
    text: str
    where: str  # for messages: "line 7"
    seed: int | None = None  # of its first picture; None: counted from --seed
    negative: str = ""  # what guidance leads away from; "": the empty caption
    category: str | None = None
    metadata: dict | None = None  # what rewards may ask for


@dataclass(frozen=True)
class Picture:
    """One to be drawn by every sampler."""

    prompt: int  # number in the list
    image: int  # number among that prompt's
    seed: int


@dataclass(frozen=True)
class PromptList:
    prompts: list[Prompt]
    source: str
    sha256: str  # of the file, as sha256sum prints it
    ignored: tuple[str, ...] = ()  # columns that mean nothing here

    def digest(self) -> str:
        """SHA-256 of all that drawing and scoring see of it."""
        return hashlib.sha256(json.dumps([[p.text, p.seed, p.negative, p.category, p.metadata] for p in self.prompts], sort_keys=True).encode()).hexdigest()

    def pictures(self, seed: int, per_prompt: int) -> list[Picture]:
        """Of every prompt `per_prompt`: picture j of prompt i has the seed `seed` + i * per_prompt + j, or the prompt's own + j.

        ValueError naming the lines when two pictures would be the same one, or when a prompt comes twice without seeds of its own.
        """
        pictures, first, drawn = [], {}, {}
        for i, prompt in enumerate(self.prompts):
            key = (prompt.text, prompt.negative)
            before = first.setdefault(key, prompt)
            if before is not prompt and None in (before.seed, prompt.seed):
                raise ValueError(f"{self.source}, {prompt.where} repeats {before.where} ({short(prompt.text)}): remove it, or give both a seed of their own (in JSON lines or CSV)")
            for j in range(per_prompt):
                picture = Picture(i, j, (seed + i * per_prompt if prompt.seed is None else prompt.seed) + j)
                if not -SEEDS <= picture.seed < SEEDS:
                    raise ValueError(f"{self.source}, {prompt.where}: seed {picture.seed} does not fit in 64 bits")
                other = drawn.setdefault((*key, picture.seed), prompt)
                if other is not prompt:
                    raise ValueError(f"{self.source}, {prompt.where} repeats {other.where} ({short(prompt.text)}) with the same seed {picture.seed}: remove it, or change its seed")
                pictures.append(picture)
        return pictures

    def refuse_long(self, label: str, ends_of) -> None:
        """ValueError that says of prompts which are too long for a model what it would not hear. ends_of: see `unheard_ends`."""
        texts = list(dict.fromkeys([p.text for p in self.prompts] + [p.negative for p in self.prompts]))
        cut = {text: end for text, end in zip(texts, ends_of(texts)) if end}
        if not cut:
            return
        lines = [f"  {p.where}: {short(text, 60)}: not heard: {end!r}" for p in self.prompts for text, end in [(t, cut.get(t)) for t in (p.text, p.negative)] if end]
        more = [f"  and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise ValueError("\n".join([f"{self.source}: {len(lines)} prompt(s) are longer than {label} can hear:", *lines[:5], *more,
                                    "Shorten them, or add --cut-long to measure with what is left of them"]))


def short(text: str, length: int = 50) -> str:
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def read_prompts(path: Path, most: int | None = None) -> PromptList:
    """The first `most` prompts (None: all) of a text file with one a line, or of a .jsonl, .csv or .tsv with a field `prompt`, and
    perhaps `seed`, `negative_prompt`, `category` and (.jsonl) `metadata`. Empty lines are left out.

    ValueError naming the file and the line for what cannot be read or holds no prompt, and for fields that are nearly, not quite, one of these.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"--prompts {path}: no such file; give one prompt a line, or a .jsonl, .csv or .tsv file with a field `prompt`, or the word portraits") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise ValueError(f"--prompts {path}: cannot be read: {error.strerror or error}") from None
    kind = path.suffix.lower()
    ignored: dict[str, None] = {}
    if kind == ".jsonl":
        rows = _json_rows(text, path)
    elif kind in (".csv", ".tsv"):
        rows = _table_rows(text, path, "," if kind == ".csv" else "\t")
    else:
        rows = [(f"line {n}", {"prompt": line}) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    prompts = [_prompt(row, where, path, ignored) for where, row in rows]
    if not prompts:
        raise ValueError(f"--prompts {path}: the file holds no prompt")
    return PromptList(prompts[:most], path.name, hashlib.sha256(data).hexdigest(), tuple(ignored))


def portraits(num: int, seed: int, per_prompt: int) -> PromptList:
    """`num` held-out captions that state every attribute, as the evaluation of portraits uses them. seed, per_prompt: see `pictures`."""
    from .portraits import held_out

    _, captions, metadata = held_out(num)
    # equal captions are rare, and are different drawings: seeds of their own keep them apart
    prompts = [Prompt(caption, f"caption {i}", seed + i * per_prompt, metadata={"attributes": m["attributes"], "stated": m["stated"]}) for i, (caption, m) in enumerate(zip(captions, metadata))]
    return PromptList(prompts, "portraits", hashlib.sha256("".join(f"{c}\n" for c in captions).encode()).hexdigest())


def _json_rows(text: str, path: Path) -> list[tuple[str, dict]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a JSON string may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--prompts {path}, line {number} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'--prompts {path}, line {number} must be an object like {{"prompt": "a red car"}}')
        rows.append((f"line {number}", row))
    return rows


def _table_rows(text: str, path: Path, delimiter: str) -> list[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
    try:
        rows = [(f"line {reader.line_num}", {k: v for k, v in row.items() if v is not None and (k == "" or v.strip())}) for row in reader]
    except csv.Error as error:
        raise ValueError(f"--prompts {path}, line {reader.line_num}: {error}") from None
    for where, row in rows:
        if row.get("") is not None:
            raise ValueError(f"--prompts {path}, {where} has more fields than the header; put a prompt with commas into double quotes")
    if "prompt" not in [_name(field) for field in reader.fieldnames or ()]:
        raise ValueError(f"--prompts {path}: the first line must name the columns, prompt among them; it names: {', '.join(reader.fieldnames or ()) or 'nothing'}")
    return [(where, row) for where, row in rows if row]


def _name(field: str) -> str:
    return field.strip().lower().replace(" ", "_").replace("-", "_")


def _prompt(row: dict, where: str, path: Path, ignored: dict[str, None]) -> Prompt:
    fields = {_name(key): value for key, value in row.items()}
    for key in sorted(fields.keys() - set(COLUMNS)):
        close = difflib.get_close_matches(key, COLUMNS, n=1, cutoff=0.75)
        if close:
            raise ValueError(f"--prompts {path}, {where}: unknown field {key}; did you mean {close[0]}?")
        ignored[key] = None
    text, negative, seed, metadata = fields.get("prompt"), fields.get("negative_prompt") or "", fields.get("seed"), fields.get("metadata")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"--prompts {path}, {where} has no prompt")
    if not isinstance(negative, str):
        raise ValueError(f"--prompts {path}, {where}: negative_prompt must be a string, got {negative!r}")
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"--prompts {path}, {where}: metadata must be an object (in a .jsonl file), got {metadata!r}")
    if seed is not None:
        try:
            seed = int(seed) if isinstance(seed, str) else seed
        except ValueError:
            pass
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"--prompts {path}, {where}: seed must be a whole number, got {seed!r}")
    category = fields.get("category")
    return Prompt(text.strip(), where, seed, negative.strip(), None if category is None else str(category).strip(), metadata)
