"""A tiny model, data set and run for the tests of training; tiny_run.py has the functions."""

import os
import random

import pytest
import torch
from PIL import Image
from tiny_run import COLORS

from proxt2i.training import distributed


@pytest.fixture(scope="session")
def components(tmp_path_factory):
    """A model folder of frozen parts: a 2-channel VAE (factor 8) and a CLIP text tower, both tiny and random."""
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("components")
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


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    from proxt2i.data.shards import write_samples

    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for i in range(120):
        name = rng.choice(list(COLORS))
        image = Image.new("RGB", (32, 32), tuple(c + rng.randint(-15, 15) for c in COLORS[name]))
        samples.append({"key": f"{i:04d}", "image": image, "caption": f"a {name} square"})
    write_samples(folder, samples, shard_size=50)
    return folder


@pytest.fixture(scope="session")
def ranks():
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        os.environ.pop(name, None)
    return distributed.start(threads=1)


@pytest.fixture
def settings(components, shards, tmp_path):
    """Overrides of a run of 12 steps that takes about a second."""
    return {
        "data.shards": shards, "data.image_size": 32, "data.cache_dir": components / "latents", "model.components": components,
        "model.embed_dim": 32, "model.depth": 3, "model.num_heads": 2, "diffusion.step_counts": "[4,8]",
        "optim.lr": 2e-3, "optim.warmup_images": 32, "optim.ema_half_life": 100, "train.images": 192, "train.batch_size": 16,
        "train.log_every": 32, "train.checkpoint_every": 64, "train.run_dir": tmp_path / "run", "train.tensorboard": "false",
        "sample.every": 96, "sample.prompts": "[a red square,a blue square]", "sample.per_prompt": 2, "sample.steps": 4,
    }
