"""Ids of the hub may name a revision, everywhere alike: a cache of the hub stands in for it."""

import hashlib
import os
import subprocess
import sys

import pytest

from deem_plugin.hub import at_revision, split_revision

from .tiny import tiny_full_clip, tiny_llama, tiny_llava, tiny_sd_folder, tiny_text_encoder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name@", ("owner/name", None)),
        ("/data/me@home/model", ("/data/me@home/model", None)),
        ("../me@home", ("../me@home", None)),
    ],
)
def test_a_revision_stands_behind_the_id(name, expected):
    assert split_revision(name) == expected


def test_a_folder_of_that_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name@v1").mkdir()

    assert at_revision("owner/name@v1") == {"pretrained_model_name_or_path": "owner/name@v1"}
    assert at_revision("owner/name@v2") == {"pretrained_model_name_or_path": "owner/name", "revision": "v2"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The cache of a hub whose repositories hold a model at the revision `v1` and nothing at `main`."""
    home = tmp_path_factory.mktemp("hub")
    makers = {
        "llava": tiny_llava,
        "llama": tiny_llama,
        "clip": tiny_full_clip,
        "sd": lambda folder: tiny_text_encoder(tiny_sd_folder(folder)),
    }
    for name, make in makers.items():
        folder = home / "hub" / f"models--owner--{name}"
        (folder / "refs").mkdir(parents=True)
        for reference in ("main", "v1"):
            commit = hashlib.sha1(f"{name}{reference}".encode()).hexdigest()
            (folder / "refs" / reference).write_text(commit)
            (folder / "snapshots" / commit).mkdir(parents=True)
        make(folder / "snapshots" / commit)
        # As a hub's cache notes that there is no such file.
        missing = folder / ".no_exist" / commit / "tokenizer" / "config.json"
        missing.parent.mkdir(parents=True)
        missing.touch()
    return home


LOADS = {
    "evaluation": "from deem_plugin.evaluation.loading import load_vlm; load_vlm('owner/llava@v1')",
    "training": (
        "from deem_plugin.training.arguments import ModelArguments\n"
        "from deem_plugin.training.model import make_model; make_model(ModelArguments(model='owner/llava@v1'))\n"
        "make_model(ModelArguments(language_model='owner/llama@v1', vision_tower='deem:owner/clip@v1'))"
    ),
    "encoder": (
        "from deem_plugin.training.arguments import ModelArguments\n"
        "from deem_plugin.training.encoder import load_encoder\n"
        "load_encoder(ModelArguments(encoder='owner/clip@v1'))\n"
        "from deem_plugin.evaluation.clip import load_clip; load_clip('owner/clip@v1', device='cpu')"
    ),
    "diffusion model": (
        "from deem_plugin.feedback.diffusion_model import load_diffusion_model\n"
        "from deem_plugin.feedback.prompts import prompt_states\n"
        "denoiser = load_diffusion_model('owner/sd@v1').denoiser; load_diffusion_model('owner/sd@v1', weights=False)\n"
        "prompt_states('owner/sd@v1', 'a picture', denoiser.context_dim)"
    ),
    "fingerprint": "from deem_plugin.evaluation.fingerprint import fingerprint; fingerprint('owner/llava@v1')",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LOADS)
def test_models_are_loaded_at_the_revision(hub, what):
    def load(code):
        env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_CACHE", "HF_HOME")}
        env |= {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    done = load(LOADS[what])
    assert done.returncode == 0, done.stderr[-2000:]
    assert load(LOADS[what].replace("@v1", "")).returncode != 0
