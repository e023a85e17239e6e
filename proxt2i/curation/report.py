"""The end of a curation: all parts checked and counted; index, manifest.json, prompts, datacard.md and report.html."""

from __future__ import annotations

import base64
import io
import json
import platform
import shutil
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import PIL
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from proxt2i import __version__
from proxt2i.curation import pictures, samples, state
from proxt2i.curation.caption import SPLITS, captioned
from proxt2i.curation.dedup import dedup_marker, deduplicated
from proxt2i.curation.run import Run
from proxt2i.curation.scan import HISTOGRAMS, records_of, scanned
from proxt2i.curation.sources import IMAGE
from proxt2i.curation.write import plan, shard_inputs, written
from proxt2i.data.index import check_line, write_atomically
from proxt2i.report_plots import COLORS, STYLE, _svg

TEMPLATES = Path(__file__).parent
SIDE = 112  # of a picture in a grid (pixels)
GRID = 24  # pictures of what is kept
PER_CAUSE = 8  # pictures of what was dropped, per cause


def merge(run: Run) -> dict:
    """The manifest. ValueError if a part is missing, RuntimeError if the parts do not add up."""
    if run.task:
        return {}
    markers = scanned(run)
    codes = deduplicated(run, markers)
    captions = captioned(run, markers, codes)
    shards = plan(run, captions)
    parts = [written(run, shard, shard_inputs(run, markers, codes, captions, shard)) for shard in shards]
    if not shards or None in parts:
        raise ValueError(f"{parts.count(None):,} of {len(parts):,} shards are not written yet: run --stage write, every task of it, first")
    state.remove_leftovers(run.out, 0.0)
    _remove_stale(run, shards)
    for split in SPLITS:
        _write_index(run, split, [part for part in parts if part["split"] == split])
    duplicates = dedup_marker(run, markers)
    manifest = _manifest(run, markers, duplicates, captions, parts)
    write_atomically(run.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    if duplicates["placeholders"]:
        write_atomically(run.out / "placeholders.txt", "".join(f"{sha}  # {count:,} times\n" for sha, count in duplicates["placeholders"]))
    _write_prompts(run, parts)
    write_atomically(run.out / "datacard.md", _render("datacard.md", manifest, run))
    write_atomically(run.out / "report.html", _render("report.html", manifest, run, plots=_plots(manifest), grids=_grids(run, markers, duplicates, parts)))
    return manifest


def _write_index(run: Run, split: str, parts: list[dict]) -> None:
    """The trainer's index of a split, put together from those of its shards, a shard at a time. RuntimeError if it has not the samples that were written."""
    if not parts:
        return
    with state.whole_file(run.out / split / "index.jsonl") as file:
        for part in parts:
            path = run.out / split / f"{part['number']:05d}.tar"
            try:
                line, found = check_line((run.out / "work" / "write" / f"{split}-{path.stem}.index").read_text(), path)
            except (OSError, ValueError, KeyError):
                found = -1
            if found != part["samples"]:
                raise RuntimeError(f"{path} should hold {part['samples']:,} samples, and its index has not: remove {run.out / 'work' / 'write'} and start again")
            file.write(line.encode())


def _remove_stale(run: Run, shards) -> None:
    """Shards and unit results of an earlier state of the input."""
    wanted = {run.out / split / f"{number:05d}.tar" for split, number, _ in shards} | {run.out / "work" / "write" / f"{split}-{number:05d}.json" for split, number, _ in shards}
    for path in [path for split in SPLITS for path in (run.out / split).glob("*.tar")] + list((run.out / "work" / "write").iterdir()):
        if path.with_suffix(".tar" if path.suffix == ".tar" else ".json") not in wanted:
            path.unlink()
    for split in SPLITS:
        if split not in {shard[0] for shard in shards}:
            (run.out / split / "index.jsonl").unlink(missing_ok=True)
    shutil.rmtree(run.out / "work" / "failed", ignore_errors=True)
    names = {unit.name for unit in run.units}
    for stage in ("scan", "dedup", "caption"):
        for path in (run.out / "work" / stage).iterdir():
            if path.stem not in names:
                path.unlink()


def _manifest(run: Run, markers, duplicates, captions, parts) -> dict:
    dropped, repaired, troubles = Counter(), Counter(), Counter()
    histograms = {name: np.zeros(len(edges) - 1, int) for name, edges in HISTOGRAMS.items()}
    for marker in markers:
        dropped.update(marker["dropped"])
        for name, counts in marker["histograms"].items():
            histograms[name] += counts
    dropped.update(duplicates["dropped"])
    words, buckets = np.zeros(26, int), Counter()
    for marker in captions:
        dropped.update(marker["dropped"])
        troubles.update(marker["troubles"])
    for part in parts:
        repaired.update(part["repaired"])
        buckets.update(part["buckets"])
        words += part["words"]
    samples, kept = sum(marker["samples"] for marker in markers), sum(part["samples"] for part in parts)
    if samples != kept + dropped.total():
        raise RuntimeError(f"{samples:,} samples in, {kept:,} out and {dropped.total():,} dropped do not add up")
    return {
        "samples_in": samples, "samples_out": kept, "splits": {split: n for split in SPLITS if (n := sum(p["samples"] for p in parts if p["split"] == split))},
        "dropped": dict(dropped.most_common()), "repaired": dict(repaired.most_common()), "repeated_keys": duplicates["repeated_keys"],
        "damaged_shards": [f"{unit.name} {marker['damage']}" for unit, marker in zip(run.units, markers) if marker["damage"]],
        "lost_in_damaged_shards": sum(marker["lost"] for marker in markers),
        "captions": {"made": sum(marker["captions"] for marker in captions), "troubles": dict(troubles.most_common())}, "hands": sum(part["hands"] for part in parts),
        "buckets": dict(sorted(buckets.items())), "histograms": {name: counts.tolist() for name, counts in histograms.items()}, "words": words.tolist(),
        "parameters": run.config.results(), "versions": _versions(),
        "source": [{"name": unit.name, "samples": marker["samples"], "passed": marker["records"]} for unit, marker in zip(run.units, markers)],
        "shards": [{"name": f"{p['split']}/{p['number']:05d}.tar", "samples": p["samples"], "bytes": p["bytes"], "sha256": p["sha256"]} for p in parts],
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"proxt2i": __version__, "results": str(state.VERSION), "python": platform.python_version(), "pillow": PIL.__version__, "numpy": np.__version__}
    for package in ("torch", "transformers", "webdataset"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write_prompts(run: Run, parts) -> None:
    """Captions of held-out pictures, one a line for `proxt2i.sample --prompts`, in the order of their hashes: a fair sample of them."""
    held_out = sorted(entry for part in parts for entry in part["captions"] if entry[1])
    folder, most = run.out / "prompts", run.config.write.prompts
    for name, entries in (("held_out", held_out), ("hands", [entry for entry in held_out if entry[2] == 1])):
        if entries and most:
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"{name}.txt", "".join(f"{caption}\n" for _, caption, _ in entries[:most]))
            write_atomically(folder / f"{name}.keys", "".join(f"{key}\n" for key, _, _ in entries[:most]))


# -- pages ------------------------------------------------------------------------------------------------------------


def _render(name: str, manifest: dict, run: Run, **more) -> str:
    template = jinja2.Template((TEMPLATES / name).read_text(), autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
                               undefined=jinja2.StrictUndefined)
    settings = [(f"{section}.{key}", value) for section, values in manifest["parameters"].items() for key, value in values.items()]
    return template.render(m=manifest, name=run.out.resolve().name, settings=settings, has_captions=run.config.caption.model is not None, **more)


def _plots(manifest: dict) -> list[dict]:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "proxt2i"}):
        found = [{"title": f"{name}, of all pictures whose header could be read" if name != "score" else "score", "svg": _bars(HISTOGRAMS[name], counts)}
                 for name, counts in manifest["histograms"].items() if sum(counts)]
        found.append({"title": "words a caption, of what is kept", "svg": _bars(np.arange(0, 270, 10), manifest["words"])})
        found.append({"title": f"pictures a bucket (height x width, for {manifest['parameters']['write']['image_size']} pixels)", "svg": _named(manifest["buckets"])})
    return found


