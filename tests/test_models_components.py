"""Text encoders, codecs and model folders, on tiny models made here."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from proxt2i.models import (
    Bundle, LatentCodec, PixelSpace, Settings, TextEncoder, build_uvit, bundle, load_bundle, load_codec,
    load_components, save_bundle,
)
from proxt2i.models.files import atomic_folder

WORDS = "a woman man with red hair glasses smiling and long".split()
CAPTIONS = ["a woman with red hair", "", "a man with glasses and long hair", "a smiling man"]


def word_tokenizer(kind: str, max_length: int) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(specials + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<s> $A </s>" if kind == "clip" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=max_length)


def clip_model():
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=10, bos_token_id=1,
                                        eos_token_id=2, pad_token_id=0))


def t5_model():
    torch.manual_seed(2)
    return T5EncoderModel(T5Config(vocab_size=20, d_model=12, d_kv=6, d_ff=24, num_layers=2, num_heads=2))


def vae_model(latent_channels=4):
    torch.manual_seed(3)
    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
                         latent_channels=latent_channels, scaling_factor=1.5305, shift_factor=0.0609,
                         use_quant_conv=False, use_post_quant_conv=False)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A components folder: CLIP + T5 text encoders and a VAE."""
    folder = tmp_path_factory.mktemp("components")
    text = TextEncoder([word_tokenizer("clip", 8), word_tokenizer("t5", int(1e30))], [clip_model(), t5_model()], [8, 7])
    text.save_pretrained(folder)
    LatentCodec(vae_model()).save_pretrained(folder)
    return folder


@pytest.fixture
def components(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "components")


def make_uvit(**overrides):
    torch.manual_seed(4)
    return build_uvit("portraits", **{**dict(sample_size=4, in_channels=4, embed_dim=16, depth=3, num_heads=2,
                                             text_dims=[16, 12], text_lengths=[8, 7]), **overrides})


@pytest.fixture
def model(components, tmp_path):
    """A saved model folder."""
    text, codec = load_components(components)
    save_bundle(tmp_path / "model", Bundle(make_uvit(), text, codec, Settings(num_steps=6), components))
    return tmp_path / "model"


# --- text -------------------------------------------------------------------------------------------------------------

def test_text_shapes_lengths_and_freezing(components):
    text = TextEncoder.from_pretrained(components)
    assert text.dims == [16, 12] and text.lengths == [8, 7]
    text.train()
    assert not any(m.training for m in text.modules()) and not any(p.requires_grad for p in text.parameters())
    clip, t5 = text(CAPTIONS)
    assert clip.shape == (4, 8, 16) and t5.shape == (4, 7, 12)
    assert clip.dtype == t5.dtype == torch.float32 and not clip.requires_grad


def test_text_is_the_last_hidden_state_and_zero_past_the_end(components):
    clip, t5 = TextEncoder.from_pretrained(components)(CAPTIONS)
    with torch.no_grad():  # unpadded, straight through the models: "<s> a smiling man </s>", and T5 without <s>
        ids = torch.tensor([[1, 4, 11, 6, 2]])
        torch.testing.assert_close(clip[3, :5], clip_model().eval()(input_ids=ids).last_hidden_state[0])
        torch.testing.assert_close(t5[3, :4], t5_model().eval()(input_ids=ids[:, 1:]).last_hidden_state[0])
    for row, n in enumerate((7, 2, 8, 5)):  # tokens with <s> and </s>; the empty caption keeps both
        assert (clip[row, :n].abs().sum(-1) > 0).all() and not clip[row, n:].any()
    for row, n in enumerate((6, 1, 7, 4)):
        assert (t5[row, :n].abs().sum(-1) > 0).all() and not t5[row, n:].any()


def test_a_captions_embedding_does_not_depend_on_its_batch(components):
    text = TextEncoder.from_pretrained(components)
    together = text(CAPTIONS + CAPTIONS[::-1])
    for i, caption in enumerate(CAPTIONS):
        for both, alone in zip(together, text([caption])):
            torch.testing.assert_close(both[i], alone[0], rtol=1e-5, atol=1e-6)
            assert torch.equal(both[i], both[7 - i])


