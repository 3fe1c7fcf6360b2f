"""Finds the Python blocks of a Markdown page."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """A block of code, the line of its page that it begins in, and why it is not run (empty if it is)."""

    line: int
    code: str
    not_run: str


def snippets(page: Path) -> list[Snippet]:
    """Returns the blocks of a page in order. A block with the title "Not run: reason" is to be compiled only."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        reason = re.search(r'title="Not run: ([^"]+)"', match["info"])
        found.append(Snippet(text.count("\n", 0, match.start()) + 2, match["code"], reason[1] if reason else ""))
    return found
