"""One geometry for the encoder's view, the view that is restored and the region."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor

from deem_plugin.vision import DeemImageProcessor, build_image_processor
from tests.vision.towers import tiny_tower


def photo(width=90, height=60):
    """A picture with a bright square right of the centre."""
    pixels = np.full((height, width, 3), 40, dtype=np.uint8)
    pixels[20:40, 50:70] = (200, 120, 60)
    return Image.fromarray(pixels)


@pytest.fixture
def processor():
    return build_image_processor(tiny_tower("clip"), target_size=96)


def test_pixel_values_are_those_of_clips_processor(processor):
    stock = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = [photo(), photo(60, 90)]
    ours = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours, stock(images, return_tensors="pt")["pixel_values"])


def test_target_is_the_same_view_in_minus_one_to_one(processor):
    batch = processor([photo(), photo(60, 90)], return_tensors="pt")
    target = batch["target_pixel_values"]
    assert target.shape == (2, 3, 96, 96)
    assert -1 <= target.min() and target.max() <= 1

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    seen = batch["pixel_values"] * std + mean
    small = torch.nn.functional.interpolate(target, size=32, mode="bicubic", antialias=True)
    assert ((small + 1) / 2 - seen).abs().mean() < 0.02


def test_target_is_left_out_unless_asked_for():
    processor = build_image_processor(tiny_tower("clip"))
    assert set(processor(photo(), return_tensors="pt")) == {"pixel_values"}
    assert processor(photo(), return_tensors="pt", target_size=64)["target_pixel_values"].shape == (1, 3, 64, 64)


def test_target_without_a_square_crop_is_refused(processor):
    with pytest.raises(ValueError, match="`target_size` needs a square centre crop, got do_center_crop=False"):
        processor(photo(), do_center_crop=False)


def test_region_lands_on_what_it_marks(processor):
    image = photo()
    mask = (np.asarray(image)[..., 0] > 100).astype(np.uint8)
    region = processor.process_regions([mask])
    seen = processor(image, return_tensors="pt", do_normalize=False)["pixel_values"]
    bright = seen[:, :1] > 0.5
    assert region.shape == (1, 1, 32, 32)
    assert (region[bright] == 1).all()
    assert region.sum() < 1.5 * bright.sum()


def test_region_of_one_pixel_survives_the_resize(processor):
    mask = torch.zeros(600, 900)
    mask[300, 450] = 1
    assert processor.process_regions([mask]).sum() > 0


def test_processor_survives_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, DeemImageProcessor)
    a, b = (p(photo(), return_tensors="pt") for p in (processor, loaded))
    assert torch.equal(a["pixel_values"], b["pixel_values"])
    assert torch.equal(a["target_pixel_values"], b["target_pixel_values"])
