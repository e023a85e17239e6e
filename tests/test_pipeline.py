"""ProxT2IPipeline: the same pictures as the command line, in diffusers' ways."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from runs import ROOT

from proxt2i import ProximalScheduler, ProxT2IPipeline, sample
from proxt2i.diffusion import CudaGraphs
from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.models.bundle import Bundle, Settings, load_bundle, load_components, save_bundle
from proxt2i.models.uvit import build_uvit
from proxt2i.pipeline import generate

PROMPT, OTHER = "a smiling woman with long red hair and glasses", "a man with a beanie"


@pytest.fixture(scope="module")
def shipped():
    pipe = ProxT2IPipeline.from_pretrained(SHIPPED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shipped):
    """With a scheduler of its own, for tests that change it."""
    shipped.scheduler = ProximalScheduler.from_config(shipped.scheduler.config)
    return shipped


def test_pictures_are_those_of_the_command_line(shipped, tmp_path):
    assert sample.main([PROMPT, OTHER, "--num-images", "2", "--seed", "5", "--steps", "4", "--out", str(tmp_path)]) == 0
    drawn = shipped([PROMPT, OTHER], seeds=5, num_images_per_prompt=2, num_inference_steps=4).images
    files = sorted(p for p in tmp_path.glob("*.png") if p.name != "grid.png")
    assert len(drawn) == len(files) == 4
    for picture, file in zip(drawn, files):
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(file)))


def test_cuda_graphs_can_be_asked_for_anywhere(shipped):
    """On a CPU the network is called as it is; on GPUs tests/device_checks.py compares them."""
    plain = shipped(PROMPT, seeds=5, num_inference_steps=4, output_type="pt").images
    shipped.enable_cuda_graphs()
    assert isinstance(shipped.bundle.network, CudaGraphs)
    assert torch.equal(shipped(PROMPT, seeds=5, num_inference_steps=4, output_type="pt").images, plain)
    shipped.disable_cuda_graphs()
    assert shipped.bundle.network is None


class Recorded(CudaGraphs):
    """Graphs for a machine without a GPU: the function that would have been captured, on the graph's own inputs and into its own output."""

    captures = 0

    @staticmethod
    def works_on(device):
        return not torch.is_grad_enabled()

    def _capture(self, function, inputs):
        self.captures += 1
        own, output = [x.clone() for x in inputs], torch.empty(0)
        return SimpleNamespace(replay=lambda: output.set_(function(*own))), own, output


@pytest.mark.parametrize("objective", ["prox", "score"])
def test_the_whole_sampler_as_one_graph(shipped, objective):
    """What a graph would replay, on its own copies of seeds, coefficients and text, draws what the sampler draws step by step."""
    bundle = shipped.bundle
    settings = replace(bundle.settings, objective=objective)

    def draw(network, **choices):
        return generate(replace(bundle, settings=settings, network=network), [PROMPT, OTHER, OTHER], [5, 6, 7], num_steps=3, batch_size=2, **choices)

    graphs = Recorded(bundle.uvit)
    for choices in ({}, {"negative_prompts": [OTHER, PROMPT, ""]}, {"guidance_scale": 3.0}, {"plan": "hybrid"}):
        assert torch.equal(draw(graphs, **choices), draw(None, **choices))
    assert graphs.captures == 7  # two sizes of batch each; a negative prompt of one picture has the empty caption's shape
    draw(graphs, guidance_scale=3.0)
    assert graphs.captures == 7
    seen = []
    draw(graphs, callback=lambda i, y, x: seen.append(x))  # who looks gets every step, from graphs of the network
    assert len(seen) == 6 and graphs.captures > 7


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline

