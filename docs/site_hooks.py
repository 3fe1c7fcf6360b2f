"""What the documentation site needs beside its pages: recipes, the project's own files, and links that stay in it."""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are pages of the site.
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_OUTSIDE = re.compile(r"\[((?:`[^`]*`|[^\]])*)\]\((\.\./[^)\s]*)\)")
_REFERENCE = re.compile(r"\[(`[^`\]]+`)\](?![\[(])")


def on_files(files: Files, config) -> Files:
    """Adds the recipes, as they are, and the pages that lie outside `docs/`."""
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        files.append(File.generated(config, f"recipes/{recipe.name}", content=recipe.read_text(encoding="utf-8")))
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Leads links to recipes to the site's own copies; of other links out of `docs/` the text remains."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(match):
        target = posixpath.normpath(posixpath.join("docs", folder, match[2]))
        if target.startswith("recipes/") and target.endswith(".yaml"):
            return f"[{match[1]}]({posixpath.relpath(target, folder or '.')})"
        return match[0] if target.startswith("docs/") else match[1]

    return _OUTSIDE.sub(inside, markdown)


class PlainReferences(griffe.Extension):
    """Shows docstrings' references to other objects, [`name`], as `name`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = _REFERENCE.sub(r"\1", obj.docstring.value)