def test_over_long_captions_are_cut_and_reported_once(components, caplog):
    text = TextEncoder.from_pretrained(components)
    long = "a woman with long red hair and glasses smiling"
    assert text.truncated([long, "a man", "a man with glasses and hair"]) == [True, False, False]
    with caplog.at_level(logging.WARNING):
        clip, _ = text(["a man", long])
        text([long + " and long hair"])
    assert len([r for r in caplog.records if "are cut" in r.message and long in r.message]) == 1
    assert len([r for r in caplog.records if "are cut" in r.message]) == 1
    assert (clip[1].abs().sum(-1) > 0).all()  # full, and it still ends in </s>:
    torch.testing.assert_close(clip[1], text(["a woman with long red hair"])[0][0])
    with pytest.raises(ValueError, match="list of strings"):
        text("a man")


def test_default_lengths(components):
    assert TextEncoder([word_tokenizer("clip", 77)], [clip_model()]).lengths == [10]  # the model's positions
    assert TextEncoder([word_tokenizer("t5", int(1e30))], [t5_model()]).lengths == [128]
    with pytest.raises(ValueError, match="exceeds the encoder's 10"):
        TextEncoder([word_tokenizer("clip", 77)], [clip_model()], [11])
    clip_only = TextEncoder.from_sources([(components / "tokenizer", components / "text_encoder")], lengths=[5])
    assert clip_only(["a man"])[0].shape == (1, 5, 16)


