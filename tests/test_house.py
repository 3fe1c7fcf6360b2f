"""The rooms that see and feed back stay small: lines together, methods of a class, fields of a dataclass."""

import ast
from pathlib import Path

import pytest

ROOMS = ("vision", "feedback", "training")
MOST_LINES, MOST_METHODS, MOST_FIELDS = 10250, 10, 15
FILES = [path for room in ROOMS for path in sorted((Path(__file__).parents[1] / "deem_plugin" / room).rglob("*.py"))]


def test_the_three_rooms_are_smaller_than_before_they_did_more():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}

    assert len(FILES) > 50 and sum(lines.values()) < MOST_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_classes_have_few_methods_and_dataclasses_few_fields(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
        methods = [name for name in methods if not name.startswith("on_")]  # a callback's events
        assert len(methods) <= MOST_METHODS, node.name
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            assert len(fields) <= MOST_FIELDS, node.name
