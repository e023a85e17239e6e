"""U-ViT-H (506 M) at 256 x 256 trained by the trainer itself on one GPU, eager and compiled: images/s, MFU, memory, and where the time goes.

    python benchmarks/large_model.py [--micro-batch 64] [--kinds compiled eager] [--steps 4] [--profile FILE.txt] [--out FILE.json] [section.key=value ...]

Data and latents come by the commands that a user types: portraits of 256 x 256 pixels in tar shards, `python -m proxt2i.data.latents`,
configs/uvit_h_256.yaml. The VAE and the text encoders have the real ones' channels, widths and lengths (16; 1024 x 77 and 4096 x 128) but one
layer: captions are encoded at every step, as by that config, at next to no cost. MFU counts useful operations alone (proxt2i/models/flops.py).
"split" is one step with the device waited for after each of its parts: parts cost more so than in a step that overlaps them.
--device cpu shrinks everything: a dry run. --prepare only makes --folder, in full size, on any machine: a GPU's time is not spent on it.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from timing import write_result  # noqa: E402

from proxt2i.config import load_config  # noqa: E402
from proxt2i.data.portraits import write_portraits  # noqa: E402
from proxt2i.models.bundle import EMBEDDED  # noqa: E402
from proxt2i.training import distributed  # noqa: E402
from proxt2i.training.engine import read_deepspeed_json  # noqa: E402
from proxt2i.training.loop import Trainer  # noqa: E402
from proxt2i.training.meter import Meter  # noqa: E402

TINY = ["model.embed_dim=64", "model.depth=3", "model.num_heads=1"]  # of a dry run


def write_components(folder: Path, channels: int = 16, widths=(1024, 4096), lengths=(77, 128)) -> Path:
    """SD3.5's sizes of latents and of MetaCLIP-H's and T5's embeddings, one layer each, random weights."""
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from proxt2i.models.text import TextEncoder

    torch.manual_seed(0)
    tokenizers = [AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer") for _ in widths]
    words = len(tokenizers[0])
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=words, hidden_size=widths[0], intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                        max_position_embeddings=lengths[0], eos_token_id=tokenizers[0].eos_token_id))
    t5 = T5EncoderModel(T5Config(vocab_size=words, d_model=widths[1], d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    TextEncoder(tokenizers, [clip, t5], list(lengths)).save_pretrained(folder)
    blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    AutoencoderKL(down_block_types=blocks[0], up_block_types=blocks[1], block_out_channels=[8] * 4, norm_num_groups=4, layers_per_block=1,
                  latent_channels=channels, sample_size=256, scaling_factor=1.5305, shift_factor=0.0609).save_pretrained(folder / "vae")
    return folder


def prepare(folder: Path, num_images: int, device: str) -> list[str]:
    """Data, latents and components in `folder`; the settings that name them."""
    components, shards, latents = folder / "components", folder / "shards", folder / "latents"
    if not (latents / "index.json").is_file():
        write_components(components)
        write_portraits(shards, num_images, 256, 0, 64)
        subprocess.run([sys.executable, "-m", "proxt2i.data.latents", shards, latents, "--components", components, "--image-size", "256",
                        "--device", device], check=True, cwd=ROOT)
    return [f"data.shards={latents}", f"model.components={components}", "data.flip=false", "data.workers=4"]


def make_trainer(folder: Path, settings: list[str]) -> Trainer:
    overrides = [f"train.run_dir={folder}/run", "train.tensorboard=false", "sample.every=0", "optim.warmup_images=1000000", "train.compile=false", *settings]
    trainer = Trainer(load_config(ROOT / "configs" / "uvit_h_256.yaml", overrides), read_deepspeed_json(ROOT / "configs" / "zero2.json"), None,
                      distributed.start(0))
    trainer.feed.open(0, print)
    trainer.meter = Meter(trainer.objective.pairs.bucket_names, trainer.uvit.config, trainer.ranks)
    return trainer


def use(uvit, kind: str) -> None:
    """compiled: as train.compile=true does before the first step."""
    if kind == "compiled":
        uvit.compile_repeated_blocks(fullgraph=True)
    else:
        for block in [*uvit.in_blocks, uvit.mid_block, *uvit.out_blocks]:
            block._compiled_call_impl = None  # what nn.Module.compile sets


def measure(trainer: Trainer, steps: int, warmup: int, say) -> dict:
    """Rates of `steps` optimiser steps after `warmup` steps, the first of which compiles."""
    wait = torch.cuda.synchronize if trainer.ranks.device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(warmup):
        start = time.perf_counter()
        trainer.step()
        wait()
        seconds.append(time.perf_counter() - start)
        say(f"warm-up step: {seconds[-1]:.2f} s")
    if trainer.ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.meter.reset()
    for _ in range(steps):
        trainer.step()
    wait()
    row = trainer.meter.summary()
    say(f"{steps} steps: {row['images_per_s']:.1f} images/s, MFU {row.get('mfu', 0):.1%}, data {row['data_wait']:.1%}, {row['memory_gib']:.1f} GiB")
    return {key: value for key, value in row.items() if not key.startswith("loss/")} | {"first_step_s": seconds[0], "warmup_s": sum(seconds)}


def split(trainer: Trainer) -> dict[str, float]:
    """Milliseconds of each part of one step, the device waited for before and after it: {"data": ..., "forward": ..., ...}"""
    wait = torch.cuda.synchronize if trainer.ranks.device.type == "cuda" else lambda: None
    engine, zero, spent = trainer.engine, trainer.engine.optimizer, {}
    parts = {"data": (trainer.feed, "next"), "noise": (trainer.objective, "example"), "forward": (engine, "forward"), "loss": (trainer.objective, "loss"),
             "backward": (engine, "backward"), "engine.step": (engine, "step"), "of it gradient norm": (zero, "scaled_global_norm"),
             "of it AdamW": (trainer.optimizer, "step"), "EMA": (trainer.ema, "update")}

    def timed(name, function):
        def call(*args, **kwargs):
            wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            spent[name] = spent.get(name, 0) + 1e3 * (time.perf_counter() - start)
            return result
        return call

    with contextlib.ExitStack() as undo:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, timed(name, getattr(owner, attribute)))  # an attribute of the object, before that of its class
            undo.callback(delattr, owner, attribute)
        timed("step", trainer.step)()
    return {name: round(value, 3) for name, value in spent.items()}


KINDS_OF_KERNELS = [  # the first that fits
    ("attention", r"fmha|flash|sdpa|attention|cudnn_generated"), ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas"),
    ("optimizer and averages", r"adam|multi_tensor|foreach|lerp"), ("our kernels", r"proxt2i|qkv_norm|matching|noised|philox"),
    ("compiled by inductor", r"^triton_"), ("layer norm", r"layer_?norm|GammaBeta"), ("copies and casts", r"copy|memcpy|cat"),
    ("sums", r"reduce"), ("elementwise", r"elementwise|vectorized")]


def write_profile(step, path: Path) -> dict[str, float]:
    """A table of one step's kernels by their time on the device. Returns the milliseconds of each kind of kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profiler(activities=activities) as result:
        step()
    events, on_gpu = result.key_averages(), torch.cuda.is_available()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(events.table(sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=60, max_name_column_width=110))
    kinds: dict[str, float] = {}
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:  # kernels alone, not the operators that started them
            kind = next((name for name, pattern in KINDS_OF_KERNELS if re.search(pattern, event.key, re.IGNORECASE)), "others")
            kinds[kind] = kinds.get(kind, 0) + event.self_device_time_total / 1e3
    return {name: round(value, 2) for name, value in sorted(kinds.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches per optimiser step (default: 4, as 1,024 images on 4 GPUs)")
    parser.add_argument("--kinds", nargs="+", choices=["compiled", "eager"], default=["compiled", "eager"], help="of the network, measured in this order")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--folder", type=Path, help="where data and components are kept for the next call (default: a temporary folder)")
    parser.add_argument("--images", type=int, default=256, help="pictures in the data, drawn and encoded where --folder has none (default: 256)")
    parser.add_argument("--prepare", action="store_true", help="make --folder and measure nothing")
    parser.add_argument("--profile", type=Path, metavar="FILE.txt", help="write where the time of a step goes")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    started = time.perf_counter()

    def say(message):
        print(f"[{time.perf_counter() - started:6.1f} s] {message}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        batch = args.micro_batch * args.accumulate
        settings = prepare(folder, args.images, args.device)
        if args.prepare:
            return
        say("data and components are there")
        settings += [f"train.micro_batch={args.micro_batch}", f"train.batch_size={batch}", "model.gradient_checkpointing=false",
                     *(TINY if args.device == "cpu" else []), *args.overrides]
        trainer = make_trainer(folder, settings)
        say("the trainer is ready")
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        result = {"device": device, "torch": torch.__version__, "micro_batch": args.micro_batch, "batch": batch, "overrides": args.overrides}
        for kind in args.kinds:
            use(trainer.uvit, kind)
            result[kind] = measure(trainer, args.steps, args.warmup, lambda message: say(f"{kind}: {message}"))
            write_result(args.out, result)
            result[kind]["split_ms"] = split(trainer)
            say(f"{kind}: {json.dumps(result[kind])}")
            if args.profile:
                result[kind]["kernels_ms"] = write_profile(trainer.step, args.profile.with_suffix(f".{kind}{args.profile.suffix}"))
                say(f"{kind}: {json.dumps(result[kind]['kernels_ms'])}")
            write_result(args.out, result)
        trainer.feed.close()


if __name__ == "__main__":
    main()
