"""Names of a package that are loaded on first use."""

from collections.abc import Callable
from importlib import import_module


def lazy_names(package: str, modules: dict[str, str]) -> tuple[Callable, Callable, list[str]]:
    """Returns `__getattr__`, `__dir__` and `__all__` of a package, from its public names and their modules."""
    names = sorted(modules)

    def load(name):
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")
        return getattr(import_module(modules[name], package), name)

    return load, lambda: names, names
