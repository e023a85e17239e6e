"""One HTML page about a training run, finished, running or crashed: settings, figures, curves, sample grids, evaluation.

    python -m proxt2i.report runs/portraits            writes runs/portraits/report.html

The page is one file with everything inside; it can be mailed, and needs no network. Call again for newer figures.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from safetensors import SafetensorError, safe_open

from proxt2i.config import Config
from proxt2i.data.index import write_atomically
from proxt2i.grpo_config import GrpoConfig
from proxt2i.report_plots import plots
from proxt2i.training.checkpoint import finished
from proxt2i.training.state import SavedState
from proxt2i.training.tracking import read_rows

TEMPLATE = Path(__file__).with_name("report_page.html")
WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_PNG = 200_000  # bytes; larger grids go into the page as JPEG
FIGURES = (  # key in stats.jsonl, name, format
    ("loss", "loss", ".4f"), ("grad_norm", "gradient norm", ".3f"), ("lr", "learning rate", ".2e"),
    ("images_per_s", "images/s", ",.0f"), ("tokens_per_s", "tokens/s", ",.0f"), ("tflops_per_s", "TFLOP/s", ",.3g"), ("mfu", "MFU", ".1%"),
    ("rollout_share", "drawing, decoding and waiting for scores", ".1%"), ("reward_wait", "of it waiting for scores", ".1%"),
    ("reward_share", "scoring, beside the drawing", ".1%"), ("train_share", "updates", ".1%"),
    ("data_wait", "waiting for data", ".1%"), ("memory_gib", "memory of the fullest rank, GiB", ".2f"),
    ("bad_steps", "steps skipped", ",.0f"), ("bad_samples", "samples skipped", ",.0f"),
)  # fmt: skip
EVALUATION = (("sampler", "s"), ("steps", "d"), ("guidance", "g"), ("accuracy", ".3f"), ("all_right", ".3f"), ("frechet_distance", ".2f"),
              ("diversity", ".2f"), ("images_per_s", ".0f"))  # fmt: skip


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the page about the run in `run_dir` to `out` (default: report.html in it). Raises ValueError if it is no run folder."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such folder; give the train.run_dir of a run")
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is no run folder: it holds no config.yaml; give the train.run_dir of a run")
    out = Path(out or run_dir / "report.html")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file")
    template = jinja2.Template(TEMPLATE.read_text(), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, template.render(collect(run_dir)))
    return out


def collect(run_dir: Path) -> dict:
    """Everything the page shows, by the names that the template uses."""
    config = _read_config(run_dir / "config.yaml")
    rows = read_rows(run_dir / "stats.jsonl")
    last, total = rows[-1] if rows else {"images": 0}, config.get("train", {}).get("images", 0)
    recent = _mean_of(rows[-max(1, len(rows) // 20):])
    return {
        "name": run_dir.resolve().name, "written": time.strftime("%Y-%m-%d %H:%M"), "status": _status(run_dir, last, total, recent),
        "images": last["images"], "total": total, "facts": _facts(run_dir, config), "changed": _changed(config),
        "figures": [(name, format(last[key], form), format(recent[key], form)) for key, name, form in FIGURES if key in last],
        "plots": plots(rows), "grids": [_picture(path) for path in sorted((run_dir / "samples").glob("*.png"))],
        "prompts": config.get("sample", {}).get("prompts", []), "evaluations": _evaluations(run_dir),
        "checkpoints": _checkpoints(run_dir / "checkpoints"), "model": run_dir / "model" if (run_dir / "model").is_dir() else None,
    }  # fmt: skip


def _read_config(path: Path) -> dict:
    """As plain values: a run of an older version may have other keys than this one's Config."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml and OmegaConf raise many kinds
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise ValueError(f"{path} holds no sections of settings")
    return config


def _changed(config: dict) -> list[tuple[str, object, object]]:
    """(key, value, default) of every setting that is not the default's."""
    defaults = dataclasses.asdict(GrpoConfig() if "rollout" in config else Config())
    return [(f"{section}.{key}", value, defaults.get(section, {}).get(key, "not a setting of this version"))
            for section, values in config.items() for key, value in values.items()
            if value != defaults.get(section, {}).get(key, dataclasses.MISSING)]  # fmt: skip


