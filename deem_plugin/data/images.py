"""Opens pictures without hiding damage."""

import io
import os
import stat
import threading
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile

from deem_plugin.data.tables import BrokenSample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# How to turn a picture upright, by the orientation that its EXIF data name.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFolder:
    """
    The folder that image paths in data are relative to, and below which they stay.

    Args:
        path (`str`): The folder.
        allow_outside (`bool`, *optional*, defaults to `False`): Whether paths may lead out of it.
    """

    def __init__(self, path: str, allow_outside: bool = False):
        self.path, self.allow_outside = path, allow_outside
        self._real = os.path.realpath(path)
        self._links: dict[str, set[str]] = {}

    def resolve(self, path: str) -> str:
        """
        Returns the whole path of a picture.

        Raises:
            ValueError: If it is no path, or leads out of the folder: by itself, by `..` or by a link.
        """
        if not isinstance(path, str):
            raise ValueError(f"its image is {path!r}; expected a path")
        whole = os.path.join(self.path, path)
        if not self.allow_outside:
            folder, name = os.path.split(whole)
            if folder not in self._links:  # one look at each folder, not one at each file
                self._check(folder, path)
                self._links[folder] = set()
                if os.path.isdir(folder):
                    self._links[folder] = {entry.name for entry in os.scandir(folder) if entry.is_symlink()}
            if name in (".", "..") or name in self._links[folder]:
                self._check(whole, path)
        return whole

    def _check(self, whole: str, path: str) -> None:
        if os.path.commonpath([self._real, os.path.realpath(whole)]) != self._real:
            raise ValueError(
                f"its image {path} lies outside of the image folder {self.path}. Move it there, or set "
                f"`data.allow_outside: true` if you trust the data"
            )


def load_image(
    source: str | os.PathLike | bytes | dict[str, Any] | Image.Image, *, turned: bool = True
) -> Image.Image:
    """
    Opens a picture completely and returns it upright in RGB.

    Grey values of more than 8 bits are brought to 8, and what is transparent is laid on white.

    Args:
        source (`str`, `PathLike`, `bytes`, `dict` or `PIL.Image.Image`):
            A file, its bytes, an undecoded `datasets.Image` value (`{"path": ..., "bytes": ...}`), a member of a tar
            file (`{"path": ..., "offset": ..., "size": ...}`), or a picture.
        turned (`bool`, *optional*, defaults to `True`):
            Whether a picture may be one that EXIF data turn. Where regions are given in the pixels as stored, it must
            not.

    Raises:
        BrokenSample: If the file is missing, is no picture, breaks off before its end, or is turned and must not be.
    """
    image = _open_upright(source, turned)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_mask(source: str | os.PathLike) -> np.ndarray:
    """Opens a picture as a boolean mask `(height, width)`, true where it is not black; errors as of [`load_image`]."""
    image = _open_upright(source, turned=False)
    values = np.asarray(image if image.mode[0] in "1LIF" and len(image.mode) != 2 else image.convert("RGB")) != 0
    return values if values.ndim == 2 else values.any(-1)


def _open_upright(source, turned: bool) -> Image.Image:
    name, opened = _open_source(source)
    try:
        with _no_truncation:
            image = opened() if callable(opened) else opened
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in _UPRIGHT:
            if not turned:
                raise BrokenSample(
                    "with a turned picture",
                    f"The image {name} is turned by its EXIF data (orientation {orientation}), so its regions would "
                    f"lie elsewhere. Store it upright, or take its record out of the data.",
                )
            image = image.transpose(_UPRIGHT[orientation])
        return image
    except BrokenSample:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BrokenSample(
            "missing image",
            f"The image {name} does not exist. Check `data.image_dir` (image paths in the data are relative to it) "
            f"and that the download is complete.",
        ) from error
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise BrokenSample(
            "unreadable image",
            f"The image {name} cannot be read ({error}): it is damaged, truncated or no picture. "
            f"Fetch it again, or take its record out of the data.",
        ) from error


def _open_source(source) -> tuple[str, Any]:
    """Returns how to name `source` in an error, and a picture or a function that opens it."""
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "given as a PIL image", source
    if isinstance(source, bytes):
        return "given as bytes", lambda: Image.open(io.BytesIO(source))
    if not isinstance(source, dict):
        return str(source), lambda: _open_file(source)
    name = source.get("path") or "stored in the data set"
    if source.get("bytes") is not None:
        return name, lambda: Image.open(io.BytesIO(source["bytes"]))
    if source.get("offset") is not None:
        return f"at byte {source['offset']} of {name}", lambda: Image.open(io.BytesIO(_read_member(**source)))
    return name, lambda: _open_file(name)


def _open_file(path) -> Image.Image:
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError("it is no regular file")  # a pipe would be waited for without end
    return Image.open(path)


def _read_member(path: str, offset: int, size: int, **_) -> bytes:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(path)
    return filesystem.cat_file(path, start=offset, end=offset + size)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Brings grey values to 0 to 255; `convert` would cut off all that is above."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") or (255 < high <= 65535 and low >= 0):
        values = values / 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low or 1))
    return Image.fromarray(values.round().astype(np.uint8))


class _NoTruncation:
    """
    While a thread is in it, Pillow refuses truncated pictures, whatever another library has set for the process: it
    would fill the missing part with grey. Behind the last thread the setting is as it was.
    """

    def __init__(self):
        self._lock, self._inside, self._before = threading.Lock(), 0, False

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *error):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_no_truncation = _NoTruncation()
