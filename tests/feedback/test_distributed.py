import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .helpers import keyed_callback, relative_difference, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("checkpoint",)], ids=["plain", "checkpointing"])
def test_two_processes_get_the_gradients_of_one(tmp_path, extra):
    trainer, (expected,) = train(tmp_path / "one", keyed_callback())

    (tmp_path / "two").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    command += ["-m", "tests.feedback.run_distributed", str(tmp_path / "two"), *extra]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]

    two = torch.load(tmp_path / "two/rank0.pt", weights_only=True)
    assert relative_difference(expected, {n: two["gradients"][n] for n in expected}) < 1e-5
    assert relative_difference(expected, {n: two["gradients"][n] for n in expected}, "vision_tower") < 1e-5
    assert two["feedback_loss"] == pytest.approx(trainer.state.log_history[0]["feedback_loss"], rel=1e-5)
