"""The manifest beside question files: what they were made of, and the hashes by which they are known."""

import json
from pathlib import Path
from typing import Any

from deem_plugin.evaluation.questions import QuestionDataError, content_hash
from deem_plugin.files import write_whole

MANIFEST = "manifest.json"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a folder of question files; it names the content hash of each under `files`."""
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode())


def check_manifest(path: str | Path) -> None:
    """
    Compares a question file with the manifest beside it; without one there is nothing to compare.

    Raises:
        QuestionDataError: If the manifest is unreadable, does not know the file, or knows it with other content.
    """
    path = Path(path)
    manifest = path.with_name(MANIFEST)
    if not manifest.is_file():
        return
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = files.get(path.name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuestionDataError(
            f"{manifest} is no manifest of question files ({error!r}). Build the data again."
        ) from error
    if expected is None:
        raise QuestionDataError(
            f"{path.name} is not in {manifest}, which names {', '.join(files)}: it comes from another build. "
            f"Build all files together, or remove what does not belong."
        )
    if (found := content_hash(path)) != expected:
        raise QuestionDataError(
            f"{path} does not match {manifest}: its content hash is {found}, the manifest has {expected}. One of them "
            f"was changed or comes from another build; build the data again."
        )
