"""The command line that all launchers share: check everything, fill RUN/launch, and queue the job (or show it, or run it here)."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launchers import reward_workers, slurm
from launchers.record import LAUNCH, ROOT, History, code_version, num_workers, write
from launchers.site import Site, load_site

# A job that was queued from a shell without `module` (a cron job, an editor) has none either: take it from where systems keep it.
MODULES_INIT = ("type module >/dev/null 2>&1 || for init in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh; "
                "do [ ! -r $init ] || . $init; done")
DEFAULT_MINUTES = 24 * 60
LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "tmpfs", "ramfs", "overlay", "aufs", "squashfs")
OPTIONS = """\
Everything after `--` is the command's own. The job saves and comes back by itself after a preemption, a time limit, a failed node or a
failed rank; it stops for good when it is finished, cancelled (scancel JOB), stopped by hand (scancel --signal=INT JOB: it saves first),
refuses its input, or fails again and again without getting further. RUN/launch holds what it did; docs/cluster.md explains all of it.
"""


@dataclass(frozen=True)
class Work:
    """One kind of long job, and what its front end knows of it."""
    name: str
    arguments: list[str]  # of python, before the user's own
    says: str  # what `--` is followed by
    resumes: bool = False  # like train.py: takes --resume, counts images in stats.jsonl
    together: bool = False  # its ranks meet each other, so that one that dies ends all
    one_rank: bool = False
    run_dir: Callable[[list[str], int], Path] | None = None  # from the user's arguments; None: --run
    check: Callable[[list[str], int], None] | None = None  # raises ValueError, or exits with a message, where the job would
    output: Callable[[list[str]], Path] | None = None  # where launchers.progress finds how far it is


def add_options(parser: argparse.ArgumentParser, work: Work) -> None:
    cluster = parser.add_argument_group("what the job gets")
    cluster.add_argument("--partition", metavar="P", help="partition (default: the site file's, or the cluster's default)")
    cluster.add_argument("--time", metavar="H:M:S",
                         help="time limit of one start; the job comes back for the rest (default: the site file's, or a day, or what the partition allows)")
    if not work.one_rank:
        cluster.add_argument("--nodes", default="1", metavar="N", help="machines; MIN-MAX: as many as there are, so that a lost one is not waited for (default: 1)")
        cluster.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks on each (default: one a GPU, or 1 without GPUs)")
    cluster.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs on each (default: the site file's, or 0)")
    cluster.add_argument("--cpus-per-task", type=int, metavar="N", help="CPUs of each rank (default: the site file's)")
    cluster.add_argument("--site", type=Path, metavar="YAML", help="settings of this cluster: account, modules, container, ... (configs/site_example.yaml)")
    cluster.add_argument("--name", metavar="NAME", help="the job's name in the queue (default: the run folder's)")
    if work.run_dir is None:
        parser.add_argument("--run", type=Path, metavar="RUN", help=f"folder for the job's record and logs (default: runs/{work.name}-TIME)")
    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="check everything and print the sbatch script; queue nothing")
    how.add_argument("--local", action="store_true", help="run the same command on this machine, without Slurm")
    how.add_argument("--no-check", action="store_true",
                     help=f"do not let {work.name} check its arguments first (where this machine lacks torch, say)")
    how.add_argument("--max-failures", type=int, metavar="N",
                     help=f"failed starts before the job gives up (default: {_max_failures(work)}); preemptions do not count")
    how.add_argument("--hang-minutes", type=float, default=60, metavar="M",
                     help="end the ranks, and count a failure, when nothing was written for so long; 0: never (default: 60)")
    how.add_argument("--signal-before", type=int, default=180, metavar="S",
                     help="seconds before the time limit at which the ranks are told to save; Slurm may be up to 60 early (default: 180)")


def _max_failures(work: Work) -> int:
    return 50 if work.resumes else 3


def launch(work: Work, description: str, argv: list[str] | None = None, more_options=None, items_of=None, wait=None) -> int:
    """The whole of a front end. Exit status: 0, or 2 with the reason on stderr when nothing was queued; with --local the command's.

    An array's front end adds options, items_of(given, arguments), its part of job.json, and wait(run_dir) for --wait.
    """
    try:
        given, arguments = parse(work, description, argv, more_options)
        plan = make_plan(work, given, arguments, items_of(given, arguments) if items_of else None)
        if given.local:
            return run_here(work, plan)
        if given.dry_run:
            print(script(plan))
            return 0
        number = queue(plan)
        print(f"queued as job {number}\n  what it does:  python -m launchers.status {plan.run_dir}\n  save and stop: scancel --signal=INT {number}")
        return wait(plan.run_dir) if wait and given.wait else 0
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(work: Work, description: str, argv: list[str] | None, more_options=None) -> tuple[argparse.Namespace, list[str]]:
    """(the launcher's own options, what followed `--`). ValueError where one of them cannot be meant."""
    parser = argparse.ArgumentParser(f"python -m launchers.{work.name}", description=description, epilog=OPTIONS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, usage=f"%(prog)s [options] -- {work.says}")
    if more_options:
        more_options(parser)
    add_options(parser, work)
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    (given, strange), arguments = parser.parse_known_args(argv[:at]), argv[at + 1:]
    if at == len(argv):
        raise ValueError(f"`--` is missing: what follows it goes to the command itself, like: python -m launchers.{work.name} [options] -- {work.says}")
    if strange:
        raise ValueError(f"unknown option {strange[0]}; an argument of the command itself goes behind `--`, and --help lists the launcher's own")
    return given, arguments


@dataclass(frozen=True)
class Plan:
    """A job that has passed every check."""
    run_dir: Path
    job: dict  # for launch/job.json
    must_be_new: bool
    sbatch: dict  # submitit's parameters; empty with --local

    @property
    def workers(self) -> int:
        """Jobs in the array; 0: one job, and no array."""
        return num_workers(self.job)


def make_plan(work: Work, given: argparse.Namespace, arguments: list[str], items: dict | None) -> Plan:
    """Everything is checked here, before anything is queued or written."""
    site = load_site(given.site)
    if given.cpus_per_task:
        site = replace(site, cpus_per_task=given.cpus_per_task)
    gpus = site.gpus_per_node or 0 if given.gpus_per_node is None else given.gpus_per_node
    fewest, nodes = (1, 1) if work.one_rank else read_nodes(given.nodes)
    tasks = 1 if work.one_rank else max(1, gpus) if given.tasks_per_node is None else given.tasks_per_node
    if min(fewest, tasks) < 1 or gpus < 0:
        raise ValueError("--nodes and --tasks-per-node must be at least 1, --gpus-per-node at least 0")
    if given.local and nodes > 1:
        raise ValueError("--local runs on this machine alone: leave --nodes out")
    if not given.local:
        _require_slurm(work)
        partition, minutes = check_partition(given.partition or site.partition, nodes, gpus, given.time or site.time)
    if not given.no_check and work.check:
        work.check(arguments, nodes * tasks)
    run_dir = work.run_dir(arguments, nodes * tasks) if work.run_dir else given.run or Path("runs") / f"{work.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = run_dir.resolve()
    counts = usable_counts(work, arguments, fewest, nodes, tasks)
    if not given.local:
        refuse_if_not_shared(run_dir, partition, site)
    job = {"kind": work.name, "run_dir": str(run_dir), "cwd": os.getcwd(), "resumes": work.resumes, "together": work.together, "nodes": nodes,
           "node_counts": counts, "tasks_per_node": tasks, "gpus_per_node": gpus, "max_failures": _max_failures(work) if given.max_failures is None else given.max_failures,
           "hang_minutes": given.hang_minutes, "user": getpass.getuser(), "site": asdict(site),
           "command": [site.python or sys.executable, *work.arguments, *([str(run_dir)] if items else arguments)]}  # fmt: skip
    if items:
        job["items"] = items
    if getattr(given, "reward_worker", None):
        if given.local:
            raise ValueError("--reward-worker is a part of a Slurm job; with --local start `python -m proxt2i.rewards.serve` yourself")
        where, _ = check_partition(given.reward_partition or partition, 1, given.reward_gpus, None, ("--reward-partition", "--reward-gpus"))
        job["reward_workers"] = {"arguments": given.reward_worker, "partition": where, "gpus": given.reward_gpus, "cpus": given.reward_cpus,
                                 "constraint": site.constraint if where == partition else None}
    if work.output:
        with contextlib.suppress(ImportError):  # with --no-check on a machine without torch
            job["output"] = str(work.output(arguments).resolve())
    sbatch = {} if given.local else sbatch_parameters(site, job, partition, minutes, given.signal_before, given.name or run_dir.name)
    if items and given.at_once:
        sbatch["array_parallelism"] = given.at_once
    return Plan(run_dir, job, work.resumes and "--resume" not in arguments, sbatch)


# ---------------------------------------------------------------------------------------------------------------------
# Checks, all before anything is queued.


def read_nodes(text: str) -> tuple[int, int]:
    """(fewest, most) of "4" or "2-4"."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"--nodes {text}: give a number, or the fewest and the most like 2-4")
    return int(match[1]), int(match[2] or match[1])


def usable_counts(work: Work, arguments: list[str], fewest: int, most: int, tasks: int) -> list[int]:
    """Numbers of nodes that the batch divides among. ValueError if the fewest are none of them; `most` has been checked."""
    usable = [most]
    for count in range(fewest, most) if work.run_dir else ():
        try:
            work.run_dir(arguments, count * tasks)
            usable.append(count)
        except ValueError as error:
            if count == fewest:
                raise ValueError(f"--nodes {fewest}-{most}: {fewest} will not do: {error}") from None
    return sorted(usable) if work.run_dir else list(range(fewest, most + 1))


def _require_slurm(work: Work) -> None:
    if shutil.which("sbatch") is None:
        raise ValueError(f"no sbatch on PATH, so this machine cannot queue Slurm jobs. Run this on the cluster's login node, or add --local: it runs "
                         f"the same {work.name} on this machine")
    with contextlib.suppress(ImportError):
        import submitit  # noqa: F401

        return
    raise ValueError("submitit is not installed: pip install submitit")


def check_partition(wanted: str | None, nodes: int, gpus: int, limit: str | None, flags=("--partition", "--gpus-per-node")) -> tuple[str, int]:
    """(the partition's name, the time limit in minutes). ValueError names the flag (two of them: `flags`) and says what the cluster has."""
    found = slurm.partitions()
    have = ", ".join(f"{p.name} ({p.nodes} nodes, {p.gpus_per_node or 'no'} GPUs each)" for p in found.values())
    default = next((p.name for p in found.values() if p.is_default), None)
    name = wanted or default
    if name is None:
        raise ValueError(f"{flags[0]} is missing, and this cluster has no default one. It has: {have}")
    if name not in found:
        raise ValueError(f"{flags[0]} {name}: this cluster has no such partition. It has: {have}")
    partition = found[name]
    if nodes > partition.nodes:
        raise ValueError(f"--nodes {nodes}: partition {name} has {partition.nodes}. All partitions: {have}")
    if gpus > partition.gpus_per_node:
        raise ValueError(f"{flags[1]} {gpus}: the nodes of partition {name} have {partition.gpus_per_node or 'none'}. All partitions: {have}")
    minutes = min(DEFAULT_MINUTES, partition.max_minutes or DEFAULT_MINUTES) if limit is None else slurm.minutes(limit) or DEFAULT_MINUTES
    if partition.max_minutes and minutes > partition.max_minutes:
        raise ValueError(f"--time {limit}: partition {name} allows {partition.max_minutes // 60}:{partition.max_minutes % 60:02d}:00. "
                         "A longer run needs no more: it saves and comes back")
    return name, minutes


def refuse_if_not_shared(run_dir: Path, partition: str, site: Site) -> None:
    """ValueError where the run folder's disk is this machine's own and the partition's nodes are other machines."""
    if any(run_dir.is_relative_to(folder) for folder in site.shared):
        return
    kind, mounted = filesystem(run_dir)
    if kind in LOCAL_DISKS and (others := slurm.other_machines(partition)):
        raise ValueError(f"the run folder {run_dir} lies on a disk of this machine ({kind}, mounted at {mounted}), which the nodes of partition {partition} "
                         f"({others[0]}, ...) are not expected to see: choose a folder on a shared disk. If this machine is their file server, say so in the "
                         f"site file: `shared: [{mounted}]`")


def filesystem(path: Path, mounts: Path = Path("/proc/self/mounts")) -> tuple[str, str]:
    """(kind, mount point) of the disk that holds `path`, which need not be there yet."""
    best = ("unknown", "/")
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, at, kind, *_ = line.split(" ")
        at = at.replace("\\040", " ")
        if path.is_relative_to(at) and len(at) >= len(best[1]):
            best = (kind, at)
    return best


def prepare(plan: Plan) -> Path:
    """Make RUN/launch, private to the user: submitit's job files are pickles, and whoever can write there runs code in the job."""
    run_dir, launch = plan.run_dir, plan.run_dir / LAUNCH
    if plan.must_be_new and any((run_dir / "checkpoints").glob("step-*")):
        raise ValueError(f"{run_dir} already holds checkpoints: add --resume after `--` to continue that run, or choose another train.run_dir")
    for number in {row["job"] for path in launch.glob("history*.jsonl") for row in _submissions(path)}:
        state = slurm.job_state(number)
        if state != "UNKNOWN" and not slurm.is_over(state):
            raise ValueError(f"job {number} ({state.lower()}) already works on {run_dir}: scancel {number} first, or choose another run folder")
    try:
        launch.mkdir(parents=True, exist_ok=True)
        launch.chmod(0o700)
        version, difference = code_version()
        write(launch / "code.diff", difference)
        if "reward_workers" in plan.job:
            write(launch / reward_workers.TOKEN, secrets.token_urlsafe() + "\n")
        write(launch / "job.json", json.dumps({**plan.job, "code": version}, indent=1))
    except OSError as error:
        raise ValueError(f"the run folder {run_dir} cannot be written: {error}; choose another one") from None
    return launch


def _submissions(path: Path) -> list[dict]:
    history = History(path.parent)
    history.path = path
    return [row for row in history.rows() if row["event"] == "submitted"]


# ---------------------------------------------------------------------------------------------------------------------
# The job.


def sbatch_parameters(site: Site, job: dict, partition: str, minutes: int, signal_before: int, name: str) -> dict:
    """In submitit's words. It takes the batch step alone: the ranks are srun's, which launchers.job calls."""
    parameters = {
        "job_name": re.sub(r"[^\w.-]", "-", name), "partition": partition, "account": site.account, "qos": site.qos, "constraint": site.constraint,
        "nodes": job["nodes"], "ntasks_per_node": job["tasks_per_node"], "gpus_per_node": job["gpus_per_node"] or None,
        "cpus_per_task": site.cpus_per_task, "time": minutes, "signal_delay_s": signal_before, "use_srun": False, "stderr_to_stdout": True,
        "setup": [*([MODULES_INIT] if site.modules else []), *(f"module load {shlex.quote(module)} || exit 1" for module in site.modules), *site.setup,
                  f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        "additional_parameters": {"requeue": True, **{key.replace("-", "_"): value for key, value in site.sbatch.items()}},
    }  # fmt: skip
    if (fewest := min(job["node_counts"])) < job["nodes"]:  # told of tasks, Slurm gives the fewest nodes that hold them
        parameters |= {"ntasks_per_node": None, "cpus_per_task": (site.cpus_per_task or 1) * job["tasks_per_node"]}
        parameters["additional_parameters"]["nodes"] = f"{fewest}-{job['nodes']}"
    if "reward_workers" in job:  # before the first line that is no comment, where sbatch stops reading
        parameters["setup"][:0] = reward_workers.sbatch_lines(job, parameters)
    return {key: value for key, value in parameters.items() if value is not None}


def _executor(plan: Plan):
    import submitit

    executor = submitit.SlurmExecutor(plan.run_dir / LAUNCH / "submitit", python=shlex.quote(plan.job["command"][0]))
    executor.update_parameters(**plan.sbatch)
    return executor


def script(plan: Plan) -> str:
    """The sbatch script, to the letter."""
    executor = _executor(plan)
    if plan.workers > 1:
        executor.parameters["map_count"] = plan.workers
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def queue(plan: Plan) -> str:
    """The job's number."""
    from launchers.job import supervise

    launch, executor = prepare(plan), _executor(plan)
    if plan.workers:
        jobs = executor.map_array(supervise, [str(launch)] * plan.workers, range(plan.workers))
    else:
        jobs = [executor.submit(supervise, str(launch))]
    for worker, job in enumerate(jobs):
        History(launch, worker if plan.workers else None).add("submitted", job=job.job_id)
    return jobs[0].job_id.split("_")[0]


def run_here(work: Work, plan: Plan) -> int:
    """The same command on this machine, one process a rank. Returns its exit status."""
    python, *arguments = plan.job["command"]
    ranks = plan.job["tasks_per_node"]
    if plan.workers:
        prepare(replace(plan, job=plan.job | {"items": plan.job["items"] | {"workers": 1}}))
        arguments += ["--worker", "0"]
    command = [python, *arguments]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    print("+", shlex.join(command), flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    try:
        return subprocess.call(command, env=environment)
    except KeyboardInterrupt:  # the ranks have it too, and save
        return 128 + signal.SIGINT
