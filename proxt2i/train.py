"""Pretrain a text-to-image proximal model:  deepspeed proxt2i/train.py --deepspeed configs/zero2.json

Also runs under `torchrun` and, on one rank, under plain `python`.
"""

import argparse
import faulthandler
import os
import signal
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Started as a script, python puts this folder first on the path: our modules would shadow top-level packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

from proxt2i.config import load_config, to_yaml  # noqa: E402
from proxt2i.training import lifeline  # noqa: E402

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
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument("--deepspeed", metavar="JSON", default=str(HERE.parent / "configs" / "zero2.json"),
                        help="DeepSpeed settings: ZeRO stage 1, 2 or 3, offload to CPU (default: configs/zero2.json)")
    parser.add_argument("--config", metavar="YAML", action="append", default=[],
                        help="settings that differ from the defaults (the portraits run); may be given again, later files win")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="PATH",
                        help="continue from a checkpoint folder; without PATH from the newest intact one of the run")
    parser.add_argument("--dry-run", action="store_true",
                        help="train nothing: check config, data and components, print sizes, memory per rank and hours")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: number of ranks (default: as started)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    given = parser.parse_intermixed_args(arguments)
    if given.resume and "=" in given.resume and not Path(given.resume).exists():  # --resume section.key=value
        given.overrides.insert(0, given.resume)
        given.resume = "auto"
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if given.world_size is not None:
            if not given.dry_run or given.world_size < 1:
                raise ValueError("--world-size: a number of ranks, at least 1, for --dry-run; otherwise the launcher says how many there are")
            world_size = given.world_size
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
        return _fail(error, rank)
    return 128 + signal_number if signal_number else 0


def _fail(error: Exception, rank: int) -> int:
    """End all ranks; returns this one's exit status if it is alone, or the ranks have not met yet."""
    is_input = isinstance(error, ValueError) and _is_ours(error)
    status = 2 if is_input else lifeline.FAILED
    report = f"error: {error}"
    if not is_input:
        report = (f"{''.join(traceback.format_exception(error))}error: {lifeline.whoami(rank)} failed: "
                  f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    lifeline.leave(status, report)
    if is_input and rank != 0:
        time.sleep(20)  # rank 0 reports the same, and its launcher ends the other ranks meanwhile
    print(report, file=sys.stderr, flush=True)
    return status


def _is_ours(error: Exception) -> bool:
    """Whether the project raised it, about its input; any other is a bug and keeps its traceback."""
    return HERE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parents


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the training steps there is nothing to save
    faulthandler.enable()
    if hasattr(signal, "SIGQUIT"):
        faulthandler.register(signal.SIGQUIT)
    sys.exit(main())
