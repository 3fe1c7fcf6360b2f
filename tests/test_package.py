"""The package as a whole: what an import costs, what the command says, where its files are."""

import linecache
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deem_plugin
from deem_plugin.cli import main
from deem_plugin.resources import lmms_tasks_dir, recipes_dir

HEAVY = ("torch", "transformers", "diffusers", "datasets", "open_clip", "peft", "PIL")


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded in a fresh process after `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["deem_plugin", "deem_plugin.cli", "deem_plugin.resources"])
def test_importing_the_package_loads_nothing_heavy(module):
    assert not modules_after(f"import {module}") & set(HEAVY)


@pytest.mark.parametrize("name", deem_plugin.__all__)
def test_every_public_name_is_there(name):
    assert getattr(deem_plugin, name).__doc__


def test_an_unknown_public_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'DeemTower'.*DeemVisionTower"):
        deem_plugin.DeemTower  # noqa: B018


def test_recipes_and_tasks_are_found():
    assert (recipes_dir() / "llava-1.5-7b-feedback.yaml").is_file()
    assert any(lmms_tasks_dir().rglob("robustvqa*.yaml"))


def test_errors_of_the_command_are_one_line_and_an_exit_status(capsys):
    assert main(["train", "no-such-recipe"]) == 1

    error = capsys.readouterr().err
    assert error.startswith("deem train: Unknown recipe 'no-such-recipe'") and "Traceback" not in error


def failing_command(monkeypatch, code: str, file="deem_plugin/lmms.py"):
    """Lets `deem lmms-tasks-dir` run `code` as if it stood in `file`, and returns the command's `main`."""
    path = Path(deem_plugin.__file__).parents[1] / file
    source = f"def fail():\n    {code}\n"
    monkeypatch.setitem(linecache.cache, str(path), (len(source), None, source.splitlines(keepends=True), str(path)))
    names = {"torch": torch}
    exec(compile(source, str(path), "exec"), names)
    monkeypatch.setattr("deem_plugin.resources.lmms_tasks_dir", names["fail"])
    return lambda: main(["lmms-tasks-dir"])


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(2, 3) @ torch.zeros(2, 3)",  # RuntimeError of torch, as when the memory is out
        "int('seven')",
        "a, b = range(3)",
        "{}['key']",
        "open(3000)",  # an OSError that names no file
        "raise BrokenPipeError('a worker is gone')",
    ],
)
def test_the_command_hides_no_traceback_of_a_bug(monkeypatch, code):
    with pytest.raises((RuntimeError, ValueError, KeyError, OSError)):
        failing_command(monkeypatch, code)()


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError"])
def test_what_a_library_raises_is_a_bug_and_what_we_raise_is_for_the_user(monkeypatch, capsys, error):
    with pytest.raises((RuntimeError, ValueError)):
        failing_command(monkeypatch, f"raise {error}('inside')", "torch/nn/functional.py")()

    assert failing_command(monkeypatch, f"raise {error}('Give another.')")() == 1
    assert capsys.readouterr().err == "deem lmms-tasks-dir: Give another.\n"


def test_a_file_that_is_not_there_is_no_bug(monkeypatch, capsys):
    assert failing_command(monkeypatch, "open('/no/such/file')")() == 1

    assert capsys.readouterr().err.startswith("deem lmms-tasks-dir: [Errno 2] No such file or directory: '/no/such")


def test_the_tasks_folder_is_printed(capsys):
    assert main(["lmms-tasks-dir"]) == 0

    assert capsys.readouterr().out.strip() == str(lmms_tasks_dir())
