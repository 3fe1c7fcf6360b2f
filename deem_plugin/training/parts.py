"""Names the parts of a model: which parameters a pattern means, what is frozen, and what autograd never reaches."""

import re
from collections.abc import Iterable

from torch import nn

from deem_plugin.vision.towers import find_tower, without_peft

# Stand for the vision tower and for the language model in a pattern.
TOWER, LANGUAGE_MODEL = "@tower", "@language_model"
# What wrappers (PEFT, DDP, FSDP) and the base model put before a part's own name.
_WRAPPERS = re.compile(r"^(module\.|_fsdp_wrapped_module\.|base_model\.model\.|model\.)+")


def part_of(name: str) -> str:
    """Returns the part that a parameter belongs to: `model.vision_tower.encoder...` belongs to `vision_tower`."""
    return _WRAPPERS.sub("", name).split(".")[0]


def list_parts(model: nn.Module) -> list[str]:
    """Returns the names of the model's parts in the order of its parameters."""
    return list(dict.fromkeys(part_of(name) for name, _ in model.named_parameters()))


def resolve(model: nn.Module, pattern: str) -> str:
    """
    Returns a pattern with `@tower` or `@language_model` at its beginning replaced by the dotted name that the part has
    in the model, so that one recipe serves every family: `@tower`, `@tower.encoder.layers.0`.

    Raises:
        ValueError: If the model has no such part, or its tower is inside its language model.
    """
    mark, dot, rest = pattern.partition(".")
    if mark not in (TOWER, LANGUAGE_MODEL):
        return pattern
    base = without_peft(model)
    part = find_tower(base)
    if mark == LANGUAGE_MODEL:
        tower, part = part, base.get_decoder() if hasattr(base, "get_decoder") else None
        if part is None or tower in part.modules():
            raise ValueError(
                f"A {type(base).__name__} has no language model apart from its vision tower, which the pattern "
                f"{pattern!r} could mean. Its parts are {', '.join(list_parts(base))}; name those that are meant."
            )
    name = next(name for name, module in base.named_modules(remove_duplicate=False) if module is part)
    return name + dot + rest


def matches(pattern: str, name: str) -> bool:
    """Tells whether a dotted name lies at or below `pattern`, in which `*` stands for one name between dots."""
    regex = re.escape(pattern).replace(r"\*", r"[^.]*")
    return re.search(rf"(^|\.){regex}(\.|$)", name) is not None


def find(model: nn.Module, pattern: str, setting: str) -> list[str]:
    """
    Returns the names of the parameters that a pattern (as [`matches`] takes it) means; `setting` says in the error
    where it was written.

    Raises:
        ValueError: If it means none; lists the parts.
    """
    resolved = resolve(model, pattern)
    found = [name for name, _ in model.named_parameters() if matches(resolved, name)]
    if not found:
        raise ValueError(
            f"The pattern {pattern!r} of `{setting}` matches no parameter. The parts of this "
            f"{type(model).__name__} are {', '.join(list_parts(model))}; write one of them, or a dotted name below "
            f"one, such as {next(iter(dict(model.named_parameters())))!r}."
        )
    return found


def freeze(model: nn.Module, patterns: Iterable[str]):
    """Freezes the parameters that the patterns mean."""
    for pattern in patterns:
        freeze_names(model, find(model, pattern, "model.freeze"))


def freeze_names(module: nn.Module, names: Iterable[str]):
    """Freezes parameters of a module by name."""
    names = set(names)
    for name, parameter in module.named_parameters():
        if name in names:
            parameter.requires_grad_(False)


def count_parameters(model: nn.Module) -> dict[str, list[int]]:
    """Returns for each part the number of trainable and of frozen parameters."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = counts.setdefault(part_of(name), [0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
    return counts


def parameter_table(counts: dict[str, list[int]]) -> str:
    """Returns a table of what [`count_parameters`] returned, with a line for the total."""
    counts = dict(counts)
    counts["total"] = [sum(row[0] for row in counts.values()), sum(row[1] for row in counts.values())]
    width = max(map(len, counts))
    lines = [f"{'part':<{width}}  {'trainable':>15}  {'frozen':>15}"]
    lines += [f"{part:<{width}}  {trained:>15,}  {frozen:>15,}" for part, (trained, frozen) in counts.items()]
    return "\n".join(lines)
