"""Measure models on a cluster: `python -m proxt2i.evaluate`, its prompts shared by all ranks. What is finished stays when the job is stopped and comes back.

examples
    python -m launchers.evaluate --partition gpu --nodes 2 --gpus-per-node 8 -- --model /shared/runs/faces/model --prompts /shared/prompts.txt --rewards pickscore,hpsv2 \\
        --steps 4,8 --out /shared/runs/faces/evaluation
  portraits, which one rank measures alone:
    python -m launchers.evaluate --partition gpu --gpus-per-node 1 -- --model /shared/runs/faces/model --steps 4,8 --out /shared/runs/faces/evaluation
    python -m launchers.evaluate --local -- --steps 8
"""

import sys

from launchers.submit import Work, launch


def check(arguments: list[str], ranks: int) -> None:
    """The command's own parser, which ends this process with a message where it would end the job."""
    from proxt2i.evaluate import parse_args

    parse_args(arguments)


WORK = Work("evaluate", ["-m", "proxt2i.evaluate"], says="[--model DIR] [--prompts FILE --rewards NAME,...] [--steps N,N] ...", check=check)


def main(argv: list[str] | None = None) -> int:
    return launch(WORK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
