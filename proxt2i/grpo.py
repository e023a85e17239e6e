"""Tune a text-to-image proximal model on rewards with GRPO:  deepspeed proxt2i/grpo.py --deepspeed configs/zero2.json

Also runs under `torchrun` and, on one rank, under plain `python`.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Started as a script, python puts this folder first on the path: our modules would shadow top-level packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

from proxt2i import entry  # noqa: E402
from proxt2i.config_files import to_yaml  # noqa: E402
from proxt2i.grpo_config import load_config  # noqa: E402

EXAMPLES = """\
examples
  the shipped portraits model, rewarded by its PickScore; the default config:
    deepspeed proxt2i/grpo.py --deepspeed configs/zero2.json --config configs/grpo_portraits.yaml
  your model, prompts and rewards:
    deepspeed proxt2i/grpo.py --deepspeed configs/zero2.json model.init_from=runs/faces/model prompts.source=prompts.txt \\
      'rewards.train=[{name: pickscore}, {name: aesthetic, weight: 0.2}]' 'rewards.panel=[{name: hpsv2}]' train.run_dir=runs/faces-grpo
  continue after a crash or Ctrl-C, from the newest intact checkpoint in train.run_dir:
    deepspeed proxt2i/grpo.py --deepspeed configs/zero2.json --config configs/grpo_portraits.yaml --resume
  check a run beforehand:
    python proxt2i/grpo.py --dry-run --world-size 8 --config configs/grpo_portraits.yaml

what it writes, in train.run_dir
  config.yaml       the resolved config            checkpoints/   the newest few, named by images seen
  stats.jsonl       one row per log interval       samples/       grids with fixed prompts and seeds
  tensorboard/      the same, as curves            model/         the finished model, for python -m proxt2i.sample

Stopping, failing and exit statuses are those of proxt2i/train.py (see its --help). A stop during a rollout drops that rollout.
every setting and its meaning: proxt2i/grpo_config.py; the method: docs/grpo.md
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXAMPLES, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    return entry.parse(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    rank = entry.rank()
    try:
        world_size = entry.world_size(given)
        config = load_config(given.config, given.overrides, world_size)
        from proxt2i.training.engine import read_deepspeed_json
        from proxt2i.training.tracking import check_trackers

        check_trackers(config.train)
        deepspeed_json = read_deepspeed_json(given.deepspeed)
        if given.dry_run:
            if rank == 0:
                from proxt2i.training.grpo_dry_run import dry_run

                dry_run(config, world_size)
            return 0
        if rank == 0:
            print(to_yaml(config), flush=True)
        from proxt2i.training.grpo import train  # slow to import: only once the input makes sense

        signal_number = train(config, deepspeed_json, given.resume)
    except Exception as error:
        return entry.fail(error, rank)
    return 128 + signal_number if signal_number else 0


if __name__ == "__main__":
    entry.prepare_process()
    sys.exit(main())
