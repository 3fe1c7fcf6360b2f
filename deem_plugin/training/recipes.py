"""Recipes: YAML documents that say all that a training run needs."""

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deem_plugin.resources import recipes_dir
from deem_plugin.training.arguments import (
    TOWER_ONLY,
    DataArguments,
    DeemArguments,
    GeneratorArguments,
    ModelArguments,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from deem_plugin.feedback.config import FeedbackConfig

SECTIONS = ("model", "data", "feedback", "deem", "generator", "training")
# `section: null` takes these out of what a recipe extends; elsewhere an empty section changes nothing.
OPTIONAL_SECTIONS = ("feedback", "deem", "generator")


@dataclass
class Recipe:
    """
    A training run, ready to start.

    Args:
        name (`str`): Name of the recipe's file without its ending.
        model (`ModelArguments`): What is trained.
        data (`DataArguments`): On what.
        feedback (`FeedbackConfig`, *optional*): The diffusion feedback of a VLM or an encoder; none without it.
        deem (`DeemArguments`, *optional*): The interleaved model, which has its own feedback; none without it.
        training (`TrainingArguments`): The Trainer's own arguments.
        generator (`GeneratorArguments`, *optional*): What `deem train-denoiser` trains; none for `deem train`.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    feedback: "FeedbackConfig | None"
    deem: DeemArguments | None
    training: "TrainingArguments"
    generator: GeneratorArguments | None = None


def list_recipes() -> list[str]:
    """Returns the names of the recipes that ship with the package."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Reads a recipe and applies overrides.

    Args:
        name_or_path (`str` or `Path`): Name of a shipped recipe, or path of a YAML file.
        overrides (`Sequence[str]`):
            `section.key=value`, the value written as in YAML (`training.max_steps=10`, `model.freeze=[vision_tower]`,
            `data.image_dir=null`), or `feedback=null` (`deem=null`) to leave that section out.

    Raises:
        ValueError: On an unknown recipe, section or key and on a value of the wrong kind; lists the choices.
    """
    path = find_recipe(name_or_path)
    sections = read_sections(path)
    for override in overrides:
        _apply(sections, override, path.stem)
    return build_recipe(path.stem, sections)


def read_sections(name_or_path: str | Path) -> dict[str, dict | None]:
    """Returns the sections of a recipe as its file and those that it extends give them, checked by name only."""
    return _read(find_recipe(name_or_path))


def build_recipe(name: str, sections: dict[str, dict | None]) -> Recipe:
    """
    Makes a recipe of its sections, given as the YAML file would give them.

    Args:
        name (`str`): The run's name; the default of `training.output_dir` is `runs/<name>`.
        sections (`dict`): `model`, `data`, `training` and, for a run with feedback, `feedback` or `deem`; `generator`
            for one of `deem train-denoiser`.
    """
    from transformers import TrainingArguments

    from deem_plugin.feedback.config import FeedbackConfig

    _check_names(sections, SECTIONS, "section", name)
    feedback, deem, generator = (sections.get(section) for section in OPTIONAL_SECTIONS)
    if feedback is not None and deem is not None:
        raise ValueError(
            f"The recipe {name!r} has the sections `feedback` and `deem`. A DEEM has a feedback of its own: leave "
            f"`feedback` out, or `deem` for a VLM."
        )
    model = _build(ModelArguments, "model", sections.get("model"), name)
    if model.vision_tower is None and model.image_size is not None and deem is None:
        raise ValueError(TOWER_ONLY.format(name="image_size"))
    data = _build(DataArguments, "data", sections.get("data"), name)
    if data.crop_area is not None and model.encoder is None:
        raise ValueError("`data.crop_area` is for an encoder alone (`model.encoder`): texts speak of whole pictures.")
    if data.crop_area is not None and (feedback or {}).get("latent_cache") is not None:
        raise ValueError(
            "`data.crop_area` makes another picture each time, which no cache can hold. Leave it or "
            "`feedback.latent_cache` out."
        )
    # The collator wants the columns of the data set, which the model's `forward` does not name.
    training = {"output_dir": f"runs/{name}", "remove_unused_columns": False, **(sections.get("training") or {})}
    return Recipe(
        name=name,
        model=model,
        data=data,
        feedback=None if feedback is None else _build(FeedbackConfig, "feedback", feedback, name),
        deem=None if deem is None else _build(DeemArguments, "deem", deem, name),
        training=_build(TrainingArguments, "training", training, name),
        generator=None if generator is None else _build(GeneratorArguments, "generator", generator, name),
    )


def find_recipe(name_or_path: str | Path) -> Path:
    """Returns the file of a recipe given by its shipped name or by its path."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        if not path.is_file():
            raise ValueError(f"There is no recipe file {path}. Shipped recipes: {', '.join(list_recipes())}.")
        return path
    shipped = recipes_dir() / f"{path}.yaml"
    if not shipped.is_file():
        raise ValueError(f"Unknown recipe {str(path)!r}{_suggest(str(path), list_recipes())}; or give a .yaml file.")
    return shipped


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, dict | None]:
    """Reads a recipe file and, first, the one that it extends."""
    path = path.resolve()
    if path in below:
        raise ValueError(f"The recipe {path} extends itself, by way of {', '.join(p.name for p in below)}.")
    with open(path, encoding="utf-8") as file:
        try:
            document = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"The recipe {path} is no valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"The recipe {path} must hold the sections {', '.join(SECTIONS)}, got {document!r}.")
    parent = document.pop("extends", None)
    _check_names(document, SECTIONS, "section", path.stem, also=("extends",))
    sections: dict[str, dict | None] = {}
    if parent is not None:
        beside = path.parent / f"{parent}.yaml"
        sections = _read(beside if beside.is_file() else find_recipe(parent), (*below, path))
    for section, values in document.items():
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"The section `{section}` of {path} must hold `key: value` lines, got {values!r}.")
        if values and values.get("chat_template") and (path.parent / values["chat_template"]).is_file():
            values["chat_template"] = str(path.parent / values["chat_template"])
        if values is None and section in OPTIONAL_SECTIONS:
            sections[section] = None
        else:
            sections[section] = {**(sections.get(section) or {}), **(values or {})}
    return sections


