"""From finished units to tables: one row a picture, means with intervals, paired differences, results.json."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch

from proxt2i import __version__
from proxt2i.data.writing import write_atomically
from proxt2i.embedded.judge import frechet_distance
from proxt2i.evaluation import draw, folder
from proxt2i.evaluation.frechet import distances_without, interval_of, parts_of
from proxt2i.evaluation.statistics import FEW, LEVEL, RESAMPLES, difference, group_means, mean_and_interval, numbered
from proxt2i.evaluation.work import Evaluation, Sampler, reward_settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "diffusers", "numpy", "pillow")


def collect(evaluation: Evaluation) -> dict:
    """Everything that is written, from finished units: {"about", "rows", "differences", "categories", "table" (pyarrow), "notes"}."""
    prompts = [evaluation.prompts.prompts[picture.prompt] for picture in evaluation.pictures]
    groups = numbered([(prompt.text, prompt.negative) for prompt in prompts])
    categories = [prompt.category for prompt in prompts]
    scores, features, made_with = {}, {}, {}
    for sampler in evaluation.samplers:
        records = [folder.record_of(evaluation, unit).load() for unit in evaluation.units(sampler)]
        scores[sampler] = {reward.key: torch.cat([r.tensors[f"reward/{reward.key}"] for r in records]).numpy() for reward in evaluation.rewards}
        if evaluation.features:
            features[sampler] = torch.cat([r.tensors[folder.features_key(evaluation)] for r in records])
        made_with |= {json.dumps(r.made_with, sort_keys=True): r.made_with for r in records}
    reference, bad = draw.reference_features(evaluation) if evaluation.features else (None, [])
    means = {sampler: {name: group_means(values, groups) for name, values in found.items()} for sampler, found in scores.items()}
    distances = {sampler: _distance(values, reference, groups) for sampler, values in features.items()}
    rows = []
    for sampler in evaluation.samplers:
        speed = draw.latency(evaluation, sampler) or {}
        rows.append({
            "sampler": sampler.name, **sampler.settings(), "rewards": {name: mean_and_interval(values) for name, values in means[sampler].items()},
            **{f"frechet_distance{end}": distances[sampler][key] if evaluation.features else None for key, end in (("mean", ""), ("low", "_low"), ("high", "_high"))},
            "pictures": len(evaluation.pictures), "latency": speed or None, "ms_per_image": speed.get("ms_per_image"), "peak_memory_mib": speed.get("peak_memory_mib"),
        })  # fmt: skip
    about = provenance(evaluation, list(made_with.values()), reference)
    return {"about": about, "rows": rows, "differences": _differences(evaluation, means, distances), "categories": _categories(evaluation, scores, groups, categories),
            "table": _table(evaluation, scores, about), "notes": _notes(evaluation, reference, bad, made_with, groups)}  # fmt: skip


def write(evaluation: Evaluation, found: dict) -> None:
    """results.json, and tables as Parquet and CSV."""
    out, about = evaluation.out, found["about"]
    for name, table in tables(found).items():
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(table, sink)
        write_atomically(out / f"{name}.csv", sink.getvalue().to_pybytes())
        if name == "per_prompt":
            sink = pa.BufferOutputStream()
            pyarrow.parquet.write_table(table, sink)
            write_atomically(out / f"{name}.parquet", sink.getvalue().to_pybytes())
    results = {"kind": "prompts", **about, **{key: found[key] for key in ("rows", "differences", "categories", "notes")}}
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")


def tables(found: dict) -> dict[str, pa.Table]:
    """Every figure in one of them stands beside the settings it was made with."""
    about = found["about"]
    fixed = {"num_prompts": about["prompts"]["number"], "prompts_sha256": about["prompts"]["sha256"], "seed": about["seed"], "images_per_prompt": about["images_per_prompt"],
             "dtype": about["dtype"], "proxt2i": about["versions"]["proxt2i"], "torch": about["versions"]["torch"], "git_commit": about["git_commit"] or ""}  # fmt: skip
    summary = [{**{key: value for key, value in row.items() if key not in ("rewards", "latency")},
                **{f"{name}{end}": entry[key] for name, entry in row["rewards"].items() for key, end in (("mean", ""), ("low", "_low"), ("high", "_high"))},
                "fd_features": (about["features"] or {}).get("name"), "latency_batch": (row["latency"] or {}).get("batch"), "device": (row["latency"] or {}).get("device"), **fixed}
               for row in found["rows"]]  # fmt: skip
    made = {"per_prompt": found["table"], "summary": _table_of(summary)}
    for name in ("differences", "categories"):
        if found[name]:
            made[name] = _table_of([{**row, **fixed} for row in found[name]])
    return made


def _table_of(rows: list[dict]) -> pa.Table:
    return pa.table({key: [row[key] for row in rows] for key in rows[0]})


def _table(evaluation: Evaluation, scores: dict[Sampler, dict[str, np.ndarray]], about: dict) -> pa.Table:
    """One row a picture: its sampler's settings, prompt, seed, scores."""
    columns: dict[str, list] = {}
    pictures = evaluation.pictures
    prompts = [evaluation.prompts.prompts[picture.prompt] for picture in pictures]
    for sampler in evaluation.samplers:
        rows = {key: [value] * len(pictures) for key, value in {"sampler": sampler.name, **sampler.settings()}.items()}
        rows |= {"prompt_number": [p.prompt for p in pictures], "image": [p.image for p in pictures], "seed": [p.seed for p in pictures], "prompt": [p.text for p in prompts],
                 "negative_prompt": [p.negative for p in prompts], "category": [p.category for p in prompts], "dtype": [evaluation.dtype] * len(pictures)}  # fmt: skip
        rows |= {name: values.tolist() for name, values in scores[sampler].items()}
        for key, values in rows.items():
            columns.setdefault(key, []).extend(values)
    types = {"category": pa.string(), **{reward.key: pa.float32() for reward in evaluation.rewards}}
    table = pa.table({key: pa.array(values, types.get(key)) for key, values in columns.items()})
    return table.replace_schema_metadata({"proxt2i": json.dumps(about)})