def _status(run_dir: Path, last: dict, total: int, recent: dict) -> str:
    if last["images"] >= total and (run_dir / "model").is_dir():
        return "finished"
    if not last["images"]:
        return "no statistics yet"
    minutes = (time.time() - (run_dir / "stats.jsonl").stat().st_mtime) / 60
    left = (total - last["images"]) / max(recent.get("images_per_s", 0.0), 1e-9) / 3600
    return f"not finished: last row written {minutes:,.0f} min ago; about {left:,.1f} h of training left"


def _facts(run_dir: Path, config: dict) -> list[tuple[str, str]]:
    if "rollout" in config:
        facts = [("objective", "GRPO"), ("network", config["model"].get("init_from") or "the shipped model")]
    else:
        facts = [("objective", config.get("diffusion", {}).get("objective", "?")), ("network", config.get("model", {}).get("preset", "?"))]
    size = _num_parameters(run_dir)
    if size:
        adapters = config.get("policy", {}).get("lora_rank")
        facts.append((f"parameters of the adapters (rank {adapters})" if adapters else "parameters", f"{size / 1e6:,.2f} M"))
    deepspeed = _json(run_dir / "deepspeed.json")
    if deepspeed:
        batch, micro = deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]
        accumulation = deepspeed["gradient_accumulation_steps"]
        unit = "passes" if "rollout" in config else "images"  # of GRPO: one for every transition of an image
        facts += [("DeepSpeed", f"ZeRO-{deepspeed['zero_optimization']['stage']}"),
                  (f"{unit} a step", f"{batch:,} = {batch // micro // accumulation:,} rank(s) x {accumulation:,} x {micro:,}")]
    diffusers = _json(run_dir / "model" / "uvit" / "config.json").get("_diffusers_version")
    return facts + ([("diffusers", diffusers)] if diffusers else [])


def _num_parameters(run_dir: Path) -> int | None:
    """From the newest readable checkpoint, or the model folder of a run whose checkpoints are gone."""
    for name in finished(run_dir / "checkpoints"):
        try:
            return sum(SavedState(run_dir / "checkpoints" / name).sizes().values())
        except ValueError:
            continue
    try:
        with safe_open(run_dir / "model" / "uvit" / WEIGHTS, "pt") as file:
            return sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())
    except (OSError, SafetensorError):
        return None


def _evaluations(run_dir: Path) -> list[dict]:
    """Tables of `python -m proxt2i.evaluate --out RUN/evaluation` (any folder of the run whose name ends so)."""
    found = []
    for path in sorted(run_dir.glob("*evaluation/results.json")):
        rows = [{**row, **{name: entry["mean"] for name, entry in row.get("rewards", {}).items()}} for row in _json(path).get("rows", [])]
        rewards = [(name, ".4g") for name in (rows[0].get("rewards", {}) if rows else {})]
        keys = [(key, form) for key, form in (*EVALUATION, *rewards) if any(row.get(key) is not None for row in rows)]
        if keys:
            cells = [[format(row[key], form) if row.get(key) is not None else "–" for key, form in keys] for row in rows]
            found.append({"name": path.parent.name, "head": [key.replace("_", " ") for key, _ in keys], "rows": cells})
    return found


def _checkpoints(folder: Path) -> list[tuple[str, str, str]]:
    """(name, size, note), newest first."""
    latest = (folder / "latest").read_text().strip() if (folder / "latest").is_file() else None
    found = []
    for name in finished(folder):
        size = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        found.append((name, f"{size / 2**20:,.1f} MiB", "latest" if name == latest else ""))
    return found


def _picture(path: Path) -> dict:
    """{"name", "width", "url"} of an image, its bytes in the URL."""
    with Image.open(path) as image:
        width, data, kind = image.width, path.read_bytes(), "png"
        if len(data) > MAX_PNG:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=88)
            data, kind = buffer.getvalue(), "jpeg"
    name = f"{int(path.stem):,} images" if path.stem.isdigit() else path.stem
    return {"name": name, "width": width, "url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}


def _mean_of(rows: Sequence[dict]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in rows[-1]} if rows else {}


def _json(path: Path) -> dict:
    """The object in a file; {} when it is missing or unreadable: a page about a crashed run shows what there is."""
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m proxt2i.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder (train.run_dir)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: RUN/report.html)")
    args = parser.parse_args(argv)
    try:
        print(write_report(args.run, args.out))
        return 0
    except (ValueError, OSError) as error:
        print(f"proxt2i.report: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
