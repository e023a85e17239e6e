"""A tiny model, data set and run for the tests of training, here and in soak/; runs.py has the functions."""

import os

import pytest
from runs import run_settings, write_components, write_squares

from proxt2i.training import distributed

LONG = ("test_failure.py", "test_slurm.py", "test_emulated.py", "test_few_step.py", "test_grpo.py", "test_grpo_zero.py", "test_gpu_check.py", "test_embedded.py", "test_latents.py", "test_zero.py")


def pytest_collection_modifyitems(items):
    """Long files first, so that of several at a time none is left for the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def components(tmp_path_factory):
    return write_components(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def ranks():
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        os.environ.pop(name, None)
    return distributed.start(threads=1)


@pytest.fixture
def settings(components, shards, tmp_path):
    """Overrides of a run of 12 steps that takes about a second."""
    return run_settings(components, shards, tmp_path / "run")


@pytest.fixture(scope="session")
def model(components, tmp_path_factory):
    """A model folder: a random U-ViT with the tiny components."""
    import torch

    from proxt2i.models.bundle import Bundle, load_components, save_bundle
    from proxt2i.models.uvit import build_uvit

    text, codec = load_components(components)
    torch.manual_seed(1)
    uvit = build_uvit("portraits", sample_size=4, in_channels=2, embed_dim=32, depth=3, num_heads=2, text_dims=text.dims, text_lengths=text.lengths, betas=[0.1, 20.0])
    folder = tmp_path_factory.mktemp("model") / "model"
    save_bundle(folder, Bundle(uvit, text, codec, source=components))
    return folder


@pytest.fixture
def grpo(model, tmp_path):
    """Overrides of a run of 6 rollouts (12 updates) that takes a second or two; the reward needs no weights."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue square\n\na green square\n")
    return {
        "model.init_from": model, "prompts.source": prompts, "rewards.train": "[{name: jpeg_compressibility}]", "rewards.panel": "[]",
        "rollout.steps": 3, "rollout.group_size": 4, "rollout.groups_per_update": 2, "rollout.updates": 2, "rollout.guidance": 2.0,
        "optim.lr": 1e-3, "optim.eps": 1e-3,  # so that gradients of 0 stay near it, whatever their rounding
        "train.images": 96, "train.log_every": 1, "train.checkpoint_every": 32, "train.run_dir": tmp_path / "run",
        "train.tensorboard": "false", "sample.every": 0, "train.threads": 1, "guard.every": 32, "guard.prompts": 2, "guard.per_prompt": 4,
        "train.precision": "fp32",  # on any CPU: tests hold results to its rounding
    }
