"""The shipped components are what their recipes say: each figure is measured again on a small held-out set."""

import json

import pytest
import torch

from proxt2i.data.portraits import make_arrays
from proxt2i.embedded import ASSETS, HELD_OUT_SEED, SHIPPED_MODEL
from proxt2i.embedded.judge import Judge, diversity, frechet_distance, right_attributes
from proxt2i.embedded.train_clip import LENGTH, load_clip, retrieval
from proxt2i.embedded.train_clip_vision import held_out as contrast_figures
from proxt2i.embedded.train_vae import gather, image_batch, principal_components, psnr
from proxt2i.models.vae import LatentCodec


@pytest.fixture(scope="module")
def held_out():
    images, captions, metadata = make_arrays(HELD_OUT_SEED + 500, 128)
    return torch.from_numpy(images), captions, metadata


def recipe(name):
    return json.loads((ASSETS / name / "recipe.json").read_text())


def test_the_whole_default_fits_in_8_mb():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= 8e6


def test_no_pickles_are_shipped():
    assert not [p for p in ASSETS.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_judge_reads_held_out_drawings(held_out):
    images, _, metadata = held_out
    predicted, features = Judge()(images)
    right, _ = right_attributes(predicted, metadata)
    assert right.float().mean() > 0.998
    assert features.shape == (128, 96)


def test_judge_reads_drawings_through_the_vae(held_out):
    images, _, metadata = held_out
    codec = LatentCodec.from_pretrained(ASSETS)
    decoded = (codec.decode(codec.encode(images.float() / 127.5 - 1)) + 1) * 127.5
    right, _ = right_attributes(Judge()(decoded.round().to(torch.uint8))[0], metadata)
    assert right.float().mean() > 0.995


def test_vae_psnr_is_as_recorded(held_out):
    vae = LatentCodec.from_pretrained(ASSETS).vae
    assert psnr(vae, held_out[0]) == pytest.approx(recipe("vae")["held_out_psnr_db"], abs=0.4)


def test_vae_encoder_computes_principal_components(held_out):
    x = image_batch(held_out[0], torch.arange(128))
    z = LatentCodec.from_pretrained(ASSETS).encode(x)
    patches = gather(gather(gather(x)))  # all 192 values of every 8x8 patch
    flat = patches.movedim(1, -1).reshape(-1, 192).double()
    design = torch.cat([flat, torch.ones(len(flat), 1)], 1)
    target = z.movedim(1, -1).reshape(-1, 16).double()
    residual = target - design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
    assert residual.abs().max() < 0.01  # linear in the patch
    mean, directions, _ = principal_components(patches, 16)
    centred = flat - mean
    best = centred @ directions.T.double() @ directions.double()
    ours = torch.cat([target, torch.ones(len(target), 1)], 1)
    fit = ours @ torch.linalg.lstsq(ours, flat).solution
    assert (flat - fit).square().mean() < 1.15 * (centred - best).square().mean()  # and as good as this set's own PCA


def test_clip_retrieval_is_as_recorded():
    from transformers import AutoTokenizer

    figures = retrieval(load_clip(ASSETS / "clip"), AutoTokenizer.from_pretrained(ASSETS / "tokenizer"))
    for name, value in recipe("clip")["held_out"].items():
        assert figures[name] == pytest.approx(value, abs=0.02), name
    assert min(figures["by_attribute"].values()) > 0.95  # it hears every kind of word


def test_clip_reads_pictures_with_errors_as_recorded():
    from proxt2i.rewards.clip import load_clip_tokenizer

    recorded = recipe("clip")["vision"]
    figures = contrast_figures(load_clip(ASSETS / "clip"), load_clip_tokenizer(ASSETS / "tokenizer"), LatentCodec.from_pretrained(ASSETS), recorded["noise"], count=96)
    for name, value in figures.items():
        assert value == pytest.approx(recorded["after"][name], abs=0.1) and value > recorded["before"][name] + 0.1, name


def test_prompts_fit_the_text_encoder(held_out):
    from transformers import AutoTokenizer

    from proxt2i.data.portraits import make_portrait

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    for seed in range(300):
        assert len(tokenizer(make_portrait(seed, complete=True)[1])["input_ids"]) <= LENGTH


def test_text_encoder_is_the_text_tower_of_the_clip():
    from safetensors.torch import load_file

    clip, text = load_file(ASSETS / "clip" / "model.safetensors"), load_file(ASSETS / "text_encoder" / "model.safetensors")
    assert text and all(torch.equal(clip[k if k in clip else f"text_model.{k}"], v) for k, v in text.items() if "position_ids" not in k)


def test_shipped_model_records_its_recipe():
    shipped = json.loads((SHIPPED_MODEL / "recipe.json").read_text())
    at8 = [r for r in shipped["evaluation"] if r.get("steps") == 8 and r["sampler"] == "relaxed"]
    assert len(at8) == 1 and at8[0]["accuracy"] >= 0.995 and at8[0]["all_right"] >= 0.97 and at8[0]["frechet_distance"] > 0
    assert shipped["images"] >= 250_000 and "proxt2i.embedded.build" in shipped["command"]


# ---------------------------------------------------------------------------------------------- the judge's arithmetic
def test_frechet_distance_of_gaussians_in_closed_form():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    white = torch.randn(400_000, 5, dtype=torch.float64)
    white = (white - white.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T  # exactly N(0, I)'s moments
    std_a, std_b = torch.tensor([1.0, 2, 3, 0.5, 1]), torch.tensor([2.0, 1, 1, 0.5, 3])
    a, b = white * std_a @ basis.T, white * std_b @ basis.T + 0.3
    expected = 5 * 0.3**2 + (std_a - std_b).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_needs_two_pictures():
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.randn(1, 4), torch.randn(8, 4))


def test_diversity_is_the_variance_within_groups_alone():
    groups = torch.arange(3.0).repeat_interleave(4)[:, None] * 100  # far apart: must not count
    within = torch.tensor([0.0, 1, 2, 3]).repeat(3)[:, None]
    assert diversity(groups + within, 3) == pytest.approx(5 / 3)


def test_only_stated_attributes_are_asked_for():
    metadata = [{"attributes": {"person": "man", "skin": "tan", "hair_color": "red", "hair_style": "bun", "expression": "smiling",
                                "eyewear": "none", "hat": "none", "background": "pink"}, "stated": ["person", "skin"]}]  # fmt: skip
    predicted = torch.tensor([[1, 0, 3, 3, 0, 0, 0, 3]])
    right, stated = right_attributes(predicted, metadata)
    assert right.tolist() == [[True, False] + [True] * 6]
    assert stated.tolist() == [[True, True] + [False] * 6]