folder, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
torch.save(pipe("a man with a beanie", seeds=3, num_inference_steps=4, output_type="pt").images, target + "/picture.pt")
pipe.save_pretrained(target + "/saved")
"""


def test_plain_diffusers_opens_the_shipped_model_and_what_it_saves(shipped, tmp_path):
    """As diffusers documents for pipelines of others, in a process that imports nothing of ours."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD, str(SHIPPED_MODEL), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    expected = shipped(OTHER, seeds=3, num_inference_steps=4, output_type="pt").images
    assert torch.equal(torch.load(tmp_path / "picture.pt", weights_only=True), expected)

    saved = tmp_path / "saved"
    assert {p.name for p in saved.iterdir()} == {"README.md", "model_index.json", "pipeline.py", "scheduler", "text_encoder", "tokenizer", "uvit", "vae"}
    assert not [p for p in saved.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    assert (saved / "uvit" / "diffusion_pytorch_model.safetensors").exists() and "library_name: diffusers" in (saved / "README.md").read_text()
    again = ProxT2IPipeline.from_pretrained(saved)
    assert torch.equal(again(OTHER, seeds=3, num_inference_steps=4, output_type="pt").images, expected)
    assert torch.equal(generate(load_bundle(saved), [OTHER], [3], num_steps=4), generate(load_bundle(SHIPPED_MODEL), [OTHER], [3], num_steps=4))


@pytest.mark.parametrize("objective", ["prox", "score"])
def test_a_trained_folder_opens_in_both(components, tmp_path, objective):
    """What the trainer writes: components of its own, either objective."""
    text, codec = load_components(components)
    torch.manual_seed(0)
    uvit = build_uvit("portraits", sample_size=8, in_channels=codec.channels, embed_dim=32, depth=3, num_heads=2, text_dims=text.dims, text_lengths=text.lengths)
    settings = Settings(plan="hybrid", num_steps=5, objective=objective, guidance_below=1.0, beta_max=18.0, eta=0.5)
    save_bundle(tmp_path / "model", Bundle(uvit, text, codec, settings, components))
    pipe = ProxT2IPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.bundle.settings == settings == load_bundle(tmp_path / "model").settings
    drawn = pipe("a red square", seeds=[7, 8], num_images_per_prompt=2).images
    expected = generate(load_bundle(tmp_path / "model"), ["a red square"] * 2, [7, 8])
    assert all(np.array_equal(np.asarray(a), b.permute(1, 2, 0).numpy()) for a, b in zip(drawn, expected))
    pipe.save_pretrained(tmp_path / "again")
    assert load_bundle(tmp_path / "again").settings == settings
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["scheduler"] == ["proxt2i.diffusion.scheduler", "ProximalScheduler"]


def test_a_model_of_pixels(shipped, tmp_path):
    torch.manual_seed(0)
    uvit = build_uvit("portraits", sample_size=16, in_channels=3, embed_dim=32, depth=3, num_heads=2, text_dims=[96], text_lengths=[24])
    ProxT2IPipeline(uvit, ProximalScheduler(num_steps=3), shipped.text_encoder, shipped.tokenizer).save_pretrained(tmp_path / "pixels")
    pipe = ProxT2IPipeline.from_pretrained(tmp_path / "pixels")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae is None and pipe(OTHER, seeds=1, height=8).images[0].size == (16, 8)
    assert torch.equal(generate(load_bundle(tmp_path / "pixels"), [OTHER], [1]), generate(pipe.bundle, [OTHER], [1]))
    with pytest.raises(ValueError, match="has no VAE to slice or tile"):
        pipe.enable_vae_tiling()


def test_output_types_and_sizes(shipped):
    options = dict(seeds=3, num_inference_steps=4)
    latents, pt, array, (pil,) = (shipped(PROMPT, output_type=kind, **options).images for kind in ("latent", "pt", "np", "pil"))
    assert latents.shape == (1, 16, 8, 8) and latents.dtype == torch.float32
    decoded = shipped.bundle.codec.decode(latents)
    torch.testing.assert_close(pt, (decoded / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy()) and (pt[0] * 255).round().to(torch.uint8).permute(1, 2, 0).sub(torch.from_numpy(np.array(pil))).abs().max() <= 1
    assert shipped(PROMPT, return_dict=False, **options)[0][0].size == (64, 64)
    wide = shipped([PROMPT], height=48, width=96, **options).images[0]
    expected = generate(shipped.bundle, [PROMPT], [3], num_steps=4, size=(48, 96))[0]
    assert wide.size == (96, 48) and np.array_equal(np.asarray(wide), expected.permute(1, 2, 0).numpy())


def test_generators_draw_seeds(shipped):
    def draw(generator, **options):
        return shipped(PROMPT, num_inference_steps=2, generator=generator, output_type="latent", **options).images

    one = draw(torch.Generator().manual_seed(0), num_images_per_prompt=2)
    assert torch.equal(draw(torch.Generator().manual_seed(0), num_images_per_prompt=2), one) and not torch.allclose(one[0], one[1])
    listed = draw([torch.Generator().manual_seed(s) for s in (0, 1)], num_images_per_prompt=2)
    torch.testing.assert_close(listed[0], one[0])
    torch.testing.assert_close(listed[1:], draw(torch.Generator().manual_seed(1)))
    generator = torch.Generator().manual_seed(0)
    draw(generator)
    torch.testing.assert_close(draw(generator), one[1:])  # it goes on where it was
    torch.manual_seed(4)
    random = draw(None)
    assert not torch.allclose(draw(None), random)


def test_negative_prompts(shipped):
    def draw(negative, **options):
        return shipped(PROMPT, seeds=3, num_inference_steps=4, guidance_scale=2.0, guidance_below=1.0, negative_prompt=negative, output_type="latent", **options).images

    plain = draw(None)
    torch.testing.assert_close(draw(""), plain, rtol=1e-4, atol=1e-4)
    away = draw("a man with a beanie")
    assert (away - plain).abs().mean() > 0.05
    both = shipped([PROMPT, PROMPT], seeds=3, num_inference_steps=4, guidance_scale=2.0, guidance_below=1.0, negative_prompt=["", "a man with a beanie"], output_type="latent").images
    torch.testing.assert_close(both, torch.cat([plain, away]), rtol=1e-4, atol=1e-3)


def test_text_is_encoded_once_and_guidance_is_one_batch(shipped):
    texts, batches = [], []
    hooks = [shipped.text_encoder.register_forward_pre_hook(lambda module, args, kwargs: texts.append(len(kwargs["input_ids"])), with_kwargs=True),
             shipped.uvit.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))]
    shipped([PROMPT, OTHER, PROMPT], seeds=0, num_images_per_prompt=2, num_inference_steps=4, guidance_below=0.0)
    for hook in hooks:
        hook.remove()
    assert texts == [2, 1] and batches == [6, 6, 6, 12]


