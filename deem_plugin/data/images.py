"""Opens pictures without hiding damage, and lists the pictures of a folder as a data set."""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, ImageFile, ImageOps

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def load_image(source: str | os.PathLike | bytes | dict[str, Any] | Image.Image) -> Image.Image:
    """
    Opens a picture completely and returns it upright in RGB.

    Args:
        source (`str`, `PathLike`, `bytes`, `dict` or `PIL.Image.Image`):
            A file, its bytes, an undecoded `datasets.Image` value (`{"path": ..., "bytes": ...}`), or a picture.

    Raises:
        ValueError: If the file is missing, is no picture, or breaks off before its end.
    """
    name, stream = _open_source(source)
    # Another library may have switched this on for the whole process; then PIL fills the missing part with grey.
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image = stream if isinstance(stream, Image.Image) else Image.open(stream)
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(
            f"The image {name} does not exist. Check `data.image_dir` (image paths in the data are relative to it) "
            f"and that the download is complete."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"The image {name} cannot be read ({error}): it is damaged, truncated or no picture. "
            f"Fetch it again, or take its record out of the data."
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _open_source(source) -> tuple[str, Any]:
    """Returns how to name `source` in an error, and what PIL can open."""
    if isinstance(source, dict):
        name = source.get("path") or "stored in the data set"
        return name, io.BytesIO(source["bytes"]) if source.get("bytes") is not None else source["path"]
    if isinstance(source, bytes):
        return "given as bytes", io.BytesIO(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "given as a PIL image", source
    return str(source), source


def _list_images(folder: str) -> Iterator[dict[str, str]]:
    """Yields the path of every picture below `folder`, in a fixed order."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(IMAGE_SUFFIXES):
                yield {"image": os.path.join(parent, file)}


def load_image_folder(folder: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> "Dataset":
    """
    Lists the pictures below a folder as a memory-mapped data set with one column `image` of paths.

    Args:
        folder (`str` or `PathLike`): Folder that is searched with all its subfolders.
        cache_dir (`str` or `PathLike`, *optional*): Where the Arrow table is kept; the `datasets` cache by default.

    Raises:
        ValueError: If the folder does not exist or holds no picture.
    """
    from datasets import Features, Value

    from deem_plugin.data.conversations import build_dataset

    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise ValueError(f"The image folder {folder} does not exist. Set `data.path` to a folder of pictures.")
    if next(_list_images(str(folder)), None) is None:
        raise ValueError(
            f"The folder {folder} holds no picture. Expected files ending in {', '.join(IMAGE_SUFFIXES)} in it or in "
            f"its subfolders."
        )
    # A folder gives no other sign of a change deep inside it than its listing.
    listing = hashlib.sha256()
    for example in _list_images(str(folder)):
        listing.update(example["image"].encode() + b"\0")
    features = Features({"image": Value("string")})
    return build_dataset(_list_images, {"folder": str(folder)}, features, cache_dir, listing.hexdigest())
