"""Workers that are started anew, as on macOS, Windows and (from Python 3.14) Linux: all that they need is pickled."""

import os
import subprocess
import sys

import pytest

from ..models.tiny_deem import language_tokenizer, tiny_language_model, tiny_tower
from .helpers import tiny_overrides

RUN = """
import multiprocessing
import sys

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    from deem_plugin.cli import main

    sys.exit(main(sys.argv[2:]))
"""


def command(kind, parts, tmp_path):
    """Returns the arguments of `deem` for a run of each kind of data."""
    settings = {"data__cache_dir": tmp_path / "cache", "training__dataloader_num_workers": 2}
    if kind == "pictures":
        settings |= {"model__encoder": parts / "clip", "data__path": parts / "images", "data__crop_area": 0.9}
        return ["train", "deem", *tiny_overrides(parts, tmp_path / "out", **settings)]
    if kind == "conversations":
        settings["model__model"] = parts / "llava"
        return ["train", "tiny-tune", *tiny_overrides(parts, tmp_path / "out", **settings)]
    tokenizer = language_tokenizer()
    for part in (tiny_language_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "language")
    tiny_tower(multiscale=True).save_pretrained(tmp_path / "tower")
    settings |= {"model__language_model": tmp_path / "language", "model__vision_tower": f"deem:{tmp_path / 'tower'}"}
    settings |= {"deem__image_weight": 0, "deem__feedback_weight": 0, "deem__denoiser": "null"}
    settings["model__model"] = "null"
    return ["train", "deem-tiny-tune", *tiny_overrides(parts, tmp_path / "out", feedback=None, **settings)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("kind", ["conversations", "pictures", "interleaved"])
def test_workers_of_a_training_may_be_started_anew(kind, method, parts, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), method, *command(kind, parts, tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "out" / "final").glob("model.safetensors"))
