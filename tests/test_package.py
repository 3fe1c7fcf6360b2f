"""The package as a whole: what an import costs, what the command says, where its files are."""

import subprocess
import sys

import pytest

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


def test_the_tasks_folder_is_printed(capsys):
    assert main(["lmms-tasks-dir"]) == 0

    assert capsys.readouterr().out.strip() == str(lmms_tasks_dir())
