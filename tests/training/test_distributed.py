import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

from .helpers import tiny_overrides


def torchrun(overrides):
    """Runs `deem train tiny-tune` in two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "deem_plugin.cli", "train", "tiny-tune", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 2])
def test_two_processes_train_with_feedback_and_save_once(parts, tmp_path, lora):
    settings = {"model__model": parts / "llava", "model__lora__r": lora, "data__cache_dir": tmp_path / "cache"}
    settings |= {"training__per_device_train_batch_size": 1, "training__max_steps": 4}
    if lora:
        settings["model__lora__modules"] = "[language_model, vision_tower]"
    done = torchrun(tiny_overrides(parts, tmp_path / "out", **settings))

    final = tmp_path / "out" / "final"
    assert (final / "model.safetensors").is_file() and (final / "feedback.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.partial"))
    assert done.stderr.count("Parameters by part") == 1


@pytest.mark.slow
def test_two_processes_take_the_steps_that_one_takes_with_twice_the_batch(parts, tmp_path):
    settings = {"model__model": parts / "llava", "data__cache_dir": tmp_path / "cache", "training__optim": "sgd"}
    one = tiny_overrides(parts, tmp_path / "one", feedback=None, **settings, training__per_device_train_batch_size=4)
    two = tiny_overrides(parts, tmp_path / "two", feedback=None, **settings, training__per_device_train_batch_size=2)

    single = load_file(train(load_recipe("tiny-tune", [*one, "feedback=null"])) / "model.safetensors")
    torchrun([*two, "feedback=null"])

    double = load_file(tmp_path / "two" / "final" / "model.safetensors")
    start = load_file(parts / "llava" / "model.safetensors")
    for name, value in single.items():
        torch.testing.assert_close(double[name] - start[name], value - start[name], rtol=1e-3, atol=1e-7)
