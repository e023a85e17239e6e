"""Few-step sampling with U-ViT-H at 512 x 512 on one GPU, against Stable Diffusion 3.5 Medium's network in diffusers' own pipeline.

    python benchmarks/large_sample.py [--batches 1 8] [--steps 10] [--out FILE.json]

Weights are random (both from their configurations) and in bfloat16; text embeddings are random tensors of the real sizes; latents are the
result (both have the same VAE after them). Ours: plan relaxed, guidance 1.5, "default" on the last steps only (guidance_below 0.35, the default),
"every step" in all of them; eager, behind CUDA graphs of the network, and all steps as one graph. Theirs: StableDiffusion3Pipeline, guidance 4.5, 28 and 40 steps.
overhead: 1 - (time of the network calls alone) / (time of all), both behind CUDA graphs, and with all steps as one.  --device cpu: a dry run on tiny networks.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from timing import medians, write_result  # noqa: E402

from proxt2i.diffusion import CudaGraphs, guidance_scales, guided, make_plan, trajectory  # noqa: E402
from proxt2i.models.uvit import build_uvit  # noqa: E402

SD35_MEDIUM = dict(sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
                   caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384, qk_norm="rms_norm",
                   dual_attention_layers=tuple(range(13)))


def seconds(function, device: str, repeats: int) -> float:
    return medians({"": function}, device, repeats, warmup=1)[""]


@torch.no_grad()
def ours(batches: list[int], num_steps: int, device: str, repeats: int) -> dict:
    torch.manual_seed(0)
    sizes = dict(sample_size=64, qk_norm=True, betas=[0.1, 20.0]) if device == "cuda" else dict(sample_size=8, embed_dim=64, depth=3, num_heads=1)
    with torch.device(device):
        uvit = build_uvit("H", **sizes).eval().requires_grad_(False).to(torch.bfloat16 if device == "cuda" else torch.float32)
    config, plan, result = uvit.config, make_plan("relaxed", num_steps), {}
    shape = (config.in_channels, config.sample_size, config.sample_size)
    networks = {"eager": uvit, "graphs": CudaGraphs(uvit)}
    for batch in batches:
        text = [torch.randn(batch, length, dim, device=device) for length, dim in zip(config.text_lengths, config.text_dims)]
        null = [torch.zeros_like(embedding[:1]) for embedding in text]
        for guidance, below in (("every step", 1.0), ("default", 0.35)):
            scales = guidance_scales(plan.tau, 1.5, below)
            for name, network in networks.items():
                def run(network=network, scales=scales, text=text, null=null, batch=batch):
                    for _ in trajectory(guided(network, text, null), plan, shape, torch.arange(batch, device=device), guidance_scale=scales, want_x=False):
                        pass

                result[f"B={batch}, {guidance}, {name}"] = {"seconds": seconds(run, device, repeats), "batch": batch,
                                                            "evaluations": num_steps + sum(scale != 1 for scale in scales)}
            if device == "cuda":
                def whole(scales=scales, text=text, null=null, batch=batch):
                    list(networks["graphs"].trajectory(guided, "prox", text, null, plan, shape, torch.arange(batch, device=device), scales))

                result[f"B={batch}, {guidance}, one graph"] = {**result[f"B={batch}, {guidance}, graphs"], "seconds": seconds(whole, device, repeats)}
        y, t, lam = torch.randn(2 * batch, *shape, device=device), torch.rand(2 * batch, device=device), torch.rand(2 * batch, device=device)
        both = [torch.cat([embedding, empty.expand_as(embedding)]) for embedding, empty in zip(text, null)]

        def calls(y=y, t=t, lam=lam, both=both):
            for _ in range(num_steps):
                networks["graphs"](y, t, lam, both)

        alone = seconds(calls, device, repeats)
        for name in ("graphs", "one graph"):
            if row := result.get(f"B={batch}, every step, {name}"):
                row["overhead"] = 1 - alone / row["seconds"]
    return result


@torch.no_grad()
def theirs(batches: list[int], step_counts: list[int], device: str, repeats: int) -> dict:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    config = SD35_MEDIUM if device == "cuda" else SD35_MEDIUM | dict(num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
                                                                    dual_attention_layers=(0,), joint_attention_dim=32, pooled_projection_dim=16)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        transformer = SD3Transformer2DModel(**config).eval().requires_grad_(False).to(dtype)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None,
                                    tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    result = {}
    for batch in batches:
        text = torch.randn(batch, 333, config["joint_attention_dim"], device=device, dtype=dtype)
        pooled = torch.randn(batch, config["pooled_projection_dim"], device=device, dtype=dtype)
        embeddings = dict(prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=torch.zeros_like(pooled))
        size = 512 if device == "cuda" else 64
        for count in step_counts:
            def run(count=count, embeddings=embeddings):
                pipe(**embeddings, num_inference_steps=count, guidance_scale=4.5, height=size, width=size, output_type="latent")

            result[f"B={batch}, {count} steps"] = {"seconds": seconds(run, device, repeats), "batch": batch, "evaluations": 2 * count}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    counts = [28, 40] if args.device == "cuda" else [2]
    result = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "torch": torch.__version__, "steps": args.steps,
              "ours": ours(args.batches, args.steps, args.device, args.repeats)}
    result["sd3.5-medium"] = theirs(args.batches, counts, args.device, args.repeats)
    for kind in ("ours", "sd3.5-medium"):
        for name, row in result[kind].items():
            row["images_per_s"] = row["batch"] / row["seconds"]
            print(f"{kind:13s} {name:34s} {row['images_per_s']:8.2f} images/s  {row['evaluations']:3d} evaluations" +
                  (f"  overhead {100 * row['overhead']:.2f} %" if "overhead" in row else ""), flush=True)
    rate = {kind: {name: row["images_per_s"] for name, row in result[kind].items()} for kind in ("ours", "sd3.5-medium")}
    result["ratio"] = {f"B={batch}, {guidance}, {args.steps} steps / {count} steps":
                       max(v for k, v in rate["ours"].items() if k.startswith(f"B={batch}, {guidance}")) / rate["sd3.5-medium"][f"B={batch}, {count} steps"]
                       for batch in args.batches for guidance in ("every step", "default") for count in counts}
    for name, ratio in result["ratio"].items():
        print(f"{name:44s} {ratio:6.2f} x")
    write_result(args.out, result)


if __name__ == "__main__":
    main()