def test_text_errors_name_the_file(components):
    weights = components / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "final_layer_norm" not in k}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder_2.*missing.*final_layer_norm"):
        TextEncoder.from_pretrained(components)
    weights.unlink()
    (weights.parent / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="no .safetensors weights; pytorch_model.bin is a pickle"):
        TextEncoder.from_pretrained(components)
    config = components / "text_encoder" / "config.json"
    config.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert' model"):
        TextEncoder.from_pretrained(components)
    shutil.rmtree(components / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer folder is missing"):
        TextEncoder.from_pretrained(components)


# --- codecs -----------------------------------------------------------------------------------------------------------

def test_codec_normalises_and_round_trips_shapes(components):
    codec = load_codec(components)
    assert isinstance(codec, LatentCodec) and (codec.channels, codec.factor) == (4, 2)
    images = torch.rand(3, 3, 16, 12) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (3, 4, 8, 6) and latents.dtype == torch.float32
    with torch.no_grad():
        z = codec.vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(latents, (z - 0.0609) * 1.5305)
        torch.testing.assert_close(codec.decode(latents), codec.vae.decode(z).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    decoded = codec.decode(30 * latents)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    with pytest.raises(ValueError, match="divisible by 2"):
        codec.encode(images[..., :15, :])
    with pytest.raises(ValueError, match="VAE has 4"):
        codec.decode(latents[:, :3])


def test_codec_slices_big_batches_and_samples(components):
    codec, sliced = load_codec(components), load_codec(components)
    sliced.max_pixels = 2 * 16 * 16
    calls = []
    sliced.vae.encoder.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(codec.encode(images), sliced.encode(images), rtol=1e-4, atol=1e-5)
    assert calls == [2, 2, 1]
    latents = codec.encode(images)
    torch.testing.assert_close(codec.decode(latents), sliced.decode(latents), rtol=1e-4, atol=1e-5)
    draws = [codec.encode(images, sample=True, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2])
    assert not torch.allclose(draws[0], codec.encode(images))


def test_codec_decodes_in_float32_under_autocast_and_passes_gradients(components):
    codec = LatentCodec.from_pretrained(components, dtype=torch.bfloat16)
    exact = load_codec(components)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = exact.encode(images)
    coarse = codec.encode(images)
    assert 0 < (coarse - latents).norm() / latents.norm() < 0.05
    latents.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        decoded = codec.decode(latents)
    torch.testing.assert_close(decoded, exact.decode(latents))
    decoded.sum().backward()
    assert latents.grad.abs().sum() > 0 and not any(p.grad is not None for p in codec.parameters())
    half = codec.decode(latents, torch.bfloat16)
    assert half.dtype == torch.float32 and half.requires_grad and 0 < (half - decoded).abs().mean() < 0.02


def test_pixel_space_when_there_is_no_vae_folder(tmp_path):
    codec = load_codec(tmp_path)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert isinstance(codec, PixelSpace) and (codec.channels, codec.factor) == (3, 1)
    assert torch.equal(codec.encode(images), images) and codec.decode(2 * images).abs().max() == 1
    with pytest.raises(ValueError, match="pixel space has 3"):
        codec.decode(torch.zeros(1, 4, 8, 8))


# --- model folders ----------------------------------------------------------------------------------------------------

def test_bundle_round_trip_is_bit_equal(model, components):
    loaded = load_bundle(model)
    assert loaded.settings == Settings(num_steps=6)
    assert not any(p.requires_grad for p in loaded.uvit.parameters()) and not loaded.uvit.training
    for name, weight in make_uvit().state_dict().items():
        assert torch.equal(weight, loaded.uvit.state_dict()[name]), name
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                 "tokenizer_2/tokenizer.json"):
        assert (model / part).read_bytes() == (components / part).read_bytes()
    y, text = torch.randn(2, 4, 4, 4), loaded.text(["a man", ""])
    assert loaded.uvit(y, torch.rand(2), torch.rand(2), text).shape == y.shape
    assert loaded.codec.decode(y).shape == (2, 3, 8, 8)
    assert json.loads((model / "model_index.json").read_text())["text_encoder_2"] == ["transformers", "T5EncoderModel"]
    assert not [p for p in model.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_bundle_without_source_is_written_from_memory(components, tmp_path):
    text, codec = load_components(components)
    save_bundle(tmp_path / "model", Bundle(make_uvit(), text, codec))
    again = load_bundle(tmp_path / "model")
    assert again.text.lengths == [8, 7]
    for a, b in zip(text(CAPTIONS), again.text(CAPTIONS)):
        assert torch.equal(a, b)


def test_bundle_in_other_precisions(model):
    loaded = load_bundle(model, dtype=torch.bfloat16)
    assert loaded.uvit.dtype == loaded.text.encoders[0].dtype == torch.bfloat16
    assert loaded.codec.vae.dtype == torch.float32
    loaded.uvit.half().save_pretrained(model / "uvit")  # half on disk, float32 when asked
    assert load_bundle(model).uvit.dtype == torch.float32


def test_small_folder_falls_back_to_embedded_components(components, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "EMBEDDED", components)
    text, codec = load_components(components)
    save_bundle(tmp_path / "small", Bundle(make_uvit(), text, codec, source=components), with_components=False)
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == ["README.md", "model_index.json", "pipeline.py", "scheduler", "uvit"]
    loaded = load_bundle(tmp_path / "small")
    assert loaded.source == components and loaded.text.dims == [16, 12] and loaded.codec.channels == 4
    monkeypatch.setattr(bundle, "EMBEDDED", tmp_path / "nowhere")
    assert load_bundle(tmp_path / "small", components=components).codec.channels == 4
    with pytest.raises(ValueError, match="nowhere"):
        load_bundle(tmp_path / "small")


def test_components_that_do_not_fit_are_refused(model, components, tmp_path):
    text, codec = load_components(components)
    text_only = Bundle(make_uvit(text_dims=[16, 13]), text, codec, source=components)
    save_bundle(tmp_path / "other_text", text_only)
    with pytest.raises(ValueError, match=r"wants text encoders .*\(13, 7\).* have .*\(12, 7\)"):
        load_bundle(tmp_path / "other_text")
    save_bundle(tmp_path / "other_vae", Bundle(make_uvit(in_channels=8), text, codec, source=components))
    with pytest.raises(ValueError, match="U-ViT has 8 channels, the VAE in .* has 4"):
        load_bundle(tmp_path / "other_vae")
    shutil.rmtree(model / "vae")
    with pytest.raises(ValueError, match="lists vae, but .*vae is missing"):
        load_bundle(model)
    (model / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"U-ViT has 4 channels, pixel space \(no vae folder\)"):
        load_bundle(model)


def corrupt(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("part", ["uvit/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                                  "text_encoder/model.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, -100])
def test_truncated_weights_are_named(model, part, keep):
    corrupt(model / part, keep)
    with pytest.raises(ValueError, match=f"{part} is not a readable safetensors file.*copy or download it again"):
        load_bundle(model)


def test_load_weights_names_a_damaged_or_missing_file(model):
    path, uvit = model / "uvit/diffusion_pytorch_model.safetensors", make_uvit()
    uvit.norm.bias.data.fill_(9.0)
    before = uvit.norm.bias
    bundle.load_weights(uvit, path)
    assert uvit.norm.bias is before and not before.any()  # in place: optimizers keep their parameters
    corrupt(path, -100)
    with pytest.raises(ValueError, match="not a readable safetensors"):
        bundle.load_weights(uvit, path)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        bundle.load_weights(uvit, path)


@pytest.mark.parametrize("part, message", [
    ("uvit", "uvit folder is missing"), ("uvit/config.json", "uvit/config.json is missing"),
    ("uvit/diffusion_pytorch_model.safetensors", "uvit has no .safetensors weights"),
    ("scheduler/scheduler_config.json", "scheduler_config.json is missing"), ("tokenizer", "tokenizer is missing"),
])
def test_missing_parts_are_named(model, part, message):
    shutil.rmtree(model / part) if (model / part).is_dir() else (model / part).unlink()
    with pytest.raises(ValueError, match=message):
        load_bundle(model)


@pytest.mark.parametrize("betas", [[20.0, 0.1], [0.1, 20.0, 1.0], "x"])
def test_a_config_that_describes_no_uvit_is_named(model, betas):
    path = model / "uvit" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"betas": betas}))
    with pytest.raises(ValueError, match="uvit/config.json describes no U-ViT"):
        load_bundle(model)


