"""A cache of answers is never stale: its name or its key changes with the checkpoint's and the data's content."""

import json
import os
import re

import pytest

from deem_plugin import cli
from deem_plugin.evaluation import robustvqa, run
from deem_plugin.evaluation.fingerprint import fingerprint
from deem_plugin.evaluation.pope import import_pope
from deem_plugin.evaluation.run import evaluate

from ..tiny import tiny_llava
from .helpers import offline_env, robustvqa_rows, write_pope_files


@pytest.fixture(autouse=True)
def no_imports(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that looks like a checkpoint, with the state of training beside it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text(f"{name} one")
    return folder


def rewrite(path, text):
    """Overwrites a file without a trace in its size or times."""
    before = path.stat()
    path.write_text(text)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_any_change_of_what_is_loaded_changes_it(checkpoint):
    seen = {fingerprint(checkpoint)}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        rewrite(checkpoint / name, f"{name} two")
        seen.add(fingerprint(checkpoint))
    (checkpoint / "chat_template.jinja").write_text("another prompt")
    seen.add(fingerprint(checkpoint))
    assert len(seen) == 5 and all(re.fullmatch("[0-9a-f]{16}", one) for one in seen)


def test_neither_place_nor_training_state_matter(checkpoint):
    first = fingerprint(checkpoint)
    for name in ("optimizer.pt", "trainer_state.json"):
        (checkpoint / name).write_text("much further")
    (checkpoint / "checkpoint-10").mkdir()
    assert fingerprint(checkpoint) == first
    assert fingerprint(checkpoint.rename(checkpoint.with_name("elsewhere"))) == first


def test_an_adapter_counts_with_its_base(checkpoint, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(checkpoint)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    first = fingerprint(adapter)

    rewrite(checkpoint / "model.safetensors", "model.safetensors two")

    assert fingerprint(adapter) != first


def test_a_hub_id_counts_as_its_commit(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    seen = set()
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs" / "main").write_text(commit)
        seen.add(fingerprint("someone/model"))
    assert len(seen) == 2


def test_an_import_anew_counts(checkpoint, tmp_path):
    first = fingerprint(checkpoint)
    pope = write_pope_files(tmp_path / "pope")
    import_pope(pope, pope / "images")
    second = fingerprint(checkpoint)
    import_pope(pope, pope / "images")
    assert len({first, second, fingerprint(checkpoint)}) == 3


def test_evaluations_use_the_cache_of_that_name(checkpoint, tmp_path, monkeypatch):
    commands = []

    def stream(command, env):
        commands.append(command)
        (tmp_path / "20260101_000000_results.json").write_text('{"results": {"pope": {"pope_accuracy,none": 1}}}')
        return 0, []

    monkeypatch.setattr(run, "_stream", stream)
    arguments = ["--tasks", "pope", "--output_path", str(tmp_path), "--use_cache", "answers", "--limit", "4"]
    assert cli.main(["eval", str(checkpoint), "--", *arguments]) == 0
    [command] = commands
    assert command[command.index("--use_cache") + 1] == f"answers/{fingerprint(checkpoint)}"
    assert command[command.index("--limit") + 1] == "4"


def test_arguments_of_lmms_eval_in_the_wrong_place_are_told_the_right_one(checkpoint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", str(checkpoint), "--tasks", "pope"])
    assert "unrecognized arguments: --tasks pope; put what is for lmms-eval behind `--`" in capsys.readouterr().err


def test_a_missing_checkpoint_is_an_error(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path / "nowhere"), "--", "--use_cache", str(tmp_path / "answers")]) == 1
    assert "No such checkpoint folder" in capsys.readouterr().err


@pytest.mark.slow
def test_lmms_eval_asks_again_after_a_change_of_checkpoint_or_data(tmp_path, capfd, monkeypatch):
    # lmms-eval takes the commit of the repository around the working directory for its own version.
    monkeypatch.chdir(tmp_path)
    rows = robustvqa_rows(images=2)
    data = tmp_path / "home" / "robustvqa" / "robustvqa_a.parquet"
    env = {**offline_env(tmp_path), "DEEM_HOME": str(tmp_path / "home")}

    def hits() -> int:
        arguments = ["--tasks", "robustvqa_a", "--output_path", str(tmp_path / "out"), "--batch_size", "4"]
        evaluate(tmp_path / "llava", [*arguments, "--use_cache", str(tmp_path / "answers")], env=env)
        return int(re.search(r"ResponseCache stats: (\d+) hits", capfd.readouterr().err)[1])

    tiny_llava(tmp_path / "llava")
    robustvqa.write_robustvqa(rows, data)
    assert hits() == 0
    assert hits() == len(rows)
    # The same prompts in the same file, about other pictures; and then other weights in the same folder.
    robustvqa.write_robustvqa([{**row, "image": rows[-1]["image"]} for row in rows], data)
    assert hits() == 0
    weights = tmp_path / "llava" / "model.safetensors"
    tiny_llava(tmp_path / "other", seed=1)
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    assert hits() == 0
