"""The reference lists what the package exports, and what it lists exists."""

import re
from importlib import import_module

import pytest

import deem_plugin

from .snippets import ROOT

LISTED = [
    name
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize(
    "package", ["deem_plugin", "deem_plugin.feedback", "deem_plugin.vision", "deem_plugin.models"]
)
def test_every_exported_class_and_function_is_in_the_reference(package):
    exported = import_module(package)
    names = {name for name in exported.__all__ if callable(getattr(exported, name))}

    assert names <= {name.rpartition(".")[2] for name in LISTED}


@pytest.mark.parametrize("name", LISTED)
def test_what_the_reference_lists_has_a_docstring(name):
    module, _, attribute = name.rpartition(".")
    shown = getattr(import_module(module), attribute, None) or import_module(name)

    assert shown.__doc__


def test_the_version_of_the_citation_is_that_of_the_package():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")

    assert f"\nversion: {deem_plugin.__version__}\n" in citation
