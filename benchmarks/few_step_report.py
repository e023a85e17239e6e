"""The table and the plot of few_step.py."""

import json
import platform
from pathlib import Path

import torch


def write_report(rows: list[dict], config: dict, out: Path) -> None:
    """results.json, table.md and few_step.png in `out`; prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    about = {"config": config, "torch": torch.__version__, "machine": platform.processor() or platform.machine(), "rows": rows}
    (out / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    text = table(rows)
    (out / "table.md").write_text(text)
    print(text)
    plot(rows, out / "few_step.png")
    print(f"-> {out}/table.md, few_step.png, results.json, grids/")


def table(rows: list[dict]) -> str:
    lines = ["| steps | sampler | network | grid | guidance | FD | FD raw | accuracy | all right | diversity |", "|---|---|---|---|---|---|---|---|---|---|"]
    for nfe in sorted({r["nfe"] for r in rows}):
        here = sorted((r for r in rows if r["nfe"] == nfe), key=lambda r: r["fd"]["mean"])
        for r in here:
            guidance = f"{r['guidance']:g}" + (f" below t={r['guidance_below']:g}" if r["guidance"] != 1 and r["guidance_below"] < 1 else "")
            fd = f"{r['fd']['mean']:.3f} [{r['fd']['low']:.3f}, {r['fd']['high']:.3f}]"
            lines.append(f"| {nfe} | {r['sampler']} | {r['network']} | {r['grid']} | {guidance} | {fd} | {r['fd_raw']['mean']:.3f} "
                         f"| {r['accuracy']['mean']:.4f} | {r['all_right']['mean']:.3f} | {r['diversity']:.3f} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in dict.fromkeys(r["sampler"] for r in rows):
        mine = sorted((r for r in rows if r["sampler"] == name), key=lambda r: r["nfe"])
        style = {"prox": "-o", "score": "--s", "prox as score": ":^", "score as prox": "-.v", "pairs": "--d"}[mine[0]["network"]]
        nfe, means = [r["nfe"] for r in mine], [r["fd"]["mean"] for r in mine]
        errors = [[m - r["fd"]["low"] for m, r in zip(means, mine)], [r["fd"]["high"] - m for m, r in zip(means, mine)]]
        for ax in axes:
            ax.errorbar(nfe, means, yerr=errors, fmt=style, label=name, markersize=4, linewidth=1.2, capsize=2)
    for ax in axes:
        ax.set_xscale("log")
        ticks = sorted({r["nfe"] for r in rows})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel("network evaluations")
        ax.set_ylabel("Fréchet distance")
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].set_title("all")
    best = sorted(r["fd"]["mean"] for r in rows)
    axes[1].set_ylim(0.95 * best[0], 2 * best[len(best) // 2])
    axes[1].set_title("the best half")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