def _apply(sections: dict[str, dict | None], override: str, name: str):
    """Applies one `section.key=value` in place."""
    target, equals, text = override.partition("=")
    section, _, key = target.partition(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of the override {override!r} is no valid YAML: {error}") from error
    if section in OPTIONAL_SECTIONS and override == f"{section}=null":
        sections[section] = None
        return
    if not equals or not key:
        raise ValueError(
            f"Cannot read the override {override!r}; expected `section.key=value` with a section of "
            f"{', '.join(SECTIONS)}, or `feedback=null`."
        )
    _check_names([section], SECTIONS, "section", name)
    sections[section] = {**(sections.get(section) or {}), key: value}


def _build(cls: type, section: str, values: dict | None, name: str) -> Any:
    """Makes the dataclass of a section, after checking the names and the kinds of its values."""
    values = dict(values or {})
    known = {item.name: item for item in fields(cls) if item.init}
    _check_names(values, known, f"key in `{section}`", name)
    hints = typing.get_type_hints(cls)
    # The annotations of `TrainingArguments` are looser than what it takes (`fsdp: true` for a `str`).
    strict = section != "training"
    for key, value in values.items():
        values[key] = _coerce(value, hints[key], f"{section}.{key}", strict)
        # YAML's `key:` with nothing behind it means the default, unless none is a value that the key can take.
        if value is None and known[key].default is not None and type(None) not in typing.get_args(hints[key]):
            default = known[key]
            values[key] = default.default_factory() if default.default is MISSING else default.default
    return cls(**values)


def _coerce(value: Any, hint: Any, name: str, strict: bool = True) -> Any:
    """Returns `value` as its field wants it; raises if it is plainly of another kind and `strict`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = {typing.get_origin(option) or option for option in options}
    if value is None:
        return value
    if float in kinds and not isinstance(value, bool):
        # YAML reads `1e-5` (without a dot) as text.
        if isinstance(value, str) and str not in kinds:
            try:
                return float(value)
            except ValueError as error:
                raise ValueError(f"`{name}` must be a number, got {value!r}.") from error
        if isinstance(value, int):
            return value if int in kinds else float(value)
    if dict in kinds and isinstance(value, dict) and dict[str, float] in options:
        return {key: _coerce(item, float, f"{name}.{key}") for key, item in value.items()}
    if strict and (not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds)):
        expected = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
        raise ValueError(f"`{name}` must be of kind {expected}, got {value!r}.")
    return value


def _check_names(
    given: Iterable[str], choices: Iterable[str], kind: str, recipe: str, also: tuple[str, ...] = ()
) -> None:
    """Raises a `ValueError` on the first of `given` that is not among `choices`."""
    choices = list(choices)
    for name in given:
        if name not in choices:
            raise ValueError(f"Unknown {kind} {name!r} in the recipe {recipe!r}{_suggest(name, [*choices, *also])}.")


def _suggest(name: str, choices: list[str]) -> str:
    """Returns the end of an error: the closest choices, and all of them."""
    close = difflib.get_close_matches(str(name), choices, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"{hint} Choices: {', '.join(choices)}"
