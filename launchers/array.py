"""Many small pieces of work on a cluster: one command an item, shared by an array of jobs; failed items are tried again and then named.

In the command, {item} is the item and {index} its number. An item must be done twice without harm: after a preemption it starts again.

examples
  one command a shard, 16 jobs of 8 CPUs:
    python -m launchers.array --partition cpu --jobs 16 --cpus-per-task 8 --items '/shared/raw/*.tar' --run /shared/runs/recode \\
        -- python recode.py {item} /shared/recoded/{index}.tar
  items from a file, one a line; at most 4 jobs at once; wait for the end, which has exit status 1 if an item failed:
    python -m launchers.array --jobs 16 --at-once 4 --list urls.txt --wait -- ./fetch.sh {item}
  what is done, and what failed?
    python -m launchers.status /shared/runs/recode
"""

import argparse
import glob
import sys
import time
from pathlib import Path

from launchers.items import summary
from launchers.record import LAUNCH
from launchers.status import show, status
from launchers.submit import Work, launch

WORK = Work("array", ["-m", "launchers.items"], says="COMMAND {item} ...", one_rank=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("items")
    group.add_argument("--items", metavar="PATTERN", help="files, as a pattern in quotes: '/data/*.tar'")
    group.add_argument("--list", type=Path, metavar="FILE", help="a file with one item a line")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="jobs that share the items (default: 1)")
    group.add_argument("--at-once", type=int, metavar="N", help="how many of them may run at the same time (default: all)")
    group.add_argument("--tries", type=int, default=3, metavar="N", help="how often an item is tried (default: 3)")
    group.add_argument("--wait", action="store_true", help="return when all jobs are over, with the summary; exit status 1 if an item failed")


def items_of(given: argparse.Namespace, arguments: list[str]) -> dict:
    """The part of job.json that launchers.items reads. ValueError for a wrong command line."""
    if (given.items is None) == (given.list is None):
        raise ValueError("give --items PATTERN or --list FILE, one of them")
    if given.list is not None:
        try:
            items = [line.strip() for line in given.list.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise ValueError(f"--list: {error}") from None
    else:
        items = [str(Path(path).resolve()) for path in sorted(glob.glob(given.items, recursive=True))]
    if not items:
        raise ValueError(f"no items: {given.items or given.list} holds none")
    if not arguments:
        raise ValueError("the command is missing after `--`")
    if not any("{item}" in part or "{index}" in part for part in arguments):
        raise ValueError(f"the command names neither {{item}} nor {{index}}, so all {len(items)} items would be the same")
    if min(given.jobs, given.tries, given.at_once or 1) < 1:
        raise ValueError("--jobs, --tries and --at-once must be at least 1")
    return {"items": items, "command": arguments, "tries": given.tries, "workers": min(given.jobs, len(items))}


def wait(run_dir: Path) -> int:
    """Until no job is left; prints the summary. Exit status 1 if items failed or were left."""
    while status(run_dir)["working"] and summary(run_dir / LAUNCH)["left"]:
        time.sleep(2)
    found = summary(run_dir / LAUNCH)
    print(show(status(run_dir)))
    return int(bool(found["failed"] or found["left"]))


def main(argv: list[str] | None = None) -> int:
    return launch(WORK, __doc__, argv, add_options, items_of, wait)


if __name__ == "__main__":
    sys.exit(main())
