"""Every Python block of the README and the docs does what it says."""

import pytest

from .snippets import PAGES, ROOT, snippets

# Pages with blocks that are fragments, without imports or with `...`: to be made runnable, one by one.
FRAGMENTS = {"README.md", "docs/feedback.md", "docs/interleaved.md", "docs/trainers.md"}
WITH_CODE = [page for page in PAGES if snippets(page) and str(page.relative_to(ROOT)) not in FRAGMENTS]


def compiled(page, snippet):
    """Compiles a block so that tracebacks name its page and line."""
    return compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec")


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for snippet in snippets(page):
        code = compiled(page, snippet)
        if not snippet.not_run:
            exec(code, names)


def test_the_quick_start_is_run():
    assert not any(snippet.not_run for snippet in snippets(ROOT / "docs" / "quickstart.md"))
