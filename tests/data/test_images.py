import io
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from deem_plugin.data.images import _no_truncation, load_image, load_mask
from deem_plugin.data.tables import BrokenSample

from ..tiny import tiny_image


def jpeg_bytes(size=(64, 48)):
    buffer = io.BytesIO()
    tiny_image(0, size).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "RGB", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new(mode, (5, 7)) if mode == "I;16" else tiny_image(0, (5, 7)).convert(mode)
    image.save(tmp_path / "image.png")

    loaded = load_image(tmp_path / "image.png")

    assert (loaded.mode, loaded.size) == ("RGB", (5, 7))


def test_paths_bytes_stored_values_and_pictures_give_the_same(tmp_path):
    data = jpeg_bytes()
    (tmp_path / "image.jpg").write_bytes(data)
    expected = load_image(tmp_path / "image.jpg").tobytes()

    sources = [data, {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "image.jpg")}]
    sources.append(Image.open(tmp_path / "image.jpg"))
    assert all(load_image(source).tobytes() == expected for source in sources)


def test_a_photograph_that_lies_on_its_side_is_put_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny_image(0, (64, 48)).save(tmp_path / "image.jpg", exif=exif)

    assert load_image(tmp_path / "image.jpg").size == (48, 64)


def test_a_missing_image_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.jpg does not exist. Check `data.image_dir`"):
        load_image(tmp_path / "nothing.jpg")


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_an_error_even_if_someone_told_pil_to_tolerate_it(
    tmp_path, monkeypatch, suffix, tolerant
):
    tiny_image(0, (64, 48)).save(tmp_path / f"image.{suffix}")
    data = (tmp_path / f"image.{suffix}").read_bytes()
    (tmp_path / f"image.{suffix}").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)

    with pytest.raises(ValueError, match=rf"image.{suffix} cannot be read .* truncated .*Fetch it again"):
        load_image(tmp_path / f"image.{suffix}")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


@pytest.mark.parametrize("data", [b"", b"<html>404 Not Found</html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_corrupt_image_is_an_error_that_names_it(tmp_path, data):
    (tmp_path / "image.jpg").write_bytes(data)

    with pytest.raises(ValueError, match=r"image.jpg cannot be read .* take its record out"):
        load_image(tmp_path / "image.jpg")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 257, 32896, 65535]], np.int32), [0, 1, 128, 255]),
        (np.array([[0, 7, 128, 255]], np.int32), [0, 7, 128, 255]),
        (np.array([[-100, 0, 100, 300_000]], np.int32), [0, 0, 0, 255]),
        (np.array([[0, 0.5, 0.25, 1]], np.float32), [0, 128, 64, 255]),
        (np.array([[0, 7, 128, 255]], np.float32), [0, 7, 128, 255]),
        (np.array([[-1, 0, 1, np.nan]], np.float32), [0, 128, 255, 128]),
        (np.array([[-1, 0, 1, np.inf]], np.float32), [0, 128, 255, 128]),
        (np.array([[-5, -5, -5, -5]], np.int32), [0, 0, 0, 0]),
    ],
)
def test_grey_values_of_more_than_8_bits_keep_their_content(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tif")

    loaded = np.asarray(load_image(tmp_path / "a.tif"))

    assert loaded[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the platform has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")

    for source in (tmp_path / "a.png", {"path": str(tmp_path / "a.png"), "bytes": None}):
        with pytest.raises(BrokenSample, match="a.png cannot be read .it is no regular file"):
            load_image(source)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    image.convert(mode).save(tmp_path / "a.png")

    assert np.asarray(load_image(tmp_path / "a.png"))[0].tolist() == [[10] * 3, [255] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them_and_refused_where_they_must_not_be(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    tiny_image(0, (64, 48)).save(tmp_path / "image.png", exif=exif)

    expected = ImageOps.exif_transpose(Image.open(tmp_path / "image.png"))
    assert load_image(tmp_path / "image.png").tobytes() == expected.tobytes()
    if orientation == 1:
        load_image(tmp_path / "image.png", turned=False)
    else:
        with pytest.raises(BrokenSample, match=f"image.png is turned by its EXIF data .orientation {orientation}."):
            load_image(tmp_path / "image.png", turned=False)


def test_damaged_exif_data_are_told_by_the_file(tmp_path, monkeypatch):
    """Pillow raises nearly anything on them."""
    tiny_image(0).save(tmp_path / "image.png")
    monkeypatch.setattr(Image.Image, "getexif", lambda self: struct.unpack("<H", b""))

    with pytest.raises(BrokenSample, match="image.png cannot be read .*unpack requires"):
        load_image(tmp_path / "image.png")


def test_the_setting_of_another_library_comes_back_behind_the_last_reader(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    with _no_truncation:
        with _no_truncation:
            pass
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_threads_leave_the_setting_of_another_library_as_it_was(tmp_path, monkeypatch):
    tiny_image(0, (64, 48)).save(tmp_path / "image.png")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load_image, [tmp_path / "image.png"] * 200))

    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB", "RGBA", "P"])
def test_a_mask_is_true_where_its_picture_is_not_black(tmp_path, mode):
    """Also where the value is small, and where it is transparent."""
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 1]], np.uint16))
    else:
        image = Image.new("L", (2, 1))
        image.putpixel((1, 0), 255 if mode == "1" else 3)
        image = image.convert(mode)
    if mode == "RGBA":
        image.putalpha(0)
    image.save(tmp_path / "mask.png")

    mask = load_mask(tmp_path / "mask.png")

    assert mask.dtype == bool and mask.tolist() == [[False, True]]