def test_callbacks_look_and_stop(shipped):
    seen = []

    def look(pipe, i, tau, tensors):
        seen.append((i, tau, tensors["latents"].clone()))
        return tensors

    options = dict(seeds=3, num_inference_steps=4, output_type="latent")
    whole = shipped(PROMPT, callback_on_step_end=look, **options).images
    assert torch.equal(whole, shipped(PROMPT, **options).images) and torch.equal(seen[-1][2], whole)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3] and all(a > b for (_, a, _), (_, b, _) in zip(seen, seen[1:]))

    def stop(pipe, i, tau, tensors):
        pipe._interrupt = i == 1

    assert torch.equal(shipped(PROMPT, callback_on_step_end=stop, **options).images, seen[1][2])
    with pytest.raises(ValueError, match="cannot be replaced"):
        shipped(PROMPT, callback_on_step_end=lambda pipe, i, tau, tensors: {"latents": tensors["latents"] + 1}, **options)


def test_the_schedulers_configuration_is_used(pipe):
    assert np.array_equal(*(np.asarray(pipe(PROMPT, seeds=3, **more).images[0]) for more in ({}, dict(num_inference_steps=8, guidance_scale=1.5, guidance_below=0.35))))
    for changes in (dict(plan="hybrid"), dict(eta=0.0), dict(extrapolation=0.0), dict(num_steps=6)):
        base = pipe(PROMPT, seeds=3, output_type="latent").images
        scheduler = pipe.scheduler
        pipe.scheduler = ProximalScheduler.from_config(scheduler.config, **changes)
        assert (pipe(PROMPT, seeds=3, output_type="latent").images - base).abs().max() > 1e-3, changes
        pipe.scheduler = scheduler


