"""Encode a data set's latents on a cluster: every rank takes its share, and what is written stays when the job is stopped and comes back.

examples
    python -m launchers.latents --partition gpu --nodes 4 --gpus-per-node 8 --run /shared/runs/encode -- /shared/faces /shared/latents --components /shared/sd35
    python -m launchers.latents --local -- data/faces data/latents --components models/sd35
    python -m launchers.status /shared/runs/encode
"""

import sys
from pathlib import Path

from launchers.submit import Work, launch


def check(arguments: list[str], ranks: int) -> None:
    """The command's own parser, which ends this process with a message where it would end the job."""
    from proxt2i.data.latents import parse_arguments

    parse_arguments(arguments)


def output(arguments: list[str]) -> Path:
    from proxt2i.data.latents import parse_arguments

    return parse_arguments(arguments).out


WORK = Work("latents", ["-m", "proxt2i.data.latents"], says="SHARDS OUT --components DIR", check=check, output=output)


def main(argv: list[str] | None = None) -> int:
    return launch(WORK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
