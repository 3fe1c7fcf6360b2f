"""Models and data sets of the Hugging Face hub, at a fixed revision where one is asked for: `owner/name@revision`."""

from pathlib import Path


def split_revision(name: str) -> tuple[str, str | None]:
    """
    Returns a folder or hub id, and the revision behind its `@` (a branch, a tag or a commit), if it has one.

    As in the hub's own paths (`hf://owner/name@revision`). A folder of that very name is a folder.
    """
    name = str(name)
    if Path(name).exists() or name.startswith(("/", ".", "~")):
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or None


def at_revision(name: str) -> dict[str, str | None]:
    """Returns a folder or hub id, with its revision, as the arguments of any `from_pretrained`."""
    name, revision = split_revision(name)
    return {"pretrained_model_name_or_path": name} | ({} if revision is None else {"revision": revision})
