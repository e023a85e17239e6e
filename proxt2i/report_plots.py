"""The report's curves, drawn from the rows of stats.jsonl as SVG that takes the page's text colour."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

INK = "#010203"  # stands for the page's text colour
COLORS = ("#3b82f6", "#f97316", "#10b981", "#e11d48", "#8b5cf6", "#06b6d4", "#ca8a04", "#ec4899", "#65a30d", "#64748b")
MAX_POINTS = 600  # of a curve; longer runs are averaged down to it
SMALL = (  # key in stats.jsonl, title
    ("lr", "learning rate of AdamW"), ("grad_norm", "gradient norm"), ("images_per_s", "images/s"), ("mfu", "MFU"),
    ("data_wait", "share of the time spent waiting for data"), ("memory_gib", "memory of the fullest rank, GiB"),
    ("bad_steps", "steps skipped so far"), ("bad_samples", "samples skipped so far"),
)  # fmt: skip
GRPO = ("reward/", "eval/", "diversity/", "kl", "clip_fraction", "spread")  # beginnings of the keys of a GRPO run
SHARES = (("rollout_share", "rollout"), ("reward_share", "rewards, beside it"), ("reward_wait", "waiting for them"), ("train_share", "updates"))
QUIET = ("bad_steps", "bad_samples")  # no curve where there were none
STYLE = {
    "svg.fonttype": "none", "font.size": 10, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#888888",
    "grid.alpha": 0.25, "axes.titlesize": 11, "axes.formatter.useoffset": False,
}  # fmt: skip


def plots(rows: Sequence[dict[str, float]]) -> list[dict]:
    """[{"title", "svg", "wide"}] for rows of stats.jsonl, oldest first; none for fewer than two rows."""
    if len(rows) < 2:
        return []
    curves = thinned(rows)
    with matplotlib.rc_context(STYLE):
        found = [{"title": "loss", "svg": _losses(curves), "wide": True}] if "loss" in curves else []
        found += [{"title": key.replace("/", ": "), "svg": _small(curves, key, from_zero=False), "wide": False} for key in curves if key.startswith(GRPO)]
        known = {key: values[np.isfinite(values)] for key, values in curves.items()}
        last = {key: values[-max(1, len(values) // 20):].mean() for key, values in known.items() if len(values)}
        by_step = {tuple(map(int, match.groups())): value for key, value in last.items() if (match := re.fullmatch(r"loss/N(\d+)/k(\d+)", key))}
        if by_step:
            found.append({"title": "loss at every step of every step count, mean of the last rows", "svg": _steps(by_step), "wide": True})
        shown = [(key, title) for key, title in SMALL if key in curves and (key not in QUIET or last[key] > 0)]
        found += [{"title": title, "svg": _small(curves, key), "wide": False} for key, title in shown]
        if "rollout_share" in curves:
            found.append({"title": "shares of the time", "svg": _shares(curves), "wide": False})
    return found


def thinned(rows: Sequence[dict[str, float]], points: int = MAX_POINTS) -> dict[str, np.ndarray]:
    """{key: float64 [rows or `points`]}, NaN where a row has no such key; longer runs are averaged over groups of neighbours."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    values = np.array([[row.get(key, np.nan) for key in keys] for row in rows], dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, as it should be
        values = np.array([np.nanmean(part, 0) for part in np.array_split(values, min(points, len(rows)))])
    return dict(zip(keys, values.T))


def _losses(curves: dict[str, np.ndarray]) -> Markup:
    figure, axes = _axes(9.5, 3.6)
    names = [key for key in curves if key.startswith("loss/") and key.count("/") == 1]
    for i, key in enumerate(names):
        axes.plot(curves["images"], curves[key], lw=1, color=COLORS[i % len(COLORS)], label=key.removeprefix("loss/").replace("N", "N = "))
    axes.plot(curves["images"], curves["loss"], lw=2, color=INK, label="all")
    if min(np.nanmin(curves[key]) for key in ["loss", *names]) > 0:
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure)


def _steps(by_step: dict[tuple[int, int], float]) -> Markup:
    """Heat map: a row for every step count N, a column for step k (k = 1 is the last one, next to the picture)."""
    counts, most = sorted({n for n, _ in by_step}), max(k for _, k in by_step)
    values = np.array([[by_step.get((n, k), np.nan) for k in range(1, most + 1)] for n in counts])
    figure, axes = _axes(max(4.0, 0.75 * most + 1.5), 0.42 * len(counts) + 0.9)
    axes.grid(False)
    low, high = np.nanmin(values), np.nanmax(values)
    norm = (LogNorm if low > 0 else Normalize)(low, high)  # losses span orders of magnitude
    axes.pcolormesh(values, cmap="viridis", norm=norm)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(j + 0.5, i + 0.5, f"{value:.2g}", ha="center", va="center", fontsize=8, color="black" if norm(value) > 0.6 else "white")
    axes.set_yticks(np.arange(len(counts)) + 0.5, [f"N = {n}" for n in counts])
    axes.set_xticks(np.arange(most) + 0.5, [f"k = {k}" for k in range(1, most + 1)])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xlabel("")
    return _svg(figure)


def _small(curves: dict[str, np.ndarray], key: str, from_zero: bool = True) -> Markup:
    figure, axes = _axes(4.6, 2.2)
    axes.plot(curves["images"], curves[key], lw=1.2, color=COLORS[0])
    if key in ("mfu", "data_wait"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if from_zero and key != "grad_norm":
        axes.set_ylim(0, 1.05 * np.nanmax(curves[key]) or 1.0)
    return _svg(figure)


def _shares(curves: dict[str, np.ndarray]) -> Markup:
    """Of a GRPO run. Rewards are scored while pictures are drawn, so that the shares may add up to more than 1."""
    figure, axes = _axes(4.6, 2.2)
    for (key, name), color in zip(SHARES, COLORS):
        if key in curves:
            axes.plot(curves["images"], curves[key], lw=1.2, color=color, label=name)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _svg(figure)


def _axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("images seen")
    return figure, axes


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg"):].replace(INK, "currentColor"))