def test_wrong_class_wrong_weights_and_wrong_settings_are_named(model, tmp_path):
    with pytest.raises(ValueError, match="folder .*nothing does not exist"):
        load_bundle(tmp_path / "nothing")
    settings = model / "scheduler/scheduler_config.json"
    good = settings.read_text()
    for text, message in (('{"plans": "ode"}', "did you mean 'plan'"), ('{"num_steps": "8"}', "num_steps must be a int"),
                          ('{"num_steps": true}', "num_steps must be a int"), ("[1]", "JSON object"),
                          ("{", "readable JSON")):
        settings.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_bundle(model)
    settings.write_text('{"guidance_scale": 3, "_class_name": "Anything"}')
    assert load_bundle(model).settings == Settings(guidance_scale=3.0)
    settings.write_text(good)

    weights = model / "uvit/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    without = {name: tensor for name, tensor in tensors.items() if name != "norm.bias"}
    for broken in (without, {**tensors, "norm.bias": torch.zeros(3)}):
        save_file(broken, weights)
        with pytest.raises(ValueError, match="uvit/diffusion_pytorch_model.safetensors do not fit.*norm.bias"):
            load_bundle(model)
    save_file(tensors, weights)
    for part, name in (("uvit", "UViT2DModel"), ("vae", "AutoencoderKL")):
        path = model / part / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
        with pytest.raises(ValueError, match=f"{part}/config.json says _class_name 'UNet2DModel'; {name} is needed"):
            load_bundle(model)
        path.write_text(json.dumps(config))


def test_saves_are_atomic(tmp_path):
    folder = tmp_path / "model"
    with atomic_folder(folder) as tmp:
        (tmp / "a").write_text("old")
        assert not folder.exists()
    with pytest.raises(RuntimeError), atomic_folder(folder) as tmp:
        (tmp / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]
    (tmp_path / ".model.tmp-killed").mkdir()  # what a kill -9 leaves
    with atomic_folder(folder) as tmp:
        (tmp / "a").write_text("new")
        assert (folder / "a").read_text() == "old"
    assert (folder / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_kill_between_the_renames_loses_nothing(model):
    previous = model.parent / ".model.previous"
    model.rename(previous)  # the state between the two renames
    with pytest.raises(ValueError, match="interrupted save left .*previous, rename it to model"):
        load_bundle(model)
    with pytest.raises(RuntimeError), atomic_folder(model):
        assert previous.is_dir()
        raise RuntimeError
    assert previous.is_dir()
    previous.rename(model)
    bundle_ = load_bundle(model)
    save_bundle(model, bundle_)  # in place, onto its own source
    assert load_bundle(model).settings.num_steps == 6 and not previous.exists()
