"""Finds the recipes and the lmms-eval tasks, in a checkout as well as in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """Returns the folder `name`: inside the package in a wheel, beside it in a checkout."""
    for folder in (_PACKAGE / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"The folder `{name}` that ships with deem-plugin is neither in {_PACKAGE} nor beside it. "
        f"The installation is incomplete: reinstall with `pip install --force-reinstall deem-plugin`."
    )


def recipes_dir() -> Path:
    """Returns the folder of the shipped training recipes (YAML)."""
    return _shipped("recipes")


def lmms_tasks_dir() -> Path:
    """Returns the folder of the shipped lmms-eval tasks, for `lmms-eval --include_path`."""
    return _shipped("lmms_tasks")
