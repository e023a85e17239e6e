"""Times GRPO: images/s (drawn, decoded, scored and trained on) of our trainer against a published one's loop.

    python benchmarks/grpo.py [--rounds 12] [--precision bf16] [--device cuda] [--network B] [--out FILE.json]

Portraits, the shipped U-ViT and PickScore's tiny CLIP, 4 steps (3 trained transitions), the last one guided, fp32 or bf16. A step is a rollout of 64 images
(4 prompts x 16) in 2 updates of 32, in micro-batches of 32. Every contestant is a process of its own with one thread; all are bound to one core and asked in
turn for one step, in a new order every round, so that other work on the machine hits them alike. A figure is the median over the rounds of the ratio within
a round, with the quartiles. On a GPU: bf16, no process is bound to a core, and by default U-ViT-B (random weights) draws 256 x 256 pixels. "cpu" ratios are of processor seconds, which other work moves less.

ours          GrpoTrainer under ZeRO-2 on one rank: rollout, rewards in their thread, updates, stop flags, statistics, as in a run; AdamW
plain         benchmarks/plain_grpo.py: flow_grpo's loop with the two branches of guidance one after the other and PNGs between sampler and reward
plain-batched the same with guidance in one batch and rewards that read tensors, which is how flow_grpo's own script does it for local rewards
Alike: the function that the network computes and its weights, text encoder, VAE, reward, plan, numbers of images, precision, threads, a reference for
the KL divergence, gradient clipping, an average of the weights every update.
Different, plain against ours: torch's attention (in bf16 on a CPU products and a softmax, which are faster there), linear layers (on AMD's CPUs with AVX-512) and GELU against native ones; eager noise, steps, log densities and loss against one fused operation each; numbers read at every step; AdamW over
parameters against flat slices; all tokens in the last block against the image tokens; the prompt of a picture encoded for every picture against once a group; in bf16, rollouts
decoded in fp32 (as flow_grpo has its VAE) against bf16.
Ours does besides: noise as a function of seed and position, outputs of the old policy kept for exact ratios, spike guard, stop signals, statistics.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from contest import Contestant, machine, spread, take_turns  # noqa: E402
from plain_grpo import PlainGrpo  # noqa: E402
from timing import write_result  # noqa: E402

from proxt2i.config import PRECISIONS  # noqa: E402
from proxt2i.embedded import SHIPPED_MODEL  # noqa: E402
from proxt2i.entry import keep_freed_memory  # noqa: E402
from proxt2i.grpo_config import load_config  # noqa: E402
from proxt2i.models.bundle import find_components, load_settings, load_uvit, save_model  # noqa: E402
from proxt2i.models.uvit import PRESETS, build_uvit  # noqa: E402
from proxt2i.training import distributed  # noqa: E402
from proxt2i.training.distributed import StopFlag  # noqa: E402
from proxt2i.training.engine import read_deepspeed_json  # noqa: E402
from proxt2i.training.grpo import GrpoTrainer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GROUP_SIZE, PER_UPDATE, UPDATES = 16, 32, 2


def write_network(folder: Path, preset: str) -> Path:
    """A model folder: a U-ViT of this preset's width and depth, its weights random, in the place of the shipped model's, for 256 x 256 pixels."""
    torch.manual_seed(0)
    shipped = load_uvit(SHIPPED_MODEL / "uvit").config
    sizes = {key: PRESETS[preset][key] for key in ("embed_dim", "depth", "num_heads")}
    kept = {key: shipped[key] for key in ("in_channels", "patch_size", "text_dims", "text_lengths", "qk_norm", "betas")}
    save_model(folder, build_uvit(preset, **{**kept, **sizes, "sample_size": 32}), load_settings(SHIPPED_MODEL), find_components(SHIPPED_MODEL))
    return folder


def make_trainer(folder: Path, name: str, overrides: list[str]) -> GrpoTrainer:
    settings = [f"train.run_dir={folder}/{name}", "train.threads=1", "train.tensorboard=false", "sample.every=0", "guard.every=0", "optim.name=adamw",
                "optim.lr=1e-4", "policy.reward_gradient=0", "policy.variety=0", "rollout.guidance=1.5", "prompts.num=256", f"rollout.group_size={GROUP_SIZE}", f"rollout.groups_per_update={PER_UPDATE // GROUP_SIZE}",
                f"rollout.updates={UPDATES}", f"rollout.batch={PER_UPDATE}", f"train.micro_batch={PER_UPDATE}", *overrides]
    return GrpoTrainer(load_config(ROOT / "configs" / "grpo_portraits.yaml", settings), read_deepspeed_json(ROOT / "configs" / "zero2.json"), None,
                       distributed.start(1))


def waiting(step, device):
    """The step, with the end of its work on the device."""
    def call():
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


def ours(folder: Path, name: str, *overrides: str):
    """A function that makes one step as GrpoTrainer._loop does; nothing is looked at, sampled or saved."""
    keep_freed_memory()  # as proxt2i/grpo.py does
    trainer = make_trainer(folder, name, list(overrides))
    stop = StopFlag(trainer.ranks)

    def step():
        steps = trainer._steps(trainer.images_seen // trainer.roller.images)
        with trainer.meter.timed("rollout"):
            experience = trainer.roller.draw(trainer.engine.module, trainer.images_seen, steps, lambda: stop.reduced() != 0)
        with trainer.meter.timed("train"):
            trainer.learn(experience)
        stop.reduced()
        if trainer._crossed(trainer.config.train.log_every):
            trainer._log()

    return waiting(step, trainer.ranks.device)


def plain(folder: Path, name: str, apart: bool, *overrides: str):
    """A function that makes one step of the plain loop."""
    trainer = make_trainer(folder, name, list(overrides))
    roller = trainer.roller
    return waiting(PlainGrpo(trainer.uvit, roller.text_encoder, roller.codec, roller.scorer.rewards[0], trainer.policy, trainer.prompts.texts, batch=PER_UPDATE,
                     updates=UPDATES, per_update=PER_UPDATE, group_size=GROUP_SIZE, apart=apart,
                              bf16=trainer.bf16).step, trainer.ranks.device)


MAKERS = {"ours": (ours, ()), "plain": (plain, (True,)), "plain-batched": (plain, (False,)), "compiled": (ours, ("train.compile=true",))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=1, help="steps of each contestant before the first round")
    parser.add_argument("--contestants", nargs="+", choices=MAKERS, default=["ours", "plain", "plain-batched"])
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="train.precision, for all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--network", choices=["shipped", *PRESETS], help="default: the shipped U-ViT, on a GPU one of the size of B")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    network = args.network or ("B" if on_gpu else "shipped")
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"train.precision={args.precision}"] + ([] if network == "shipped" else [f"model.init_from={write_network(Path(folder) / network, network)}"])
        contestants = []
        for name in args.contestants:
            make, more = MAKERS[name]
            contestants.append(Contestant(Path(folder), name, make, [(name, *more, *overrides)], [None if on_gpu else 0], warmup=args.warmup))
            if not on_gpu:  # one after the other on the one core
                contestants[-1].wait()
        if on_gpu:
            for contestant in contestants:
                contestant.wait()
        rounds = take_turns(contestants, args.rounds, 0)
        for contestant in contestants:
            contestant.close()
    images = PER_UPDATE * UPDATES
    others = [name for name in args.contestants if name != "ours" and "ours" in args.contestants]
    result = {"command": f"python benchmarks/grpo.py {' '.join(sys.argv[1:])}".strip(), "device": torch.cuda.get_device_name() if on_gpu else "cpu", "network": network, "machine": machine() | {"load average at the end": os.getloadavg()[0]},
              "rounds": args.rounds, "images_per_s": {name: spread([images / r[name][0][0] for r in rounds]) for name in args.contestants},
              **{kind: {f"ours / {name}": spread([r[name][0][clock] / r["ours"][0][clock] for r in rounds]) for name in others}
                 for kind, clock in (("ratio", 0), ("cpu_ratio", 1))}}
    print(json.dumps(result, indent=2), flush=True)
    write_result(args.out, result)


if __name__ == "__main__":
    main()
