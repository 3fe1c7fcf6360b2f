"""The parts that faults are made of, and a finished run to damage."""

import shutil
from pathlib import Path

import pytest

from deem_plugin.cli import main

from ..training.conftest import parts  # noqa: F401  # a fixture
from ..training.helpers import tiny_overrides
from .rows import Place


@pytest.fixture(scope="session")
def run_of_two_checkpoints(parts, tmp_path_factory) -> Path:  # noqa: F811
    """The output folder of a run of two steps with a checkpoint at each."""
    out = tmp_path_factory.mktemp("trained") / "run"
    settings = {"model__model": parts / "llava", "training__save_strategy": "steps", "training__save_steps": 1}
    assert main(["train", "tiny-tune", *tiny_overrides(parts, out, **settings)]) == 0
    return out


@pytest.fixture
def place(parts, tmp_path, request) -> Place:  # noqa: F811
    """Where a fault is made."""

    def trained(out: Path) -> Path:
        return Path(shutil.copytree(request.getfixturevalue("run_of_two_checkpoints"), out))

    return Place(tmp_path, parts, trained)
