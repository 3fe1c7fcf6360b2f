"""Recipes over gloo ranks, by DDP and sharded by FSDP2: the Trainer's own wrapping, saving and resuming."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from deem_plugin.data.collator import ConversationCollator
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train
from deem_plugin.training.sharding import PictureInEachBatch

from ..tiny import tiny_image, tiny_llava
from .helpers import tiny_overrides

ROOT = Path(__file__).resolve().parents[2]
LORA = {"model__lora__r": 2, "model__lora__dropout": 0.0, "model__lora__modules": "[language_model, vision_tower]"}


@pytest.fixture(scope="module")
def certain(parts, tmp_path_factory):
    """A diffusion model whose autoencoder draws nothing: its posteriors have no width."""
    folder = tmp_path_factory.mktemp("certain") / "sd"
    shutil.copytree(parts / "sd", folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        half = slice(vae.config.latent_channels, None)  # the logarithms of the variances
        vae.quant_conv.weight[half], vae.quant_conv.bias[half] = 0.0, -60.0
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def run(parts, certain, tmp_path):
    """Runs four optimizer steps of four conversations, every fourth without a picture, on so many ranks."""

    def run(ranks, out, **settings):
        given = {"feedback__diffusion_model__path": certain, "model__model": parts / "llava"}
        # Plain gradient steps: Adam's would turn a rounding error of a small gradient into a whole step.
        given |= {"training__optim": "sgd", "training__learning_rate": 0.05, "training__max_steps": 4}
        settings = {**given, "data__cache_dir": tmp_path / "cache", "feedback__weight": 1.0, **settings}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += ["-m", "tests.training.run_ranks", *tiny_overrides(parts, tmp_path / out, **settings)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return tmp_path / out

    return run


def assert_close(one, two):
    expected, given = load_file(one), load_file(two)
    assert expected.keys() == given.keys()
    for key, value in expected.items():
        torch.testing.assert_close(given[key], value, atol=1e-5, rtol=1e-5, msg=key)


def moved(parts, folder):
    start, end = load_file(parts / "llava/model.safetensors"), load_file(folder / "final/model.safetensors")
    return max((end[name] - value).abs().max().item() for name, value in start.items() if "vision" in name)


def logged(folder):
    names = ("loss", "feedback_loss", "grad_norm")
    steps = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [torch.tensor([step[name] for name in names]) for step in steps if "loss" in step]


FSDP = {"training__fsdp": "true"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "micro", "settings"),
    [(2, 2, FSDP), (4, 1, FSDP), (2, 2, FSDP | LORA), (2, 2, {}), (4, 1, {}), (2, 2, LORA)],
)
def test_ranks_end_where_one_process_does(run, parts, ranks, micro, settings):
    lora = {name: value for name, value in settings.items() if name in LORA}
    one = run(1, "one", training__per_device_train_batch_size=4, **lora)
    cut = {"training__per_device_train_batch_size": 1, "training__gradient_accumulation_steps": micro}
    several = run(ranks, "several", **cut, **settings)

    assert moved(parts, one) > 1e-3
    for name in ("gradients", "final/model", "final/feedback"):
        assert_close(one / f"{name}.safetensors", several / f"{name}.safetensors")
    assert len(logged(one)) == 4
    torch.testing.assert_close(logged(several), logged(one), atol=1e-5, rtol=1e-5)
    assert (several / "final/adapter").is_dir() == bool(lora)


@pytest.mark.slow
def test_a_sharded_run_resumes(run):
    settings = {"training__fsdp": "true", "training__per_device_train_batch_size": 2}
    settings |= {"training__save_strategy": "steps", "training__save_steps": 2, "training__optim": "adamw_torch"}
    whole = run(2, "whole", **settings)
    shutil.copytree(whole / "checkpoint-2", whole.with_name("parts") / "checkpoint-2")

    resumed = run(2, "parts", training__resume_from_checkpoint="last", **settings)

    for name in ("model", "feedback"):
        assert_close(whole / f"final/{name}.safetensors", resumed / f"final/{name}.safetensors")


def test_a_batch_of_text_alone_gets_a_picture_of_which_nothing_is_learned():
    model, processor = tiny_llava()
    collate = ConversationCollator(processor)
    texts = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}], "images": []}
        for answer in ("yes", "no")
    ]
    picture = {**texts[0], "images": [tiny_image(0)]}
    picture["messages"] = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "yes"}]

    batch = PictureInEachBatch(collate)(texts)

    assert len(batch["pixel_values"]) == 1 and len(batch["input_ids"]) == 3
    expected = model(**collate(texts)).loss
    torch.testing.assert_close(model(**batch).loss, expected)
    same = PictureInEachBatch(collate)([*texts, picture])
    assert all(torch.equal(value, same[name]) for name, value in collate([*texts, picture]).items())


def test_an_encoder_alone_is_not_sharded(parts, tmp_path):
    settings = {"model__encoder": parts / "clip", "data__path": parts / "images", "training__fsdp": "true"}
    with pytest.raises(ValueError, match="`training.fsdp` is for VLMs: an encoder alone fits on each GPU"):
        train(load_recipe("deem", tiny_overrides(parts, tmp_path, **settings)))
