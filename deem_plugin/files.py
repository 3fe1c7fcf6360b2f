"""Files that are whole or not there, even after a power cut."""

import os
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
