"""Pretrain a text-to-image proximal model:  deepspeed proxt2i/train.py --deepspeed configs/zero2.json

Also runs under `torchrun`, under Slurm's `srun` and, on one rank, under plain `python`. On a cluster: python -m launchers.train --help
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Started as a script, python puts this folder first on the path: our modules would shadow top-level packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

from proxt2i import entry  # noqa: E402
from proxt2i.config import load_config, to_yaml  # noqa: E402

EXAMPLES = """\
examples
  one GPU, or one CPU rank with all cores; the default config is the portraits run:
    deepspeed proxt2i/train.py --deepspeed configs/zero2.json
  two CPU ranks (on a machine with GPUs: two GPUs):
    deepspeed --num_gpus 2 proxt2i/train.py --deepspeed configs/zero2.json --config configs/demo.yaml
  change single settings:
    deepspeed proxt2i/train.py --deepspeed configs/zero2.json optim.lr=1e-3 train.run_dir=runs/slow
  continue after a crash or Ctrl-C, from the newest intact checkpoint in train.run_dir:
    deepspeed proxt2i/train.py --deepspeed configs/zero2.json --resume
  real data: tar shards of captioned images, or the latents made of them once (python -m proxt2i.data.latents --help, docs/data.md)
    deepspeed proxt2i/train.py --deepspeed configs/zero2.json --config configs/uvit_h_256.yaml data.shards=/data/faces-256 model.components=/models/sd35-clip-t5
  check a run beforehand, without a GPU: sizes, memory of each of 16 ranks, hours, data and model components:
    python proxt2i/train.py --dry-run --world-size 16 --config configs/uvit_h_256.yaml data.shards=/data/faces
  look at a run, also while it trains: one HTML page with its figures, curves and pictures:
    python -m proxt2i.report runs/portraits

what it writes, in train.run_dir
  config.yaml       the resolved config            checkpoints/   the newest few, named by images seen
  stats.jsonl       one row per log interval       samples/       grids with fixed prompts and seeds
  tensorboard/      the same, as curves            model/         the finished model, for python -m proxt2i.sample
  bad_samples.jsonl samples that were skipped, each with the reason (only if there are any)

stopping and failing
  Ctrl-C, SIGTERM or SIGUSR2 (to one rank is enough) saves after the step and ends all ranks; then --resume. The deepspeed
  launcher returns to the prompt at Ctrl-C while the ranks still save, and kills what has not ended after 30 s.
  Exit status: 0 finished, 1 a rank failed or died (it is named, and all others end at once), 2 wrong input, 128 + n stopped by signal n.
  A run that hangs: kill -QUIT PID of a rank prints where its threads are, and it goes on.

every setting and its meaning: proxt2i/config.py
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
                from proxt2i.dry_run import dry_run

                dry_run(config, deepspeed_json, world_size)
            return 0
        if rank == 0:
            print(to_yaml(config), flush=True)
        from proxt2i.training.loop import train  # slow to import: only once the input makes sense

        signal_number = train(config, deepspeed_json, given.resume)
    except Exception as error:
        return entry.fail(error, rank)
    return 128 + signal_number if signal_number else 0


if __name__ == "__main__":
    entry.prepare_process()
    sys.exit(main())
