"""Reward tuning on a cluster: as launchers.train, for proxt2i/grpo.py.

examples
    python -m launchers.grpo --partition gpu --nodes 2 --gpus-per-node 8 --time 24:00:00 -- --config my-grpo.yaml train.run_dir=/shared/runs/tuned
    python -m launchers.grpo --local -- --config my-grpo.yaml
    python -m launchers.status /shared/runs/tuned
"""

import sys

from launchers.submit import launch
from launchers.train import trainer


def main(argv: list[str] | None = None) -> int:
    return launch(trainer("grpo"), __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
