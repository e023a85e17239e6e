"""Turn img2dataset shards, or a folder of images, into filtered, deduplicated, scored, captioned shards for training.

    python -m proxt2i.curation SHARDS OUT                                              # everything, on this machine
    python -m proxt2i.curation SHARDS OUT --stage scan --task-index 3 --task-count 16  # one task of 16 of one stage
    python -m proxt2i.curation IMAGES OUT filter.min_short=512 caption.model=/models/Qwen2.5-VL-7B-Instruct

Call it again after a kill and it goes on; nothing is done twice. docs/curation.md, docs/your-own-data.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from proxt2i.curation.config import load_curation


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m proxt2i.curation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="SHARDS", help="folder of .tar shards, or of images (captions beside them as NAME.txt)")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the result")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="settings; proxt2i/curation/config.py lists them")
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="YAML", help="file of settings; later ones win")
    parser.add_argument("--stage", metavar="STAGE", help="only this one: scan, dedup, caption, write or merge (default: all, in this order)")
    parser.add_argument("--task-index", type=int, metavar="I", help="this task's number from 0 on (default: Slurm's array task, or 0)")
    parser.add_argument("--task-count", type=int, metavar="N", help="tasks that share a stage (default: Slurm's array, or 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (settings have no dashes: filter.min_short=512)")
    return args


def task_of(args: argparse.Namespace, environment=os.environ) -> tuple[int, int]:
    """(index, count) by the flags, else by Slurm's array. ValueError if they make no sense."""
    if (args.task_index is None) != (args.task_count is None):
        raise ValueError("--task-index and --task-count belong together")
    if args.task_index is not None:
        index, count = args.task_index, args.task_count
    elif "SLURM_ARRAY_TASK_ID" in environment:
        index = int(environment["SLURM_ARRAY_TASK_ID"]) - int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        count = int(environment.get("SLURM_ARRAY_TASK_COUNT", index + 1))
    else:
        index, count = 0, 1
    if not 0 <= index < count:
        raise ValueError(f"task {index} of {count}: --task-index must lie between 0 and --task-count - 1 (a Slurm array must be without gaps, like --array=0-15)")
    return index, count


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        from proxt2i.curation.run import Run
        from proxt2i.curation.stages import SHARED, STAGES, run_stages

        if args.stage is not None and args.stage not in STAGES:
            raise ValueError(f"--stage {args.stage}: there are {', '.join(STAGES)}")
        task, tasks = task_of(args)
        if tasks > 1 and args.stage is None:
            raise ValueError(f"with {tasks} tasks name a --stage: {', '.join(SHARED)} are shared by the tasks, and each needs what comes before it to be finished by all "
                             f"(order: {', '.join(STAGES)}; docs/curation.md has the job script)")
        run = Run(args.data, args.out, load_curation(args.config, args.overrides), task, tasks, args.quiet)
        summary = run_stages(run, (args.stage,) if args.stage else STAGES)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: proxt2i.curation: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1  # 2: to try again is of no use
    except KeyboardInterrupt:
        print("proxt2i.curation: interrupted; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    if "samples_out" in summary:
        print(f"{summary['samples_out']:,} of {summary['samples_in']:,} samples kept in {args.out}")
        for cause, count in summary["dropped"].items():
            print(f"  {count:>12,}  {cause}")
        for line in summary["damaged_shards"]:
            print(f"  damaged: {line}")
        if "held_out" not in summary["splits"]:
            print("  no picture is held out, so there are no prompts for evaluation: write.held_out=0.05 and a new OUT would have some")
        print(f"report: {args.out / 'report.html'}\ntrain on it: deepspeed proxt2i/train.py --deepspeed configs/zero2.json data.shards={args.out / 'train'} ...")
    elif "images" in summary:
        print(f"{args.stage}: {summary['images']:,} images in {summary['seconds']:,.1f} s, {summary['images'] / max(summary['seconds'], 1e-9):,.1f} images/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
