"""Measure models: rewards, Fréchet distance, time and memory for every sampler, on the same prompts and seeds.

    python -m proxt2i.evaluate --model runs/faces/model --prompts prompts.txt --rewards pickscore,hpsv2 --steps 4,8 --guidance 1,2
    python -m proxt2i.evaluate --model runs/portraits/model --steps 4,8 --guidance 1,2

With --prompts (a text file with one a line; .jsonl, .csv or .tsv with prompt and perhaps seed, negative_prompt, category) every
combination of model, plan, steps and guidance draws the same prompts with the same seeds; docs/evaluation.md. Written to --out:
  report.html                      all of it on one page
  per_prompt.parquet, .csv         a row for every picture: settings, prompt, seed, scores
  summary.csv, differences.csv,    means with bootstrap intervals; each two samplers, prompt by prompt; means of each category
  categories.csv, results.json
  samplers/                        the pictures, and what a command that was stopped or killed goes on from

Without --prompts a portraits model is measured: prompts are held-out captions that state all eight attributes. For every (plan, steps,
guidance) it prints
  accuracy    share of attributes that the judge, an independently trained classifier, finds as asked
  all right   share of pictures with every attribute as asked
  FD          Fréchet distance in the judge's features to held-out drawings (lower is better; `drawings` row: the floor)
  diversity   within-prompt variance of those features, relative to drawings of the same prompts (1 = as varied)
and writes results.json and a grid of pictures per row.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Started as a script (deepspeed proxt2i/evaluate.py), python puts this folder first on the path: our modules would shadow top-level packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

from proxt2i.entry import ranks  # noqa: E402
from proxt2i.rewards.base import RewardError, add_arguments  # noqa: E402
from proxt2i.sample import size  # noqa: E402
from proxt2i.training.slurm import adopt_slurm_ranks  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    def numbers(kind):
        def parse(text: str) -> list:
            try:
                return [kind(part) for part in text.split(",")]
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r}: give {kind.__name__} values separated by commas, like 4,8") from None

        return parse

    parser = argparse.ArgumentParser("python -m proxt2i.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, action="append", metavar="DIR", help="model folder; again for others to compare with (default: the shipped portraits model)")
    add("--plan", default=None, help="plans, separated by commas (default: the model's)")
    add("--steps", type=numbers(int), help="step counts, separated by commas (default: 8; with --prompts the model's)")
    add("--guidance", type=numbers(float), help="guidance scales, separated by commas (default: the model's)")
    add("--guidance-below", type=float, metavar="T", help="guide only steps with the noise of a time up to T, 1 all, 0 the last (default: the model's)")
    add("--num-prompts", type=int, metavar="N", help="portraits: pictures for accuracy and FD, one a prompt (default: 1024); with --prompts: the first N (default: all)")
    add("--seed", type=int, default=0, help="of the first picture; the next have the next (default: 0)")
    add("--batch-size", type=int, default=64, help="pictures drawn together (default: 64)")
    add("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="folder for the results (default: evaluation)")
    add("--diversity-prompts", type=int, default=32, help="portraits: prompts that are drawn 16 times each (default: 32)")
    group = parser.add_argument_group("with --prompts")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, or the word portraits: held-out captions of portraits")
    add_arguments(group)
    add = group.add_argument
    add("--reference", type=Path, metavar="DIR", help="pictures that those drawn are compared with, for a Fréchet distance: a folder of them, or of tar shards")
    add("--fd-model", type=Path, metavar="DIR", help="network of that distance: folder of a vision model of transformers (DINOv2), or file of FID's Inception")
    add("--images-per-prompt", type=int, default=1, metavar="M", help="pictures of each prompt, with seeds one after another (default: 1)")
    add("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the U-ViT and text encoders (default: fp32)")
    add("--size", type=size, metavar="HEIGHTxWIDTH", help="of the pictures, in pixels (default: the model's own)")
    add("--cut-long", action="store_true", help="take prompts that are longer than the model can hear")
    add("--no-images", action="store_true", help="keep only the pictures that the page shows; then a reward that is added later draws anew")
    add("--grid", type=int, default=8, metavar="N", help="prompts shown side by side, spread over the list (default: 8)")
    add("--latency-runs", type=int, default=3, metavar="N", help="batches timed for each sampler; 0: none (default: 3)")
    add("--wait", type=float, default=3600, metavar="S", help="with several ranks: seconds that rank 0 waits for others' next batch (default: 3600)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        adopt_slurm_ranks(os.environ)
        if args.prompts is None:
            run_portraits(args)
        else:
            run(args)
        return 0
    except (ValueError, OSError, RewardError, RuntimeError) as error:
        print(f"proxt2i.evaluate: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is finished" if args.prompts else "\nstopped", file=sys.stderr)
        return 130


def run_portraits(args: argparse.Namespace) -> None:
    """Of one model, by its attributes: by rank 0 alone."""
    from proxt2i.evaluation import portraits
    from proxt2i.evaluation.folder import ABOUT
    from proxt2i.evaluation.work import is_portraits_model

    if args.reward or args.rewards or args.reference or args.fd_model:
        raise ValueError("rewards, --reference and --fd-model need --prompts FILE (or --prompts portraits)")
    if len(args.model or []) > 1:
        raise ValueError("several --model need --prompts FILE (or --prompts portraits)")
    args.model, args.steps, args.num_prompts = args.model[0] if args.model else None, args.steps or [8], 1024 if args.num_prompts is None else args.num_prompts
    if args.num_prompts < 2 or not 1 <= args.diversity_prompts <= args.num_prompts:
        raise ValueError("--num-prompts must be at least 2 and --diversity-prompts between 1 and --num-prompts")
    if args.model and not is_portraits_model(args.model):
        raise ValueError(f"--prompts FILE is missing: without it a model is measured on portraits, and {args.model} has another text encoder than theirs (--prompts portraits does it anyway)")
    if (args.out / ABOUT).exists():
        raise ValueError(f"--out {args.out} holds an evaluation with prompts; choose another folder")
    if ranks()[0] == 0:
        portraits.run(args)


def run(args: argparse.Namespace) -> None:
    """Of models on prompts. Every rank draws its share; rank 0 writes the tables."""
    import torch

    from proxt2i.evaluation import draw, folder, page, results
    from proxt2i.evaluation.work import make_evaluation
    from proxt2i.pipeline import pick_device
    from proxt2i.rewards.base import load_reward

    rank, world, local = ranks()
    if world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or world)))
    own = f"cuda:{local}" if torch.cuda.device_count() > 1 else None  # Slurm may show a rank its GPU alone
    device = pick_device(own if args.device in (None, "cuda") and own else args.device)
    evaluation = make_evaluation(args)
    folder.check_folder(evaluation)
    rewards = [load_reward(settings, device) for settings in evaluation.rewards]  # missing weights are said before anything is drawn
    extract = evaluation.features.load(device) if evaluation.features else None
    folder.claim(evaluation)
    draw.work(evaluation, rewards, extract, device, rank, world)
    if rank == 0:
        draw.wait(evaluation, args.wait)
        found = results.collect(evaluation)
        results.write(evaluation, found)
        page.write_page(evaluation, found)
        results.print_table(found)
        print(f"wrote {args.out}/report.html, and tables beside it")


if __name__ == "__main__":
    from proxt2i.entry import keep_freed_memory

    keep_freed_memory()
    sys.exit(main())
