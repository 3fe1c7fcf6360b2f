import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from deem_plugin.training import checkpoint as checkpoints
from deem_plugin.training import run as runs
from deem_plugin.training.checkpoint import (
    check_room,
    check_writable,
    find_damage,
    naming_a_full_disk,
    save_in_one_piece,
    train_and_keep,
    write_manifest,
)
from deem_plugin.training.recipes import load_recipe
from deem_plugin.training.run import train

from .helpers import tiny_overrides

ROOT = Path(__file__).resolve().parents[2]
EVERY_STEP = {"training__save_strategy": "steps", "training__save_steps": 1}


def recipe(parts, out, **settings):
    return load_recipe("tiny-tune", tiny_overrides(parts, out, model__model=parts / "llava", **settings))


def same_weights(one, two):
    for name in ("model.safetensors", "feedback.safetensors"):
        expected, given = load_file(one / name), load_file(two / name)
        assert expected.keys() == given.keys() and all(torch.equal(given[key], expected[key]) for key in expected)


def names(folder):
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """An uninterrupted run of three steps with a checkpoint at each; its folder."""
    folder = tmp_path_factory.mktemp("whole")
    train(recipe(parts, folder, training__max_steps=3, **EVERY_STEP))
    return folder


def test_output_that_cannot_be_written_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ValueError, match=r"file/out cannot be written .*Set `training.output_dir`"):
        check_writable(tmp_path / "file" / "out")


def test_the_check_leaves_an_empty_folder(tmp_path):
    check_writable(tmp_path / "a" / "b")

    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_manifest_tells_what_is_wrong_with_a_checkpoint(tmp_path):
    (tmp_path / "global_step3").mkdir()
    for name in ("one", "global_step3/two"):
        (tmp_path / name).write_text("contents")
    assert "has no manifest.json" in find_damage(tmp_path)

    write_manifest(tmp_path)

    assert find_damage(tmp_path) is None and not (tmp_path / "manifest.json.partial").exists()
    (tmp_path / "global_step3/two").write_text("CONTENTS")
    assert find_damage(tmp_path) == "the contents of its file global_step3/two are not what was written"
    (tmp_path / "global_step3/two").write_text("conten")
    assert find_damage(tmp_path) == "its file global_step3/two has 6 bytes, 8 were written"
    (tmp_path / "global_step3/two").unlink()
    assert find_damage(tmp_path) == "its file global_step3/two is missing"
    for text in ('{"fil', '{"files": []}', '{"files": {"weights": {}}}'):
        (tmp_path / "manifest.json").write_text(text)
        assert find_damage(tmp_path) == "its manifest.json is damaged"