def _distance(features: torch.Tensor, reference: torch.Tensor, groups: np.ndarray) -> dict:
    """A sampler's Fréchet distance: {"mean", "low", "high", "prompts", "without"}; no interval of a single prompt, or of too few pictures."""
    value, parts = frechet_distance(features, reference), torch.from_numpy(parts_of(groups))
    found = {"mean": value, "low": None, "high": None, "prompts": int(groups.max()) + 1, "without": None}
    if parts.max() > 0 and len(parts) - parts.bincount().max() >= 2:
        found["without"] = distances_without(features, parts, reference)
        low, high = interval_of(value, found["without"])
        found |= {"low": max(low, 0.0), "high": high}
    return found


def _differences(evaluation: Evaluation, means: dict, distances: dict) -> list[dict]:
    """Of every two samplers, the later minus the earlier: reward (or frechet_distance, which has no wins), mean difference, interval, wins."""
    found = []
    for i, a in enumerate(evaluation.samplers):
        for b in evaluation.samplers[i + 1:]:
            names = {"sampler": b.name, "minus": a.name}
            found += [{**names, "reward": reward.key, **difference(means[b][reward.key], means[a][reward.key])} for reward in evaluation.rewards]
            if distances and distances[a]["without"] is not None:
                value = distances[b]["mean"] - distances[a]["mean"]
                low, high = interval_of(value, distances[b]["without"] - distances[a]["without"])
                found.append({**names, "reward": "frechet_distance", "mean": value, "low": low, "high": high, "prompts": distances[a]["prompts"], "wins": None,
                              "excludes_zero": low > 0 or high < 0})  # fmt: skip
    return found


def _categories(evaluation: Evaluation, scores: dict, groups: np.ndarray, categories: list) -> list[dict]:
    """Means of each category; a prompt without one belongs to none."""
    found = []
    for category in sorted({c for c in categories if c is not None}):
        chosen = np.array([c == category for c in categories])
        own = numbered(groups[chosen].tolist())
        found += [{"category": category, "sampler": sampler.name, "reward": reward.key, **mean_and_interval(group_means(scores[sampler][reward.key][chosen], own))}
                  for sampler in evaluation.samplers for reward in evaluation.rewards]  # fmt: skip
    return found


