"""Curate a data set on a cluster: one job a stage, each after the one before it; shards are shared by arrays of jobs.

    scan -> dedup -> caption -> write -> merge      scan, caption and write: an array of --jobs; dedup and merge: one job

A stage whose jobs do not all succeed ends the chain: nothing after it starts. launchers.status then names the shards that could not be
treated; call the same command again, and only what is missing is done. docs/curation.md, docs/cluster.md.

examples
    python -m launchers.curate --partition gpu --cpu-partition cpu --gpus-per-node 1 --cpus-per-task 16 --jobs 32 --run /shared/runs/curate \\
        -- /shared/laion-face /shared/curated --config configs/curation_faces.yaml caption.model=/models/Qwen2.5-VL-7B-Instruct
    python -m launchers.curate --partition cpu --jobs 8 --dry-run -- /shared/shards /shared/curated
    python -m launchers.curate --local -- shards curated
    python -m launchers.status /shared/runs/curate
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from launchers.record import LAUNCH, write
from launchers.site import load_site
from launchers.status import show, status
from launchers.submit import Plan, Work, make_plan, parse, prepare, queue, run_here, script

STAGES = ("scan", "dedup", "caption", "write", "merge")
ARRAYS = ("scan", "caption", "write")
WORK = Work("curate", ["-m", "proxt2i.curation"], says="SHARDS OUT [--config YAML] [section.key=value ...]", one_rank=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("stages")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="jobs that share the shards in scan, caption and write (default: 1)")
    group.add_argument("--at-once", type=int, metavar="N", help="how many of them may run at the same time (default: all)")
    group.add_argument("--cpu-partition", metavar="P", help="partition of the stages that need no GPU (default: --partition)")
    group.add_argument("--wait", action="store_true", help="return when all jobs are over, with the summary; exit status 1 unless the data set is finished")


def look_at(arguments: list[str]):
    """(curation's own arguments, its config, its shards). Exits, or ValueError, where its jobs would."""
    from proxt2i.curation import state
    from proxt2i.curation.__main__ import parse_args
    from proxt2i.curation.config import load_curation
    from proxt2i.curation.sources import find_units

    own = parse_args(arguments)
    if own.stage or own.task_index is not None or own.task_count is not None:
        raise ValueError("--stage, --task-index and --task-count are the launcher's to give: leave them out")
    config = load_curation(own.config, own.overrides)
    units = find_units(own.data, config.read.files_per_part)
    state.check_free(own.out, config, str(own.data.resolve()))
    if config.caption.model is not None:
        from proxt2i.curation.captioner import check_folder

        check_folder(config.caption.model)
    return own, config, units


def plans_of(given: argparse.Namespace, arguments: list[str], config, num_shards: int) -> dict[str, Plan]:
    """One a stage. Only stages with a model get GPUs: those of --gpus-per-node, or one where the site has any."""
    if min(given.jobs, given.at_once or 1) < 1:
        raise ValueError("--jobs and --at-once must be at least 1")
    run_dir = (given.run or Path("runs") / f"curate-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    gpus = min(1, load_site(given.site).gpus_per_node or 0) if given.gpus_per_node is None else given.gpus_per_node
    models = {"scan": bool(config.aesthetic.reward or config.hands.detector), "caption": config.caption.model is not None}
    plans = {}
    for stage in STAGES:
        workers = min(given.jobs, num_shards) if stage in ARRAYS else 0
        on_gpu = models.get(stage, False)
        own = argparse.Namespace(**vars(given) | {"run": run_dir / stage, "name": f"{given.name or run_dir.name}-{stage}", "gpus_per_node": gpus if on_gpu else 0,
                                                  "partition": given.partition if on_gpu else given.cpu_partition or given.partition})
        plan = make_plan(WORK, own, [*arguments, "--stage", stage], None)
        if workers > 1:
            plan.job.update(workers=workers, worker_arguments=["--task-index", "{worker}", "--task-count", str(workers)])
            if given.at_once:
                plan.sbatch["array_parallelism"] = given.at_once
        plans[stage] = plan
    return plans


def after(plan: Plan, job: str | None) -> Plan:
    """`plan`, to start when `job` has succeeded, and never if it has not."""
    if job is None:
        return plan
    more = plan.sbatch["additional_parameters"] | {"dependency": f"afterok:{job}", "kill_on_invalid_dep": "yes"}
    return replace(plan, sbatch=plan.sbatch | {"additional_parameters": more})


def queue_all(plans: dict[str, Plan], own, num_shards: int, shard_size: int) -> Path:
    run_dir = plans["scan"].run_dir.parent
    for plan in plans.values():
        prepare(plan)  # all of them before any is queued
    (run_dir / LAUNCH).mkdir(exist_ok=True)
    write(run_dir / LAUNCH / "job.json", json.dumps({
        "kind": "curate", "run_dir": str(run_dir), "stages": list(plans), "data": str(own.data.resolve()), "out": str(own.out.resolve()), "shards": num_shards,
        "shard_size": shard_size}, indent=1))  # fmt: skip
    numbers: list[str] = []
    for stage, plan in plans.items():
        numbers.append(queue(after(plan, numbers[-1] if numbers else None)))
        print(f"{stage}: queued as job {numbers[-1]}" + (f", an array of {plan.workers}" if plan.workers else ""))
    print(f"  what it does: python -m launchers.status {run_dir}\n  cancel all:   scancel {' '.join(numbers)}")
    return run_dir


def wait(run_dir: Path) -> int:
    while (found := status(run_dir))["working"]:
        time.sleep(2)
    print(show(found))
    return int(found["doing"] != "finished")


def main(argv: list[str] | None = None) -> int:
    try:
        given, arguments = parse(WORK, __doc__, argv, add_options)
        own, config, units = look_at(arguments)
        if given.local:
            return run_here(WORK, make_plan(WORK, given, arguments, None))
        plans = plans_of(given, arguments, config, len(units))
        if given.dry_run:
            for stage, plan in plans.items():
                number = STAGES.index(stage)
                print(f"# ---- {stage} ----\n{script(after(plan, f'JOB_OF_{STAGES[number - 1].upper()}' if number else None))}")
            return 0
        run_dir = queue_all(plans, own, len(units), config.write.shard_size)
        return wait(run_dir) if given.wait else 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