def _bars(edges: np.ndarray, counts: list[int]) -> Markup:
    used = np.flatnonzero(counts)
    shown = range(used[0], used[-1] + 1)
    figure = Figure(figsize=(4.6, 2.3), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(shown)), [counts[i] for i in shown], width=0.92, color=COLORS[0])
    every = -(-len(shown) // 10)
    marks = np.arange(0, len(shown) + 1, every)
    axes.set_xticks(marks - 0.5, ["more" if edges[shown[0] + i] >= 1e9 else f"{edges[shown[0] + i]:g}" for i in marks], fontsize=8)
    axes.grid(axis="x", visible=False)
    return _svg(figure)


def _named(counts: dict[str, int]) -> Markup:
    figure = Figure(figsize=(4.6, max(1.2, 0.22 * len(counts) + 0.6)), layout="constrained")
    axes = figure.add_subplot()
    names = sorted(counts, key=lambda name: (int(name.split("x")[0]) / int(name.split("x")[1])))
    axes.barh(range(len(names)), [counts[name] for name in names], color=COLORS[0])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(axis="y", visible=False)
    return _svg(figure)


def _grids(run: Run, markers, duplicates, parts) -> list[dict]:
    """[{"title", "pictures": data URLs, "together": how many belong together}] of what is kept, of pairs of duplicates, and of what was dropped by each cause that leaves a picture."""
    kept = sorted(example for part in parts for example in part["examples"])[:GRID]
    grids = [{"title": "kept", "together": 1, "pictures": [_picture(run, unit, span) for _, unit, span in kept]}]
    pairs: dict[str, list] = {}
    tables: dict[int, np.ndarray] = {}

    def span_of(place):
        if place[0] not in tables:
            tables.clear()
            tables[place[0]] = records_of(run, markers[place[0]])
        return place[0], tables[place[0]][place[1]]["spans"][IMAGE].tolist()

    for one, other, cause in duplicates["pairs"]:
        found = pairs.setdefault(cause, [])
        if len(found) < PER_CAUSE:
            found += [_picture(run, *span_of(one)), _picture(run, *span_of(other))]
    grids += [{"title": f"{cause}: the one that is kept, and the dropped one", "together": 2, "pictures": found} for cause, found in pairs.items()]
    dropped: dict[str, list] = {}
    for number, marker in enumerate(markers):
        for cause, examples in marker["examples"].items():
            for _, span in examples:
                if span is not None and len(dropped.setdefault(cause, [])) < PER_CAUSE and (url := _picture(run, number, span)):
                    dropped[cause].append(url)
    grids += [{"title": f"dropped: {cause}", "together": 1, "pictures": urls} for cause, urls in sorted(dropped.items()) if urls]
    return grids


def _picture(run: Run, unit: int, span) -> str:
    """A small JPEG as a data URL; "" for what cannot be decoded."""
    try:
        with samples.Files([str(path) for path in run.units[unit].files]) as files:
            if span[2] > run.config.read.max_bytes:
                return ""
            with pictures.open_picture(files.read(span), run.config.read.max_pixels) as image:
                pictures.load(image, 2 * SIDE)
                small = pictures.upright(pictures.to_rgb(image), pictures.orientation(image))
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    except (pictures.Unusable, OSError):
        return ""
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