def provenance(evaluation: Evaluation, made_with: list[dict], reference) -> dict:
    features = None
    if evaluation.features:
        features = {"name": evaluation.features.name, "sha256": evaluation.features.sha256, "path": str(evaluation.features.path or "shipped"),
                    "reference": evaluation.reference.name, "reference_sha256": evaluation.reference.sha256, "reference_pictures": len(reference), "size": reference.shape[1]}  # fmt: skip
    return {
        "prompts": {"source": evaluation.prompts.source, "sha256": evaluation.prompts.sha256, "number": len(evaluation.prompts.prompts)},
        "seed": evaluation.seed, "images_per_prompt": evaluation.images_per_prompt, "batch_size": evaluation.batch_size, "dtype": evaluation.dtype,
        "size": list(evaluation.size or evaluation.samplers[0].model.size), "models": {m.label: {"folder": str(m.folder), "sha256": m.sha256} for m in evaluation.models},
        "rewards": {r.key: reward_settings(r) for r in evaluation.rewards}, "features": features, "bootstrap": {"resamples": RESAMPLES, "seed": 0, "level": LEVEL},
        "made_with": made_with, "versions": versions(), "git_commit": git_commit(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    found = {"proxt2i": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Of the code, "-changed" when the working tree has more than that; None outside a clone of it."""
    if not (ROOT / ".git").exists():
        return None
    try:
        commit, status = (subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
                          for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]))  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-changed" if status else "")


def _notes(evaluation: Evaluation, reference, bad: list[str], made_with: dict, groups: np.ndarray) -> list[str]:
    """What a reader of the figures should know."""
    notes = []
    number = len(np.unique(groups))
    if number < FEW:
        notes.append(f"{number} prompts are few: intervals of fewer than {FEW} are too narrow.")
    if reference is not None and min(len(evaluation.pictures), len(reference)) <= reference.shape[1]:
        notes.append(f"{len(evaluation.pictures)} pictures against {len(reference)}, in {reference.shape[1]} features: with no more pictures than features the Fréchet distance "
                     "is too high; compare samplers of this table only.")  # fmt: skip
    if bad:
        notes.append(f"{len(bad)} of {len(evaluation.reference)} reference pictures could not be used, the first: {bad[0]}.")
    if len(made_with) > 1:
        notes.append("The pictures were drawn by different versions of torch or devices, see made_with.")
    if evaluation.prompts.ignored:
        notes.append(f"Fields of the prompts file that mean nothing here: {', '.join(evaluation.prompts.ignored)}.")
    speeds = [entry for sampler in evaluation.samplers if (entry := draw.latency(evaluation, sampler))]
    if len(devices := list(dict.fromkeys(entry["device"] for entry in speeds))) > 1:
        notes.append(f"Times were measured on {'; '.join(devices)}: delete the latency.json in samplers/ and start again to have them from one device.")
    if any(entry["ranks"] > 1 for entry in speeds):
        notes.append("Times were measured on rank 0 while other ranks worked: on shared CPUs they are too long.")
    if any(p.negative for p in evaluation.prompts.prompts) and any(s.guidance == 1 for s in evaluation.samplers):
        notes.append("Guidance 1 does not look at negative prompts.")
    return notes


def print_table(found: dict) -> None:
    """The summary, for a terminal."""
    rewards, width = list(found["rows"][0]["rewards"]), max(len(row["sampler"]) for row in found["rows"])
    with_fd = found["rows"][0]["frechet_distance"] is not None
    print(f"{'':<{width}}" + "".join(f"{name:>{max(20, len(name) + 2)}}" for name in rewards) + ("FD".rjust(18) if with_fd else "") + "  ms/image")
    for row in found["rows"]:
        line = f"{row['sampler']:<{width}}"
        for name in rewards:
            entry = row["rewards"][name]
            half = "" if entry["low"] is None else f" ± {(entry['high'] - entry['low']) / 2:.3g}"
            line += f"{entry['mean']:.4g}{half}".rjust(max(20, len(name) + 2))
        if with_fd:
            value, high = row["frechet_distance"], row["frechet_distance_high"]
            line += (f"{value:.3f}" + ("" if high is None else f" ± {high - value:.2g}")).rjust(18)
        print(line + (f"{row['ms_per_image']:>10.1f}" if row["ms_per_image"] else "         –"), flush=True)
    for note in found["notes"]:
        print(f"note: {note}")
