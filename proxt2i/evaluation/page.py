"""One HTML page about an evaluation, with everything inside, and the side-by-side grid as a picture."""

from __future__ import annotations

import base64
import io
import textwrap
import time
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from proxt2i.data.writing import write_atomically
from proxt2i.evaluation import folder
from proxt2i.evaluation.work import Evaluation
from proxt2i.images import to_pil
from proxt2i.report import TEMPLATE as RUN_PAGE
from proxt2i.report_plots import COLORS, STYLE, _svg

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 256  # pixels of the longer side of a picture in the page, at most
SHEET_SIDE = 160  # and in side_by_side.png
SMALL = 128  # smaller pictures are enlarged by a whole number, pixels kept square


def write_page(evaluation: Evaluation, found: dict) -> None:
    """report.html and side_by_side.png."""
    out, pictures = evaluation.out, shown_pictures(evaluation)
    if pictures:
        buffer = io.BytesIO()
        sheet(pictures, [evaluation.prompts.prompts[i].text for i in sorted(evaluation.shown)], [s.name for s in evaluation.samplers]).save(buffer, "PNG")
        write_atomically(out / "side_by_side.png", buffer.getvalue())
    template = jinja2.Template(TEMPLATE.read_text(), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    write_atomically(out / "report.html", template.render(context(evaluation, found, pictures)))


def context(evaluation: Evaluation, found: dict, pictures: list[list[Image.Image]]) -> dict:
    rows, first = found["rows"], evaluation.samplers[0].name
    return {
        "name": evaluation.out.resolve().name, "style": Markup(style()), "written": time.strftime("%Y-%m-%d %H:%M"), "rows": rows, "rewards": list(rows[0]["rewards"]),
        "facts": _facts(found["about"]), "notes": found["notes"], "plots": _plots(found), "first": first, "features": found["about"]["features"],
        "differences": [d for d in found["differences"] if d["minus"] == first], "all_pairs": len(rows) > 2, "categories": _by_category(found),
        "grid": [{"prompt": evaluation.prompts.prompts[i].text, "seed": next(p.seed for p in evaluation.pictures if p.prompt == i), "urls": [_url(p) for p in line]}
                 for i, line in zip(sorted(evaluation.shown), pictures)], "samplers": [s.name for s in evaluation.samplers],
    }  # fmt: skip


def style() -> str:
    """The sheet of a run's page, so that all pages look alike."""
    page = RUN_PAGE.read_text()
    return page[page.index("<style>") + len("<style>"):page.index("</style>")]


def _facts(about: dict) -> list[tuple[str, str]]:
    prompts, made = about["prompts"], about["made_with"]
    facts = [("prompts", f"{prompts['number']:,} of {prompts['source']}, SHA-256 {prompts['sha256']}"),
             ("seeds", f"{about['images_per_prompt']} picture(s) a prompt, counted from {about['seed']} where a prompt has no seed of its own"),
             ("pictures", f"{about['size'][0]} x {about['size'][1]} pixels, drawn in {about['dtype']}, {about['batch_size']} together")]  # fmt: skip
    facts += [(f"model {label}", f"{model['folder']}, SHA-256 {model['sha256']}") for label, model in about["models"].items()]
    facts += [(f"reward {key}", ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None)) for key, settings in about["rewards"].items()]
    if about["features"]:
        f = about["features"]
        facts += [("features of FD", f"{f['name']} ({f['size']} values), {f['path']}, SHA-256 {f['sha256']}"),
                  ("reference of FD", f"{f['reference_pictures']:,} pictures of {f['reference']}, SHA-256 {f['reference_sha256']}")]  # fmt: skip
    facts += [("drawn on", "; ".join(f"{m['device']}, torch {m['torch']}" for m in made)), ("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items()))]
    return facts + [("code", f"git commit {about['git_commit']}" if about["git_commit"] else "no git clone")]


# -- plots ------------------------------------------------------------------------------------------------------------


def _plots(found: dict) -> list[dict]:
    rows = found["rows"]
    with matplotlib.rc_context(STYLE):
        return [{"title": f"{name}: mean and 95 % interval, by number of steps", "svg": _by_steps(rows, name)} for name in rows[0]["rewards"]]


def _by_steps(rows: list[dict], name: str) -> Markup:
    """A line for every model, plan and guidance."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["plan"], row["guidance"]), []).append(row)
    figure = Figure(figsize=(4.9, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (key, members) in enumerate(lines.items()):
        members = sorted(members, key=lambda row: row["steps"])
        entries = [row["rewards"][name] for row in members]
        mean = np.array([e["mean"] for e in entries])
        spread = np.array([[e["mean"] - e["low"] if e["low"] is not None else 0.0, e["high"] - e["mean"] if e["high"] is not None else 0.0] for e in entries]).T
        shift = 0.06 * (i - (len(lines) - 1) / 2)  # so that bars do not hide each other
        label = " ".join(part for part in (key[0] if len({row["model"] for row in rows}) > 1 else "", key[1], f"guidance {key[2]:g}") if part)
        axes.errorbar([row["steps"] + shift for row in members], mean, yerr=np.maximum(spread, 0), color=COLORS[i % len(COLORS)], lw=1.2, marker="o", ms=3.5, capsize=2, label=label)
    axes.set_xticks(sorted({row["steps"] for row in rows}))
    axes.set_xlabel("steps")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=7)
    return _svg(figure)


def _by_category(found: dict) -> list[dict]:
    """[{"category", "prompts", "cells": {(sampler, reward): entry}}]"""
    tables: dict[str, dict] = {}
    for row in found["categories"]:
        entry = tables.setdefault(row["category"], {"category": row["category"], "prompts": row["prompts"], "cells": {}})
        entry["cells"][row["sampler"], row["reward"]] = row
    return list(tables.values())


# -- pictures ---------------------------------------------------------------------------------------------------------


def shown_pictures(evaluation: Evaluation) -> list[list[Image.Image]]:
    """A line for each shown prompt: the same prompt and seed by every sampler."""
    wanted = {p.prompt: folder.name_of(p) for p in evaluation.pictures if p.prompt in evaluation.shown and p.image == 0}
    columns = []
    for sampler in evaluation.samplers:
        found: dict = {}
        for unit in evaluation.units(sampler):
            if any(p.image == 0 and p.prompt in wanted for p in unit.pictures):
                found |= folder.read_pictures(evaluation, unit) or {}
        columns.append({prompt: to_pil(found[name]) for prompt, name in wanted.items()})
    return [[column[prompt] for column in columns] for prompt in sorted(wanted)]


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        return picture
    scale = max(1, SMALL // max(picture.size))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def sheet(pictures: list[list[Image.Image]], prompts: list[str], names: list[str]) -> Image.Image:
    """A line a prompt, a column a sampler, with their names."""
    cells = [[_fitted(picture, SHEET_SIDE) for picture in line] for line in pictures]
    width, height = (max(cell.size[i] for line in cells for cell in line) for i in (0, 1))
    font, gap, band = ImageFont.load_default(12), 6, 20
    titles = [textwrap.wrap(name, max(4, width // 7)) for name in names]
    head = band * max(map(len, titles))
    result = Image.new("RGB", (gap + len(names) * (width + gap), gap + head + len(cells) * (height + band + gap)), "white")
    pen = ImageDraw.Draw(result)
    for c, title in enumerate(titles):
        pen.multiline_text((gap + c * (width + gap), gap), "\n".join(title), fill="black", font=font)
    for r, line in enumerate(cells):
        top = gap + head + r * (height + band + gap)
        most = max(8, (result.width - 2 * gap) // 7)
        text = prompts[r] if len(prompts[r]) <= most else prompts[r][: most - 1] + "…"
        pen.text((gap, top), text.replace("\n", " "), fill="black", font=font)
        for c, cell in enumerate(line):
            result.paste(cell, (gap + c * (width + gap), top + band))
    return result


def _url(picture: Image.Image) -> str:
    buffer, picture = io.BytesIO(), _fitted(picture, SIDE)
    if max(picture.size) <= SMALL:
        picture.save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
