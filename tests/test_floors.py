"""What the callback asks for and what the extras ask for: floors that frameworks' pins allow, and no more imports."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Of the extras, or of our own tower.
NOT_OF_THE_CALLBACK = {
    "datasets",
    "open_clip",
    "timm",
    "trl",
    "sklearn",
    "deem_plugin.vision.tower",
    "deem_plugin.data",
}


def run(code: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "line",
    ["import deem_plugin.feedback", "from deem_plugin import DiffusionFeedbackCallback, FeedbackConfig"],
)
def test_the_callback_imports_nothing_of_our_tower_nor_of_the_extras(line):
    result = run(f"{line}\nimport sys; print(*sys.modules)")

    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "deem_plugin.feedback.callback" in loaded
    assert not loaded & NOT_OF_THE_CALLBACK


def test_our_tower_is_registered_by_its_first_use_and_by_one_module():
    known = "from transformers import AutoConfig; AutoConfig.for_model('deem_vision')"

    assert "Unrecognized model identifier" in run(f"import deem_plugin.vision, deem_plugin.feedback; {known}").stderr
    for line in (
        "import deem_plugin.vision.auto",
        "import deem_plugin.models",
        "from deem_plugin.vision import DeemVisionTower",
        "from deem_plugin import build_vision_tower",
    ):
        result = run(f"{line}; {known}")
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("yaml", ["plan", "llava-1.5-7b-feedback"], "train"),
        ("lmms_eval", ["eval", "tests"], "lmms"),
    ],
)
def test_the_command_names_the_extra_that_is_missing(missing, command, extra):
    result = run(
        f"import sys; sys.modules[{missing!r}] = None\nfrom deem_plugin.cli import main\nsys.exit(main({command!r}))"
    )

    assert result.returncode == 1
    assert result.stderr.startswith(f"deem {command[0]}: ") and "Traceback" not in result.stderr
    assert f'pip install "deem-plugin[{extra}]"' in result.stderr


def test_an_import_error_of_another_package_is_shown_whole():
    code = "import sys; sys.modules['diffusers'] = None\nfrom deem_plugin.cli import main\n"

    result = run(code + "sys.exit(main(['reconstruct', 'nowhere', 'no.jpg']))")

    assert "Traceback" in result.stderr and "deem-plugin[" not in result.stderr


def test_the_floors_that_are_tested_are_those_that_are_asked_for():
    lines = (ROOT / "tests" / "floors.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = dict(line.split(">=") for line in project["dependencies"])

    assert tested.keys() == asked.keys()
    for name in asked.keys() - {"torch", "torchvision"}:
        assert tested[name] == (asked[name] + ".0" * (2 - asked[name].count("."))), name


# The pins of axolotl 0.21, exact ones.
@pytest.mark.parametrize(
    ("name", "version"),
    [("transformers", "5.20.1"), ("peft", "0.21.2"), ("accelerate", "1.15.0"), ("torch", "2.8.0")],
)
def test_the_pins_of_axolotl_are_within_what_is_asked_for(name, version):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floor = dict(line.split(">=") for line in project["dependencies"])[name]

    assert [int(part) for part in version.split(".")] >= [int(part) for part in floor.split(".")]
