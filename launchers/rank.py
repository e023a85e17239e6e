"""`srun ... python -m launchers.rank ARGUMENTS`: become `python ARGUMENTS`, with the rank named as torch names it (RANK, WORLD_SIZE, ...).

So that every command that runs under torchrun runs under srun, whether it knows of Slurm or not. exec: the process, its signals and
its exit status are the command's own.
"""

import os
import sys

from proxt2i.training.slurm import adopt_slurm_ranks

if __name__ == "__main__":
    adopt_slurm_ranks(os.environ)
    os.execv(sys.executable, [sys.executable, "-u", *sys.argv[1:]])
