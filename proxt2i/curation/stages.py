"""The stages of a curation, each over whole units (shards), each skipping what is finished. docs/curation.md draws the picture.

    scan      every unit: read, check, decode once, filter, hash, score         -> work/scan/NAME.npy    tasks share the units
    dedup     all units at once: who is a duplicate of whom                     -> work/dedup/NAME.npy   one task
    caption   every unit: captions of what is left, and where each sample goes  -> work/caption/NAME.jsonl
    write     every shard of the result                                         -> train/, held_out/, hands/
    merge     checks that all is there; index, manifest, prompts, datacard, report                        one task
"""

from __future__ import annotations

from proxt2i.curation import state
from proxt2i.curation.caption import caption
from proxt2i.curation.config import read_placeholders
from proxt2i.curation.dedup import dedup
from proxt2i.curation.run import Run
from proxt2i.curation.scan import scan, scan_marker

STAGES = ("scan", "dedup", "caption", "write", "merge")
SHARED = ("scan", "caption", "write")  # by the tasks of an array


def run_stages(run: Run, stages: tuple[str, ...] = STAGES) -> dict:
    """Run `stages` in their order; returns the last one's summary. ValueError for what stands in the way, before any work on pictures."""
    units = run.units  # nothing to curate is said first
    read_placeholders(run.config.filter.placeholders)
    names = [unit.name for unit in units]
    if len(set(names)) < len(names):
        raise ValueError(f"{run.data}: two shards have the same name")
    if run.out.resolve() == run.data.resolve() or run.data.resolve() in run.out.resolve().parents or run.out.resolve() in run.data.resolve().parents:
        raise ValueError(f"the output folder {run.out} must not lie in the input folder {run.data}, nor the other way round")
    _load_models(run, stages)
    state.claim(run.out, run.config, str(run.data.resolve()))
    state.remove_leftovers(run.out, 0.0 if run.tasks == 1 else 3600.0)
    from proxt2i.curation.report import merge
    from proxt2i.curation.write import write

    functions = {"scan": scan, "dedup": dedup, "caption": caption, "write": write, "merge": merge}
    summary = {}
    for stage in stages:
        summary = functions[stage](run)
    return summary


def _load_models(run: Run, stages) -> None:
    """What is missing shall be said at once, not after hours of other work; weights are loaded when their stage comes."""
    c = run.config
    if "scan" in stages and any(scan_marker(run, unit) is None for unit in run.mine(run.units)):
        if c.aesthetic.reward is not None:
            run.load("scores")
        if c.hands.detector is not None:
            run.load("hands")
    if "caption" in stages and c.caption.model is not None:
        from proxt2i.curation.captioner import check_folder

        check_folder(c.caption.model)
