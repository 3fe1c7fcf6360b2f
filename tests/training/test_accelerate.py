"""The configurations for `accelerate launch` that ship beside the recipes, and sharding where there are no GPUs."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from deem_plugin.feedback.callback import is_sharded
from deem_plugin.resources import recipes_dir
from deem_plugin.training.run import _say_whether_sharded
from deem_plugin.training.sharding import name_sharded_layers, uses_fsdp

from ..tiny import tiny_llava
from .helpers import tiny_overrides

FILES = sorted((recipes_dir() / "accelerate").glob("*.yaml"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_each_file_and_knows_what_it_says(path):
    config = load_config_from_file(str(path))

    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[path.stem.split("-")[0]]
    assert config.distributed_type == kind and config.num_processes == 8 * config.num_machines
    assert config.mixed_precision == "no"  # the recipe says it
    assert ("2-nodes" in path.stem) == (config.num_machines == 2)
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_there_is_one_for_each_way():
    assert sorted(path.stem for path in FILES) == ["ddp", "ddp-2-nodes", "fsdp2", "fsdp2-2-nodes", "zero2", "zero3"]


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ({"fsdp": True}, "MULTI_CPU", "FSDP was asked for"),
        ({"deepspeed_plugin": object()}, "MULTI_CPU", "DEEPSPEED was asked for"),
        ({"fsdp": True}, "FSDP", ""),
        ({}, "MULTI_CPU", ""),
    ],
)
def test_sharding_without_gpus_says_what_it_does(asked, kind, said, caplog):
    args = SimpleNamespace(**{"fsdp": None, "deepspeed_plugin": None, **asked})

    with caplog.at_level(logging.WARNING):
        _say_whether_sharded(args, DistributedType[kind])

    assert said in caplog.text and bool(said) == ("Each process holds the whole model" in caplog.text)


def test_layers_to_shard_are_told_to_accelerate_launch_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    args = SimpleNamespace(fsdp=None, fsdp_plugin_args=None, deepspeed_plugin=None)

    name_sharded_layers(tiny_llava()[0], args)

    named = os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
    assert "LlamaDecoderLayer" in named and "CLIPTextEmbeddings" not in named
    assert uses_fsdp(args) and is_sharded(args)


@pytest.mark.slow
def test_accelerate_launch_trains_by_the_shipped_ddp_file(parts, tmp_path):
    """On two processes of a CPU, which the file is told by options as another number of GPUs would be."""
    config = yaml.safe_load((recipes_dir() / "accelerate" / "ddp.yaml").read_text())
    config |= {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2, "main_process_port": 0}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(config))
    overrides = tiny_overrides(parts, tmp_path / "run", model__model=parts / "llava")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "cpu.yaml")]
    command += ["-m", "deem_plugin", "train", "tiny-tune", *overrides]

    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file() and "MULTI" not in done.stderr


@pytest.mark.slow
def test_zero_2_ends_where_ddp_does(parts, tmp_path):
    pytest.importorskip("deepspeed")
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    options = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": 2}, **options}
    (tmp_path / "zero2.json").write_text(json.dumps(config))
    settings = {"model__model": parts / "llava", "training__optim": "sgd", "training__learning_rate": 0.05}
    settings |= {"training__max_steps": 3, "data__cache_dir": tmp_path / "cache", "feedback__weight": 1.0}
    for name, given in (("ddp", {}), ("zero2", {"training__deepspeed": tmp_path / "zero2.json"})):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "deem_plugin", "train", "tiny-tune"]
        command += tiny_overrides(parts, tmp_path / name, **settings, **given)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and ("DeepSpeed" in done.stdout + done.stderr) == (name == "zero2"), done.stderr

    for file in ("model.safetensors", "feedback.safetensors"):
        one, two = (load_file(tmp_path / name / "final" / file) for name in ("ddp", "zero2"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_all_ranks_end_with_the_first_error_of_one(parts, tmp_path):
    """One of eight pictures of a step is missing, so that one rank fails while the other waits for its gradients."""
    records = [
        record if index else {**record, "image": "gone.png"}
        for index, record in enumerate(
            entry for entry in json.loads((parts / "data.json").read_text()) if "image" in entry
        )
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    settings = {"model__model": parts / "llava", "data__path": tmp_path / "data.json", "training__num_train_epochs": 9}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "deem_plugin", "train", "tiny-tune", *tiny_overrides(parts, tmp_path / "run", **settings)]

    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )

    assert done.returncode != 0 and "gone.png" in done.stderr, done.stderr[-6000:]
