"""Times training: images/s of our trainer against a published one's loop, and what a second rank and torch.compile are worth.

    python benchmarks/train.py [--rounds 15] [--seconds 1.5] [--parts speed ranks wait] [--precision bf16] [--out FILE.json]

Portraits, the U-ViT that ships, batch 64, fp32 or (--precision bf16) bf16 autocast. Every contestant is a process of its own with one thread, bound to one core; they are asked in turn,
a second or two each, in a new order every round, so that other work on the machine hits them alike. A figure is the median over the rounds of
the ratio within a round, with the quartiles. "cpu" ratios are of processor seconds, which other work moves less.

speed   one core, one contestant at a time
          muon, adamw   our Trainer under ZeRO-2 on one rank: data, step, stop flag, statistics, as in a run; optim.name muon (the default) or adamw
          compiled      muon with train.compile
          plain         benchmarks/plain_trainer.py, the loop of ProxDM; attention as two products and a softmax (as published) or, "plain-sdpa", by
                        F.scaled_dot_product_attention
        Alike: latents and text embeddings of all images, encoded once and held in memory, one worker-less loader; parameters, shapes and initial weights;
        batch; precision; threads; caption dropout; gradient clipping; an average of the weights every step.
        Different, plain against ours: eager noise and loss against one fused operation each; torch's AdamW loop over parameters, against DeepSpeed's flat
        slices with fused AdamW and Muon; an average and its loop against one call; all tokens in the last block against the image tokens; a
        concatenation before the long skip's product against none; on AMD's CPUs with AVX-512 torch's linear layers against ours; torch's GELU against ours; freed
        memory given back to the system, against memory that is kept; loss and gradient norm read every step against the norm alone.
        Ours does besides: noise as a function of seed and position, preconditioning and pair weights, losses by step, spike guard, stop signals.
ranks   one job of two ranks (one core each, 32 images each a step) against two jobs of one rank with batch 32 that run at the same time on the
        same two cores: images/s of the job over the sum of the two
wait    a run of configs/demo.yaml on two ranks, `--wait-images` long: the share of its time that ranks wait for data, by its stats.jsonl
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
from contest import Contestant, machine, spread, take_turns  # noqa: E402
from plain_trainer import PlainTrainer  # noqa: E402
from timing import write_result  # noqa: E402

from proxt2i.config import load_config  # noqa: E402
from proxt2i.entry import keep_freed_memory  # noqa: E402
from proxt2i.training import distributed  # noqa: E402
from proxt2i.training.distributed import StopFlag  # noqa: E402
from proxt2i.training.engine import read_deepspeed_json  # noqa: E402
from proxt2i.training.loop import Trainer  # noqa: E402
from proxt2i.training.meter import Meter  # noqa: E402
from proxt2i.training.tracking import read_rows  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BATCH, NUM_IMAGES = 64, 4096


def make_trainer(folder: Path, name: str, overrides: list[str]) -> Trainer:
    """Ours, on this process' rank, its data found."""
    settings = [f"data.portraits_dir={folder}/portraits", f"data.cache_dir={folder}/latents", f"train.run_dir={folder}/{name}", f"data.num_images={NUM_IMAGES}",
                "train.threads=1", f"train.batch_size={BATCH}", "train.tensorboard=false", "sample.every=0", *overrides]
    trainer = Trainer(load_config(ROOT / "configs" / "portraits.yaml", settings), read_deepspeed_json(ROOT / "configs" / "zero2.json"), None,
                      distributed.start(1))
    trainer.feed.open(0, lambda message: None)
    return trainer


def ours(folder: Path, name: str, *overrides: str):
    """A function that makes one step as Trainer._loop does; nothing is sampled or saved."""
    keep_freed_memory()  # as proxt2i/train.py does
    trainer = make_trainer(folder, name, list(overrides))
    trainer.meter = Meter(trainer.objective.pairs.bucket_names, trainer.uvit.config, trainer.ranks)
    stop = StopFlag(trainer.ranks)

    def step():
        trainer.step()
        stop.reduced()
        if trainer._crossed(trainer.config.train.log_every):
            trainer._log()

    return step