def test_each_file_of_a_checkpoint_is_vouched_for(whole):
    written = {path.name for path in (whole / "checkpoint-3").iterdir()}

    assert set(json.loads((whole / "checkpoint-3/manifest.json").read_text())["files"]) == written - {"manifest.json"}
    assert {"model.safetensors", "feedback.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= written


def damaged_copy(whole, folder, damage, name):
    """Copies a run as if it had been interrupted, with one file of its newest checkpoint damaged."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final")
    path = folder / "checkpoint-3" / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        contents = bytearray(path.read_bytes())
        contents[len(contents) // 2] ^= 255
        path.write_bytes(contents)
    return folder


FILES = ("model.safetensors", "feedback.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("changed", "model.safetensors"),
        ("missing", "manifest.json"),
        *(
            pytest.param(damage, name, marks=pytest.mark.slow)
            for damage in ("missing", "truncated", "changed")
            for name in (*FILES, "trainer_state.json")
        ),
    ],
)
def test_a_run_falls_back_to_the_newest_whole_checkpoint_and_says_so(parts, whole, tmp_path, caplog, damage, name):
    folder = damaged_copy(whole, tmp_path / "run", damage, name)

    final = train(recipe(parts, folder, training__max_steps=3, training__resume_from_checkpoint="last", **EVERY_STEP))

    assert f"{name}" in caplog.text and "It is now damaged-checkpoint-3" in caplog.text
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "damaged-checkpoint-3"]
    same_weights(whole / "final", final)


def test_a_damaged_checkpoint_that_is_named_is_refused(parts, whole, tmp_path):
    folder = damaged_copy(whole, tmp_path / "run", "truncated", "optimizer.pt")

    with pytest.raises(ValueError, match=r"checkpoint-3 cannot be resumed: its file optimizer.pt has \d+ bytes"):
        train(recipe(parts, folder, training__resume_from_checkpoint=folder / "checkpoint-3"))


def test_a_finished_run_that_is_resumed_trains_no_further(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    resume = {"training__max_steps": 3, "training__resume_from_checkpoint": "last"}

    final = train(recipe(parts, tmp_path / "run", **resume, **EVERY_STEP))

    assert json.loads((tmp_path / "run/trainer_state.json").read_text())["global_step"] == 3
    assert names(tmp_path / "run") == names(whole)
    same_weights(whole / "final", final)


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_those_of_another(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run .*resume_from_checkpoint=last"):
        train(recipe(parts, tmp_path / "run"))
    other = {"training__resume_from_checkpoint": whole / "checkpoint-1"}
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        train(recipe(parts, tmp_path / "run", **other))

    train(recipe(parts, tmp_path / "run", training__overwrite_output_dir=True, **EVERY_STEP))

    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


def test_checkpoints_behind_the_one_that_is_resumed_are_set_aside(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    back = {"training__max_steps": 2, "training__resume_from_checkpoint": tmp_path / "run/checkpoint-1"}

    train(recipe(parts, tmp_path / "run", **back))

    assert names(tmp_path / "run") == ["checkpoint-1", "later-checkpoint-2", "later-checkpoint-3"]


def test_older_checkpoints_go_only_when_the_new_one_is_sealed(parts, tmp_path, monkeypatch):
    """A kill before the manifest must not leave the run without any checkpoint."""
    sealed = []

    def look(folder):
        sealed.append([path.name for path in tmp_path.glob("checkpoint-*") if (path / "manifest.json").is_file()])
        write_manifest(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", look)
    train(recipe(parts, tmp_path, training__max_steps=3, training__save_total_limit=1, **EVERY_STEP))

    assert sealed == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert names(tmp_path) == ["checkpoint-3"]


def write_into(folder):
    with open(f"{folder}/weights", "w") as file:
        file.write("new")


def test_a_save_replaces_the_earlier_one(tmp_path):
    for _ in range(2):
        save_in_one_piece(tmp_path / "final", write_into, True, lambda: None)

    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "weights").read_text() == "new"


def test_a_failed_save_leaves_the_earlier_one_and_nothing_else(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "weights").write_text("old")

    def fail(folder):
        write_into(folder)
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        save_in_one_piece(tmp_path / "final", fail, True, lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "weights").read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 116864 vs 116756"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_with_its_folder_and_the_remedy(whole, error):
    message = (
        rf"The disk of {whole} is full \(\d+ MiB free\). The newest complete checkpoint is checkpoint-3 and takes"
    )
    with pytest.raises(ValueError, match=message), naming_a_full_disk(whole):
        raise error


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), naming_a_full_disk(tmp_path):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_run_whose_result_finds_no_room_does_not_begin(tmp_path, monkeypatch):
    check_room(tmp_path, torch.nn.Linear(4, 4))
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: SimpleNamespace(free=79))

    with pytest.raises(ValueError, match="the trained model alone takes"):
        check_room(tmp_path, torch.nn.Linear(4, 4))  # 20 parameters of 4 bytes


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_without_checkpoints_keeps_the_room_that_its_result_takes(fails, parts, tmp_path, monkeypatch):
    room, sizes = tmp_path / "room-for-final", []

    def look(trainer):
        sizes.append(room.stat().st_size)
        if fails:
            raise RuntimeError("no more")
        train_and_keep(trainer)

    monkeypatch.setattr(runs, "train_and_keep", look)
    with pytest.raises(RuntimeError, match="no more") if fails else nullcontext():
        train(recipe(parts, tmp_path, training__max_steps=1, training__save_strategy="'no'"))

    assert not room.exists()
    assert (tmp_path / "final" / "model.safetensors").is_file() != fails
    if not fails and sizes[0]:  # not every file system sets room aside
        assert sizes[0] >= (tmp_path / "final" / "model.safetensors").stat().st_size * 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "kills", "steps", "more"),
    [
        pytest.param(1, 40, 60, {}, id="one process"),
        pytest.param(2, 6, 12, {"training__dataloader_num_workers": 1}, id="two ranks"),
        pytest.param(2, 6, 12, {"training__fsdp": "true"}, id="two ranks with shards"),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_where_the_uninterrupted_one_does(
    ranks, kills, steps, more, parts, tmp_path
):
    """Every second kill comes in the middle of a save."""
    settings = {"model__model": parts / "llava", "training__max_steps": steps, "training__save_total_limit": 2}
    settings |= {"training__resume_from_checkpoint": "last", **EVERY_STEP, **more}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, number in (("whole", 0), ("killed", kills)):
        command = [sys.executable, "-m", "tests.training.run_killed", tmp_path / name, str(number), str(ranks)]
        command += tiny_overrides(parts, tmp_path / name, **settings)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]

    same_weights(tmp_path / "whole/final", tmp_path / "killed/final")
