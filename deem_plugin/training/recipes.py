"""Recipes: YAML documents that say all that a training run needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deem_plugin.resources import recipes_dir
from deem_plugin.settings import build_settings, check_names, merge_settings, nest, suggest
from deem_plugin.training.arguments import (
    TOWER_ONLY,
    DataArguments,
    DeemArguments,
    DenoiserArguments,
    ModelArguments,
)

if TYPE_CHECKING:
    from deem_plugin.feedback.config import FeedbackConfig, RossConfig
    from deem_plugin.training.training_arguments import RecipeTrainingArguments

SECTIONS = ("model", "data", "feedback", "ross", "deem", "denoiser", "training")
# `section: null` takes these out of what a recipe extends; elsewhere an empty section changes nothing.
OPTIONAL_SECTIONS = ("feedback", "ross", "deem", "denoiser")
# The annotations of `TrainingArguments` are looser than what it takes (`fsdp: true` for a `str`).
LOOSE_SECTIONS = ("training",)
# Of these a recipe has one at most.
FEEDBACK_SECTIONS = ("feedback", "ross", "deem")


@dataclass
class Recipe:
    """
    A training run, ready to start: its name, that of its file without the ending, and what its sections say.
    `feedback` is that of the section `feedback` or `ross`. Without `feedback`, `deem` or `denoiser` these are None.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    feedback: "FeedbackConfig | RossConfig | None"
    deem: DeemArguments | None
    training: "RecipeTrainingArguments"
    denoiser: DenoiserArguments | None = None


def list_recipes() -> list[str]:
    """Returns the names of the recipes that ship with the package."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Reads a recipe and applies overrides.

    Args:
        name_or_path (`str` or `Path`): Name of a shipped recipe, or path of a YAML file.
        overrides (`Sequence[str]`): `section.key=value`, the value written as in YAML (`training.max_steps=10`,
            `model.freeze=[vision_tower]`, `feedback.diffusion_model.path=FOLDER`, `data.image_dir=null`), or
            `feedback=null` (`deem=null`) to leave that section out.

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
    Makes a recipe of its sections, given as the YAML file would give them. `name` is the run's: the default of
    `training.output_dir` is `runs/<name>`.

    Raises:
        ValueError: On an unknown section or key, a value of the wrong kind, or sections that do not fit together.
    """
    check_names(sections, SECTIONS, "section", f"the recipe {name!r}")
    given = [section for section in FEEDBACK_SECTIONS if sections.get(section) is not None]
    if len(given) > 1:
        raise ValueError(
            f"The recipe {name!r} has the sections {' and '.join(f'`{section}`' for section in given)}, each of which "
            f"is a feedback (a DEEM has one of its own). Keep one, and set the other to null: "
            f"`{given[0]}=null` or `{given[-1]}=null`."
        )
    # The collator wants the columns of the data set, which the model's `forward` does not name.
    training = {"output_dir": f"runs/{name}", "remove_unused_columns": False, **(sections.get("training") or {})}
    sections = {**sections, "training": training}
    built = {
        section: build_settings(
            cls, sections.get(section), section, f"the recipe {name!r}", strict=section not in LOOSE_SECTIONS
        )
        for section, cls in _classes().items()
        if section not in OPTIONAL_SECTIONS or sections.get(section) is not None
    }
    recipe = Recipe(
        name=name,
        model=built["model"],
        data=built["data"],
        feedback=built.get("feedback") or built.get("ross"),
        deem=built.get("deem"),
        training=built["training"],
        denoiser=built.get("denoiser"),
    )
    _check(recipe)
    return recipe


