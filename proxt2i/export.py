"""From a checkpoint to a model folder in the layout of diffusers:  python -m proxt2i.export runs/portraits

Reads the files that the ranks of any ZeRO stage wrote; needs neither a GPU nor the ranks. Exit status: 0 written, 2 wrong input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from proxt2i.training.checkpoint import find_checkpoint
from proxt2i.training.export import export
from proxt2i.training.state import AVERAGE, WEIGHT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = """\
examples
  the averaged weights of a run's newest intact checkpoint, as RUN/model:
    python -m proxt2i.export runs/portraits
  an older checkpoint, the weights under training, half the size, elsewhere:
    python -m proxt2i.export runs/portraits/checkpoints/step-000050000 --weights raw --dtype bf16 --out exported
  then: python -m proxt2i.sample "a man with a beanie" --model exported
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m proxt2i.export", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest intact checkpoint) or a checkpoint folder")
    parser.add_argument("--out", type=Path, help="model folder to write; replaced if it exists (default: RUN/model)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged over the training, or as they are (default: ema)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights in the file (default: fp32)")
    parser.add_argument("--components", type=Path, help="folder of text encoder and VAE to copy (default: the run's own)")
    parser.add_argument("--base", type=Path, help="of a run with policy.lora_rank: the model folder that it began from (default: where it lay then)")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="of such a run: write the adapters alone there besides, as peft reads them")
    given = parser.parse_args(arguments)
    try:
        folder = find_checkpoint(given.checkpoint)
        if folder is None:
            raise ValueError(f"{given.checkpoint} holds no checkpoint yet")
        if given.out is None and folder == given.checkpoint:
            raise ValueError("a checkpoint folder was given: say with --out where the model goes")
        out = given.out or given.checkpoint / "model"
        export(folder, out, AVERAGE if given.weights == "ema" else WEIGHT, DTYPES[given.dtype], given.components, given.base, given.adapter)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {given.weights} weights of {folder.name}, {given.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
