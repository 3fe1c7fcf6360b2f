"""Files that are whole or not there, even after a power cut, and what is said of those that are not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: bytes):
    """Writes a file beside its place, and gives it its name once all of it is on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


@contextmanager
def naming_the_checkpoint(setting: str, path: str) -> Iterator[None]:
    """
    Turns what a library says of a checkpoint that is missing or damaged into a `ValueError` that names the setting.

    Args:
        setting (`str`): Dotted name of the setting that `path` stands in, or what it is.
        path (`str`): Folder or hub id that is loaded.

    Raises:
        ValueError: If it cannot be loaded.
    """
    try:
        yield
    except ImportError:  # says itself what to install
        raise
    except Exception as error:  # damaged and foreign folders make transformers raise nearly anything
        problem, *_ = str(error).strip().split("\n")
        raise ValueError(
            f"`{setting}: {path}` cannot be loaded ({problem[:500]}). Expected a folder with a whole "
            f"checkpoint or the id of one on the hub. Correct the path, fetch it again, or go online."
        ) from error
