"""The entry point: light, found by lmms-eval, our tasks in its index, and never an exception."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from deem_plugin.evaluation import entrypoint
from deem_plugin.resources import lmms_tasks_dir

from .helpers import offline_env

OUR_TASKS = {"deem_details"} | {
    f"{group}{split}"
    for group in ("robustvqa", *(f"robustvqa_{kind}" for kind in ("reworded", "choice", "loglikelihood", "paper")))
    for split in ("", "_a", "_r", "_v2")
}
OUR_TASKS |= {
    f"deem_pope{kind}{split}"
    for kind in ("", "_loglikelihood")
    for split in ("", "_random", "_popular", "_adversarial")
}
OUR_TASKS |= {f"deem_refcoco{split}" for split in ("_val", "_test", "_testA", "_testB", "+_val", "+_testA", "+_testB")}
OUR_TASKS |= {"deem_refcocog_val", "deem_refcocog_test"}


def python(code: str, tmp_path) -> str:
    """Runs code in a fresh interpreter and returns what it printed last."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=offline_env(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_loading_the_entry_point_imports_nothing_heavy(tmp_path):
    code = """
import json, sys
from importlib.metadata import entry_points
import deem_plugin.evaluation.entrypoint
(entry,) = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "deem"]
manifest = entry.load()()
heavy = {"torch", "transformers", "diffusers", "datasets", "PIL", "lmms_eval.tasks"} & set(sys.modules)
print(json.dumps([manifest.model_id, manifest.chat_class_path, manifest.simple_class_path, sorted(heavy)]))
"""
    module = "deem_plugin.evaluation.lmms"
    assert json.loads(python(code, tmp_path)) == ["deem", f"{module}.DeemChat", f"{module}.DeemSimple", []]


def test_the_installed_package_declares_the_entry_point():
    assert "deem_plugin.evaluation.entrypoint:manifest" in {e.value for e in entry_points(group="lmms_eval.models")}


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lmms_eval.models", "lmms_eval.tasks"])
def test_tasks_are_indexed_whichever_of_models_and_tasks_is_imported_first(tmp_path, first):
    code = f"""
import importlib, json
importlib.import_module("{first}")
import lmms_eval.models
from lmms_eval.tasks import TaskManager
index = {{name: entry["yaml_path"] for name, entry in TaskManager("WARNING")._task_index.items()}}
print(json.dumps([name for name, path in index.items() if str(path).startswith({str(lmms_tasks_dir())!r})]))
"""
    assert set(json.loads(python(code, tmp_path))) == OUR_TASKS


def fake_tasks_module(init):
    class Module:
        class TaskManager:
            pass

    Module.TaskManager.__init__ = init
    return Module


def test_our_folder_comes_last_so_that_others_tasks_of_a_name_win():
    seen = []

    def init(self, verbosity="INFO", include_path=None, include_defaults=True, model_name=None):
        seen.append(include_path)

    module, ours = fake_tasks_module(init), str(lmms_tasks_dir())
    entrypoint._include_our_tasks(module)
    entrypoint._include_our_tasks(module)  # a second time changes nothing

    module.TaskManager()
    module.TaskManager("INFO", "theirs")
    module.TaskManager(include_path=["one", "two"], model_name="m")
    module.TaskManager(include_path="theirs", include_defaults=False)

    assert seen == [[ours], ["theirs", ours], ["one", "two", ours], "theirs"]


def test_an_unknown_task_manager_is_left_alone_with_a_hint(caplog):
    def init(self, verbosity="INFO"):
        pass

    module = fake_tasks_module(init)
    entrypoint._include_our_tasks(module)

    assert module.TaskManager.__init__ is init
    assert f"--include_path {lmms_tasks_dir()}" in caplog.text


def test_the_manifest_comes_even_when_the_tasks_cannot_be_shown(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", object())  # half imported: no TaskManager

    assert entrypoint.manifest().model_id == "deem"
    assert "cannot see the tasks" in caplog.text
