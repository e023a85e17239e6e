"""Reward tuning on a cluster: as launchers.train, for proxt2i/grpo.py.

examples
    python -m launchers.grpo --partition gpu --nodes 2 --gpus-per-node 8 --time 24:00:00 -- --config my-grpo.yaml train.run_dir=/shared/runs/tuned
    python -m launchers.grpo --local -- --config my-grpo.yaml
    python -m launchers.status /shared/runs/tuned
  heavy rewards on a GPU of their own, as a second component of the same job:
    python -m launchers.grpo --partition gpu --nodes 2 --gpus-per-node 8 --reward-worker "--reward hpsv2,imagereward" --reward-gpus 1 \\
        -- --config my-grpo.yaml train.run_dir=/shared/runs/tuned \\
        'rewards.train=[{name: http, url: "http://$REWARD_WORKER_1/hpsv2", token_file: $REWARD_TOKEN}]'
"""

import argparse
import sys

from launchers.submit import launch
from launchers.train import trainer


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reward workers, on nodes of their own (a heterogeneous job)")
    group.add_argument("--reward-worker", action="append", default=[], metavar="ARGUMENTS",
                       help="start `python -m proxt2i.rewards.serve ARGUMENTS` beside the ranks; may be repeated. The ranks find number k at $REWARD_WORKER_k")
    group.add_argument("--reward-partition", metavar="P", help="partition of each worker (default: the ranks')")
    group.add_argument("--reward-gpus", type=int, default=0, metavar="N", help="GPUs of each worker (default: 0)")
    group.add_argument("--reward-cpus", type=int, metavar="N", help="CPUs of each worker")


def main(argv: list[str] | None = None) -> int:
    return launch(trainer("grpo"), __doc__, argv, add_options)


if __name__ == "__main__":
    sys.exit(main())