def test_vae_switches(shipped):
    latents = torch.randn(2, 16, 16, 16)
    whole = shipped.bundle.codec.decode(latents)
    shipped.enable_vae_slicing()
    assert shipped.vae.use_slicing
    torch.testing.assert_close(shipped.bundle.codec.decode(latents), whole, rtol=1e-4, atol=1e-4)
    shipped.disable_vae_slicing()
    shipped.enable_vae_tiling()
    tiled = shipped.bundle.codec.decode(latents)
    shipped.disable_vae_tiling()
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert torch.equal(shipped.bundle.codec.decode(latents), whole)


def test_a_prompt_that_is_too_long_says_what_is_not_heard(shipped, caplog):
    shipped(" ".join(["a woman"] * 11) + " with a green background", seeds=0, num_inference_steps=1)
    messages = [record.getMessage() for record in caplog.records if "does not hear" in record.getMessage()]
    assert len(messages) == 1 and "24 tokens" in messages[0] and "does not hear 'with a green background'" in messages[0]
    caplog.clear()
    shipped(PROMPT, seeds=0, num_inference_steps=1)
    assert not caplog.records


@pytest.mark.parametrize("arguments, message", [
    (dict(prompt=""), "prompt must be a string that is not empty"),
    (dict(prompt=[]), "prompt must be"),
    (dict(height=70), "size 70x64: height and width must be multiples of 16 pixels"),
    (dict(num_images_per_prompt=0), "num_images_per_prompt=0"),
    (dict(output_type="jpeg"), "output_type 'jpeg'"),
    (dict(num_inference_steps=0), "num_steps=0"),
    (dict(guidance_scale=-1.0), "guidance_scale=-1"),
    (dict(seeds=[1, 2]), "2 seeds for 1 pictures"),
    (dict(generator=[torch.Generator()] * 3), "3 generators for 1 pictures"),
    (dict(generator=torch.Generator(), seeds=1), "choose one"),
    (dict(negative_prompt=["a", "b"]), "2 negative prompts for 1 prompts"),
    (dict(callback_on_step_end_tensor_inputs=["prompt_embeds"]), "only 'latents'"),
])
def test_wrong_calls_are_refused_before_anything_is_drawn(shipped, arguments, message):
    hook = shipped.uvit.register_forward_pre_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        shipped(**{"prompt": PROMPT, **arguments})
    hook.remove()


def test_wrong_components_are_named(shipped, tmp_path):
    parts = {name: part for name, part in shipped.components.items() if part is not None}
    with pytest.raises(ValueError, match="text_encoder is given but tokenizer is missing"):
        ProxT2IPipeline(**{**parts, "tokenizer": None})
    with pytest.raises(ValueError, match="text_encoder and tokenizer are missing"):
        ProxT2IPipeline(**{**parts, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="DDIMScheduler; the U-ViT of this pipeline needs a ProximalScheduler"):
        ProxT2IPipeline(**{**parts, "scheduler": DDIMScheduler()})
    with pytest.raises(ValueError, match="16 channels, pixel space .* has 3"):
        ProxT2IPipeline(**{**parts, "vae": None})
    shipped.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="lists vae, but .* is missing; copy it"):
        ProxT2IPipeline.from_pretrained(tmp_path / "model")
