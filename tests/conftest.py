"""A tiny model, data set and run for the tests of training, here and in soak/; runs.py has the functions."""

import os

import pytest
from runs import run_settings, write_components, write_squares

from proxt2i.training import distributed


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