def plain(folder: Path, name: str, fused: bool, *overrides: str):
    """A function that makes one step of the plain loop, on the same latents and embeddings."""
    trainer = make_trainer(folder, name, list(overrides))
    batches = [trainer.feed.next() for _ in range(NUM_IMAGES // BATCH)]  # every image once
    latents, *text = (torch.cat(parts) for parts in zip(*([batch.latents, *batch.text] for batch in batches)))
    return PlainTrainer(trainer.uvit, latents, text, trainer.feed.null_text, BATCH, fused, trainer.bf16).step


def measure_speed(folder: Path, args) -> dict:
    precision = f"train.precision={args.precision}"
    makers = {"muon": (ours, (precision,)), "adamw": (ours, (precision, "optim.name=adamw", "optim.lr=2e-3")), "compiled": (ours, (precision, "train.compile=true")),
              "plain": (plain, (False, precision)), "plain-sdpa": (plain, (True, precision))}
    contestants = []
    for name in args.contestants:  # the first encodes the data, compilation disturbs nobody
        make, its = makers[name]
        contestants.append(Contestant(folder, name, make, [(name, *its)], [0]).wait())
    rounds = take_turns(contestants, args.rounds, args.seconds)
    for contestant in contestants:
        contestant.close()

    def ratios(slow, fast, clock):
        return spread([r[slow][0][clock] / r[fast][0][clock] for r in rounds])

    pairs = [(slow, fast) for slow, fast in [("plain", "muon"), ("plain", "adamw"), ("plain-sdpa", "muon"), ("plain-sdpa", "adamw"), ("muon", "compiled")]
             if slow in args.contestants and fast in args.contestants]
    return {"images_per_s": {name: spread([BATCH / r[name][0][0] for r in rounds]) for name in args.contestants},
            "ratio": {f"{fast} / {slow}": ratios(slow, fast, 0) for slow, fast in pairs},
            "cpu_ratio": {f"{fast} / {slow}": ratios(slow, fast, 1) for slow, fast in pairs}}


def measure_ranks(folder: Path, args) -> dict:
    half, precision = f"train.batch_size={BATCH // 2}", f"train.precision={args.precision}"
    alone = Contestant(folder, "alone", ours, [("alone-0", half, precision)], [0])  # one after the other: the first encodes the data
    alone.wait()
    other = Contestant(folder, "alone", ours, [("alone-1", half, precision)], [1]).wait()
    alone.pipes, alone.processes = alone.pipes + other.pipes, alone.processes + other.processes
    job = Contestant(folder, "job", ours, [("job", precision), ("job", precision)], [0, 1], one_job=True).wait()
    rounds = take_turns([alone, job], args.rounds, args.seconds)
    alone.close()
    job.close()
    together = [BATCH / max(wall for wall, _ in r["job"]) for r in rounds]
    apart = [sum(BATCH / 2 / wall for wall, _ in r["alone"]) for r in rounds]
    return {"images_per_s": {"job": spread(together), "sum of two": spread(apart)}, "efficiency": spread([j / a for j, a in zip(together, apart)])}


def measure_wait(folder: Path, args) -> dict:
    run_dir = folder / "demo"
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(distributed._free_port()), "proxt2i/train.py", "--deepspeed", "configs/zero2.json",
               "--config", "configs/demo.yaml", f"data.portraits_dir={folder}/portraits", f"data.cache_dir={folder}/latents",
               f"train.run_dir={run_dir}", f"train.precision={args.precision}", f"train.images={args.wait_images}", "optim.warmup_images=640"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    rows = read_rows(run_dir / "stats.jsonl")
    return {"images": args.wait_images, "rows": len(rows), "data_wait": statistics.mean(row["data_wait"] for row in rows),
            "largest": max(row["data_wait"] for row in rows), "images_per_s": statistics.median(row["images_per_s"] for row in rows)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a contestant's turn")
    parser.add_argument("--parts", nargs="+", choices=["speed", "ranks", "wait"], default=["speed", "ranks", "wait"])
    parser.add_argument("--contestants", nargs="+", default=["muon", "adamw", "compiled", "plain", "plain-sdpa"], help="of part speed")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast, for all")
    parser.add_argument("--wait-images", type=int, default=12_800, help="length of part wait's run")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    result = {"command": f"python benchmarks/train.py {' '.join(sys.argv[1:])}".strip(), "machine": machine(), "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            result[part] = {"speed": measure_speed, "ranks": measure_ranks, "wait": measure_wait}[part](Path(folder), args)
            print(part, json.dumps(result[part], indent=2), flush=True)
            write_result(args.out, result)


if __name__ == "__main__":
    main()
