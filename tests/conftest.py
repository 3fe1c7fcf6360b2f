"""What every test shares: no hub, no telemetry, and the reference material where it lies beside the checkout."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
from hypothesis import settings

# A few examples, always the same, unless `HYPOTHESIS_PROFILE=many`; a busy machine is no failure.
settings.register_profile("few", max_examples=20, derandomize=True, deadline=None, database=None)
settings.register_profile("many", max_examples=500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with parity tensors and real photographs; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"reference material not found at {folder}")
    return folder
