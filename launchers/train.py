"""Pretraining on a cluster: one Slurm job, one task a rank, saved and taken up again by itself until it is finished.

examples
  four machines with eight GPUs each, a day at a time:
    python -m launchers.train --partition gpu --nodes 4 --gpus-per-node 8 --time 24:00:00 -- --config configs/uvit_h_256.yaml train.run_dir=/shared/runs/h256
  with the settings of your cluster, and only look at what would be queued:
    python -m launchers.train --site my-cluster.yaml --nodes 4 --dry-run -- --config configs/uvit_h_256.yaml train.run_dir=/shared/runs/h256
  go on with a run that was stopped, on half as many machines:
    python -m launchers.train --site my-cluster.yaml --nodes 2 -- --resume --config configs/uvit_h_256.yaml train.run_dir=/shared/runs/h256
  the same command without Slurm, on this machine:
    python -m launchers.train --local --tasks-per-node 2 -- --config configs/demo.yaml
  what is it doing?
    python -m launchers.status /shared/runs/h256
"""

import contextlib
import io
import sys
from pathlib import Path

from launchers.record import ROOT
from launchers.submit import Work, launch


def trainer(name: str) -> Work:
    """Of proxt2i/NAME.py, which has the command line of train.py."""
    return Work(name, [str(ROOT / "proxt2i" / f"{name}.py")], says="[--config YAML] [section.key=value ...]", resumes=True, together=True,
                run_dir=lambda arguments, ranks: run_dir(name, arguments, ranks), check=lambda arguments, ranks: check(name, arguments, ranks))  # fmt: skip


def run_dir(name: str, arguments: list[str], ranks: int) -> Path:
    main = __import__(f"proxt2i.{name}", fromlist=["main"])
    given = main.parse_arguments(arguments)
    return Path(main.load_config(given.config, given.overrides, ranks).train.run_dir)


def check(name: str, arguments: list[str], ranks: int) -> None:
    """train.py --dry-run: config, data, components and memory, without a GPU."""
    main = __import__(f"proxt2i.{name}", fromlist=["main"]).main
    own = [argument for argument in arguments if argument != "--dry-run"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(["--dry-run", f"--world-size={ranks}", *own])
    if status:
        raise ValueError(f"{name}.py refuses its arguments, so nothing was queued:\n{said.getvalue().strip()}")
    print(said.getvalue().strip(), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    return launch(trainer("train"), __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
