"""Nested dataclasses from nested dictionaries, as YAML and JSON give them."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any

# Lists whose values are checked one by one.
_LISTS = (list[str], list[float], list[dict])


def build_settings(cls: type, values: dict | None, name: str, origin: str, *, strict: bool = True) -> Any:
    """
    Makes a dataclass, after checking the names and the kinds of its values; fields that are dataclasses themselves are
    made of dictionaries, on top of what their default holds.

    Args:
        cls (`type`): The dataclass.
        values (`dict`, *optional*): Its settings; those that are missing keep their defaults.
        name (`str`): Dotted name of the section, for errors.
        origin (`str`): Where the values come from, for errors: `the recipe 'deem'`.
        strict (`bool`, *optional*, defaults to `True`):
            Whether a value of another kind than annotated is an error, not only where numbers alone are annotated.

    Raises:
        ValueError: On an unknown key, which lists the choices, and on a value of the wrong kind.
    """
    return cls(**_checked(cls, values, name, origin, strict))


def merge_settings(cls: type, below: dict | None, above: dict | None) -> dict:
    """
    Lays the settings `above` over those `below`, key by key, in the fields that are dataclasses too; every other value
    is replaced as a whole.
    """
    # What is no dictionary is replaced as a whole, too.
    merged = dict(below) if isinstance(below, dict) else {}
    for key, value in (above or {}).items():
        inner = section_class(cls, key)
        is_section = inner is not None and isinstance(value, dict)
        merged[key] = merge_settings(inner, merged.get(key), value) if is_section else value
    return merged


def nest(cls: type, key: str, value: Any) -> dict:
    """Returns a setting by its dotted name, `inner.key`, as the nested dictionary that a dataclass is made of."""
    head, dot, rest = key.partition(".")
    inner = section_class(cls, head) if dot else None
    return {key: value} if inner is None else {head: nest(inner, rest, value)}


def section_class(cls: type, key: str) -> type | None:
    """Returns the dataclass of a field that is one, and None for any other."""
    hint = _hints(cls).get(key)
    return hint if dataclasses.is_dataclass(hint) else None


def changed_settings(settings: Any, defaults: Any = None) -> dict:
    """
    Returns the fields of a dataclass that differ from their defaults, nested as its fields are: what
    [`build_settings`] makes the same dataclass of.

    Args:
        settings: The dataclass.
        defaults (*optional*): Another of its class to compare with, in place of the defaults of its fields.
    """
    changed = {}
    for item in fields(settings):
        default = default_of(item) if defaults is None else getattr(defaults, item.name)
        if (value := getattr(settings, item.name)) != default:
            changed[item.name] = changed_settings(value, default) if dataclasses.is_dataclass(value) else value
    return changed


def check_names(
    given: Iterable[str], choices: Iterable[str], kind: str, origin: str, inner: Iterable[str] = ()
) -> None:
    """Raises a `ValueError` on the first of `given` that is not among `choices`; `inner` as in [`suggest`]."""
    choices = list(choices)
    for name in given:
        if name not in choices:
            raise ValueError(f"Unknown {kind} {name!r} in {origin}{suggest(name, choices, inner)}.")


def suggest(name: str, choices: list[str], inner: Iterable[str] = ()) -> str:
    """Returns the end of an error: the closest choices, dotted names of `inner` settings too, and all choices."""
    last = {choice.rpartition(".")[2]: choice for choice in (*inner, *choices)}
    close = [last[match] for match in difflib.get_close_matches(str(name), last, n=3)]
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return f"{hint} Choices: {', '.join(choices)}"


def _checked(cls, values, name, origin, strict) -> dict:
    values = dict(values or {})
    known = {item.name: item for item in fields(cls) if item.init}
    inner = [f"{key}.{item.name}" for key in known if (part := section_class(cls, key)) for item in fields(part)]
    check_names(values, known, f"key in `{name}`", origin, inner)
    hints = _hints(cls)
    for key, value in values.items():
        part = section_class(cls, key)
        if part is not None:
            values[key] = _section(part, value, default_of(known[key]), f"{name}.{key}", origin, strict)
            continue
        values[key] = _coerce(value, hints[key], f"{name}.{key}", strict)
        # YAML's `key:` with nothing behind it means the default, unless none is a value that the key can take.
        if value is None and known[key].default is not None and type(None) not in typing.get_args(hints[key]):
            values[key] = default_of(known[key])
    return values


def _section(cls, value, default, name, origin, strict) -> Any:
    """Returns a field that is a dataclass, made of a dictionary on top of its default."""
    if value is None or isinstance(value, cls):
        return default if value is None else value
    if not isinstance(value, dict):
        keys = ", ".join(item.name for item in fields(cls))
        raise ValueError(f"`{name}` must hold `key: value` lines with keys of {keys}, got {value!r}.")
    return dataclasses.replace(default, **_checked(cls, value, name, origin, strict))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def default_of(item: dataclasses.Field) -> Any:
    """Returns the default of a field."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _item(value: Any, hint: Any, name: str) -> Any:
    """Returns a value in a list or dictionary, where none is not one."""
    if value is None:
        raise ValueError(f"`{name}` must be of kind {hint.__name__}, got None.")
    return _coerce(value, hint, name)


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
        return {key: _item(item, float, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list) and (of := [typing.get_args(option)[0] for option in options if option in _LISTS]):
        return [_item(item, of[0], f"{name}[{number}]") for number, item in enumerate(value)]
    if value is False and not strict and any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):
        return "no"  # what YAML makes of `save_strategy: no`
    # Even where annotations are loose, a number is a number.
    plain = strict or kinds <= {int, float, bool, type(None)}
    if plain and (not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds)):
        expected = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
        raise ValueError(f"`{name}` must be of kind {expected}, got {value!r}.")
    return value
