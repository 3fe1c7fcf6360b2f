import io

import pytest
from PIL import Image, ImageFile

from deem_plugin.data.images import load_image, load_image_folder

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


def test_a_folder_is_listed_with_its_subfolders_and_listed_again_when_it_changes(tmp_path):
    (tmp_path / "data" / "b").mkdir(parents=True)
    tiny_image(0).save(tmp_path / "data" / "z.png")
    tiny_image(1).save(tmp_path / "data" / "b" / "a.JPEG")
    (tmp_path / "data" / "notes.txt").write_text("no picture")

    data = load_image_folder(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert data["image"][:] == [str(tmp_path / "data" / "z.png"), str(tmp_path / "data" / "b" / "a.JPEG")]

    tiny_image(2).save(tmp_path / "data" / "b" / "c.png")
    assert len(load_image_folder(tmp_path / "data", cache_dir=tmp_path / "cache")) == 3


def test_a_missing_or_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist. Set `data.path`"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no picture. Expected files ending in .jpg"):
        load_image_folder(tmp_path)