def _check(recipe: Recipe):
    """Raises on settings of different sections that do not fit together."""
    from deem_plugin.feedback.config import RossConfig

    model, data = recipe.model, recipe.data
    if model.vision_tower is None and model.image_size is not None and recipe.deem is None:
        raise ValueError(TOWER_ONLY.format(name="image_size"))
    if model.encoder is not None and isinstance(recipe.feedback, RossConfig):
        raise ValueError(
            f"`model.encoder: {model.encoder}` trains an encoder alone, and `ross` restores pictures from what a "
            f"language model says. Set `model.model` to a VLM, or use the section `feedback` in place of `ross`."
        )
    if data.crop_area is None:
        return
    if model.encoder is None:
        raise ValueError("`data.crop_area` is for an encoder alone (`model.encoder`): texts speak of whole pictures.")
    if recipe.feedback is not None and recipe.feedback.diffusion_model.latent_cache is not None:
        raise ValueError(
            "`data.crop_area` makes another picture each time, which no cache can hold. Leave it or "
            "`feedback.diffusion_model.latent_cache` out."
        )


@cache
def _classes() -> dict[str, type]:
    """Returns the dataclass of each section."""
    from deem_plugin.feedback.config import FeedbackConfig, RossConfig
    from deem_plugin.training.training_arguments import RecipeTrainingArguments

    return {
        "model": ModelArguments,
        "data": DataArguments,
        "feedback": FeedbackConfig,
        "ross": RossConfig,
        "deem": DeemArguments,
        "denoiser": DenoiserArguments,
        "training": RecipeTrainingArguments,
    }


def find_recipe(name_or_path: str | Path) -> Path:
    """Returns the file of a recipe given by its shipped name or by its path."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        if not path.is_file():
            raise ValueError(f"There is no recipe file {path}. Shipped recipes: {', '.join(list_recipes())}.")
        return path
    shipped = recipes_dir() / f"{path}.yaml"
    if not shipped.is_file():
        raise ValueError(f"Unknown recipe {str(path)!r}{suggest(str(path), list_recipes())}; or give a .yaml file.")
    return shipped


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one place, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse(text: str | bytes, what: str) -> Any:
    """Reads YAML, as `what` in an error of one line."""
    try:
        return yaml.load(text.decode() if isinstance(text, bytes) else text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # all that a loader meets in a text
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else f"{error}"
        raise ValueError(f"{what} is no valid YAML in UTF-8: {' '.join(where.split())}.") from error


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, dict | None]:
    """Reads a recipe file and, first, the one that it extends."""
    path = path.resolve()
    if path in below:
        raise ValueError(f"The recipe {path} extends itself, by way of {', '.join(p.name for p in below)}.")
    document = _parse(path.read_bytes(), f"The recipe {path}") or {}
    if not isinstance(document, dict):
        raise ValueError(f"The recipe {path} must hold the sections {', '.join(SECTIONS)}, got {document!r}.")
    parent = document.pop("extends", None)
    check_names(document, SECTIONS, "section", f"the recipe {path.stem!r}", ("extends",))
    sections: dict[str, dict | None] = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise ValueError(f"`extends` of the recipe {path} must be the name of a recipe, got {parent!r}.")
        beside = path.parent / f"{parent}.yaml"
        sections = _read(beside if beside.is_file() else find_recipe(parent), (*below, path))
    for section, values in document.items():
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"The section `{section}` of {path} must hold `key: value` lines, got {values!r}.")
        template = (values or {}).get("chat_template")
        if isinstance(template, str) and (path.parent / template).is_file():
            values["chat_template"] = str(path.parent / template)
        if values is None and section in OPTIONAL_SECTIONS:
            sections[section] = None
        else:
            sections[section] = merge_settings(_classes()[section], sections.get(section), values)
    return sections


def _apply(sections: dict[str, dict | None], override: str, name: str):
    """Applies one `section.key=value` or `section.inner.key=value` in place."""
    target, equals, text = override.partition("=")
    section, _, key = target.partition(".")
    value = _parse(text, f"The value of the override {override[:200]!r}")
    if section in OPTIONAL_SECTIONS and override == f"{section}=null":
        sections[section] = None
        return
    if not equals or not key:
        raise ValueError(
            f"Cannot read the override {override!r}; expected `section.key=value` with a section of "
            f"{', '.join(SECTIONS)}, or `feedback=null`."
        )
    check_names([section], SECTIONS, "section", f"the recipe {name!r}")
    cls = _classes()[section]
    sections[section] = merge_settings(cls, sections.get(section), nest(cls, key, value))
