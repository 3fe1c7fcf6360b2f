"""Pages use the field's words, and quote messages that the package really gives."""

import ast
import re

import pytest

from .snippets import PAGES, ROOT

FORBIDDEN = re.compile(r"\b(judges?|economis\w+|rooms?|arms?|held against|held by|lent|looking back)\b", re.IGNORECASE)
# Pages that still use such words: to be shortened, never extended.
OLD = {
    "README.md",
    "data.md",
    "decisions.md",
    "demo.md",
    "evaluation.md",
    "feedback.md",
    "interleaved.md",
    "methods.md",
}
OLD |= {"models.md", "pictures.md", "plan.md", "trainers.md", "distributed.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in OLD], ids=lambda page: page.stem)
def test_pages_use_the_words_of_the_field(page):
    assert not FORBIDDEN.findall(page.read_text(encoding="utf-8"))


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_package():
    said = []
    for file in sorted((ROOT / "deem_plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                said.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)

    assert quoted and not [quote for quote in quoted if not any(quote in text for text in said)]
