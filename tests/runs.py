"""Real runs of one and two ranks for the tests here and in soak/: what they train on, how they start, die and are compared."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from proxt2i.training.distributed import _free_port

LAZY_IMPORTS = ["diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip",
                "transformers.tokenization_utils_fast", "torch._inductor.compile_fx", "deepspeed.runtime.engine"]
ROOT = Path(__file__).parent.parent
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


# -- what they train on -----------------------------------------------------------------------------------------------


def write_components(folder: Path) -> Path:
    """A model folder of frozen parts: a 2-channel VAE (factor 8) and a CLIP text tower, both tiny and random."""
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    blocks = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=2,
                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    AutoencoderKL(scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
                  **blocks).save_pretrained(folder / "vae")
    words = ["<pad>", "<unk>", "<s>", "</s>", "a", "square", *COLORS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                            eos_token="</s>", model_max_length=4).save_pretrained(folder / "tokenizer")
    CLIPTextModel(CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=4, pad_token_id=0, bos_token_id=2,
                                 eos_token_id=3)).save_pretrained(folder / "text_encoder")
    return folder


def write_squares(folder: Path) -> Path:
    """Shards of 120 plain squares of 32 pixels."""
    from proxt2i.data.shards import write_samples

    rng = random.Random(0)
    samples = []
    for i in range(120):
        name = rng.choice(list(COLORS))
        image = Image.new("RGB", (32, 32), tuple(c + rng.randint(-15, 15) for c in COLORS[name]))
        samples.append({"key": f"{i:04d}", "image": image, "caption": f"a {name} square"})
    write_samples(folder, samples, shard_size=50)
    return folder


def run_settings(components: Path, shards: Path, run_dir: Path) -> dict:
    """Of a run of 12 steps that takes about a second."""
    return {
        "data.shards": shards, "data.image_size": 32, "data.cache_dir": components / "latents", "model.components": components,
        "model.embed_dim": 32, "model.depth": 3, "model.num_heads": 2, "diffusion.step_counts": "[4,8]",
        "optim.lr": 2e-3, "optim.warmup_images": 32, "optim.ema_half_life": 100, "train.images": 192, "train.batch_size": 16,
        "train.log_every": 32, "train.checkpoint_every": 64, "train.run_dir": run_dir, "train.tensorboard": "false",
        "train.precision": "fp32",  # on any CPU: tests hold results to its rounding
        "sample.every": 96, "sample.prompts": "[a red square,a blue square]", "sample.per_prompt": 2, "sample.steps": 4,
    }


def overrides(settings, **changes):
    merged = settings | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in merged.items()]


# -- starting them ----------------------------------------------------------------------------------------------------


def start(command, **options):
    """A process in a group of its own, its output in one pipe."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def launch(*arguments, ranks=2, **options):
    """`deepspeed --num_gpus RANKS proxt2i/train.py ARGUMENTS`, as a user types it."""
    return start(["deepspeed", "--num_gpus", ranks, "--master_port", _free_port(), "proxt2i/train.py", "--deepspeed",
                  "configs/zero2.json", *arguments], **options)


class BareRanks:
    """Ranks as Slurm's srun starts them: no launcher watches over them. Forked from a server that has the imports behind it."""

    def __init__(self, *arguments, ranks=2, log: Path | None = None, program=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["proxt2i.training.loop", "proxt2i.training.grpo", "deepspeed", *LAZY_IMPORTS])
        port, self.log = _free_port(), log
        self.processes = [context.Process(target=program or run_rank, args=(rank, ranks, port, list(map(str, arguments)), log))
                          for rank in range(ranks)]
        for process in self.processes:
            process.start()

    def wait(self, timeout=300) -> list[int]:
        """Exit codes, in rank order; a rank that outlives the time is killed and None."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.signal(signal.SIGKILL)
        return codes

    def poll(self) -> int | None:
        """None while all live, as a Popen's."""
        return next((process.exitcode for process in self.processes if process.exitcode is not None), None)

    def signal(self, number, *ranks):
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""  # a rank may die before it has one


def become_rank(rank, ranks, port, log):
    """This process is one of `ranks` from now on, its output in `log`."""
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    os.setsid()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))


def run_rank(rank, ranks, port, arguments, log):
    become_rank(rank, ranks, port, log)
    from proxt2i.train import main

    sys.exit(main(arguments))


# -- killing them -----------------------------------------------------------------------------------------------------


def wait_for(happened, run, timeout=120):
    """Poll until happened() or `run` (a Popen or BareRanks) has ended; whether it happened."""
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        if run.poll() is not None:
            return happened()
        time.sleep(0.002)
    return True


def rank_pids(launched) -> list[int]:
    """Processes of the ranks that a launcher has started, in rank order."""
    import psutil

    found = {}
    for process in psutil.Process(launched.pid).children(recursive=True):
        try:
            command, rank = process.cmdline(), process.environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None and "proxt2i/train.py" in command and "launch" not in " ".join(command[:4]):
            found.setdefault(int(rank), process.pid)
    return [found[rank] for rank in sorted(found)]


def kill(run) -> str:
    """SIGKILL the launcher's whole group; its output."""
    os.killpg(run.pid, signal.SIGKILL)
    return run.communicate()[0]


# -- comparing them ---------------------------------------------------------------------------------------------------


def assert_same_checkpoint(one: Path, other: Path, ranks=2):
    """Bit for bit: weights, averaged weights, optimizer state, one file a rank."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert len(files) == ranks and files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for file in files:
        left, right = load_file(one / file), load_file(other / file)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{file}: {key}"


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def resumed_at(output: str) -> int:
    """Images seen when the run with this output began."""
    found = re.search(r"resuming from .* \(([\d,]+) images\)", output)
    return int(found[1].replace(",", "")) if found else 0
