"""DeemProcessor: marks become slots, regions become masks in the pictures' geometry, and nothing is guessed."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from deem_plugin.models import processing
from deem_plugin.vision.regions import region_mask, square_around

from ..tiny import tiny_image
from .tiny_deem import QUERIES, SIZE, tiny_deem


@pytest.fixture(scope="module")
def processor():
    return tiny_deem()[1]


def test_marks_of_pictures_and_regions_become_a_start_and_slots(processor):
    images = [tiny_image(index, size=(SIZE, SIZE)) for index in range(2)]

    inputs = processor(images=images, text="<image>a<image>b", regions=[None, [0, 0, 32, 16]], return_tensors="pt")

    start, slot = processor.image_start_token_id, processor.image_token_id
    ids = inputs["input_ids"][0].tolist()
    assert ids[1 : 2 + QUERIES] == [start] + [slot] * QUERIES
    assert (ids.count(start), ids.count(slot)) == (2, 2 * QUERIES)
    assert inputs["region_masks"].shape == (2, 1, SIZE, SIZE)
    assert inputs["region_masks"][0].min() == 1
    inside = inputs["region_masks"][1, 0].nonzero()
    assert (inside.amin(0).tolist(), inside.amax(0).tolist()) == ([0, 0], [15, 31])


def test_a_mask_goes_through_the_geometry_of_its_picture(processor):
    """A wide picture is cropped to its middle: what lies left of it is cut off with it."""
    mask = np.zeros((SIZE, 2 * SIZE), bool)
    mask[:, 64:] = True  # the right half; the crop keeps columns 32 to 95

    masks = processor.region_masks([tiny_image(0, size=(2 * SIZE, SIZE))], [mask])

    assert torch.equal(masks[0, 0, :, :31], torch.zeros(SIZE, 31)) and masks[0, 0, :, 33:].min() == 1
    with pytest.raises(ValueError, match=r"regions of pictures \[0\] lie outside of what is left"):
        processor.region_masks([tiny_image(0, size=(2 * SIZE, SIZE))], [~mask & (np.arange(2 * SIZE) < 20)])


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([[0, 0, 9, 9], None], "2 entries of `regions` for 1 pictures"),
        ([[0, 0, 9]], r"A region of shape \(3,\) is none"),
        ([np.zeros((SIZE, SIZE))], "covers no pixel"),
        ([np.ones((5, 5))], r"expected a mask of the picture's size \(64, 64\)"),
    ],
)
def test_a_wrong_region_is_named(processor, regions, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[tiny_image(0, size=(SIZE, SIZE))], text="<image>", regions=regions, return_tensors="pt")


def test_boxes_and_points_cover_the_pixels_they_say():
    box, points = region_mask([1, 2, 4, 5], 8, 8), region_mask([(0, 0), (20, 20)], 30, 30)

    assert box.sum() == 9 and box[2:5, 1:4].all()
    assert points[4, 0] and not points[5, 0] and points[20, 24] and not points[12, 12]


@pytest.mark.parametrize(("box", "place"), [((0, 0, 20, 64), 0), ((100, 3, 128, 64), 64), ((20, 0, 60, 9), 20)])
def test_a_region_beside_the_middle_of_its_picture_is_shown_whole(processor, box, place):
    """Of a picture twice as wide as high the crop keeps columns 32 to 95; here it keeps 64 of them from `place` on."""
    image = tiny_image(0, size=(2 * SIZE, SIZE))

    inputs = processor(images=[image], text="<image>", regions=[box], return_tensors="pt")

    alone = processor(images=[image.crop((place, 0, place + SIZE, SIZE))], text="<image>", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
    expected = torch.zeros(SIZE, SIZE)
    expected[box[1] : box[3], box[0] - place : box[2] - place] = 1
    assert torch.equal(inputs["region_masks"][0, 0], expected)


def test_a_picture_whose_middle_shows_its_region_or_that_is_meant_whole_is_not_cut(processor):
    images = [tiny_image(index, size=(100, 70)) for index in range(2)]

    inputs = processor(images=images, text="<image><image>", regions=[(20, 0, 70, 60), None], return_tensors="pt")

    plain = processor(images=images, text="<image><image>", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"])


def test_a_region_longer_than_the_square_is_cut_alike_on_both_sides():
    mask = np.zeros((10, 40), bool)
    mask[4, 10:30] = True

    assert square_around(mask) == (15, 0, 25, 10)
    assert square_around(mask.T) == (0, 15, 10, 25)


def test_a_region_is_drawn_once_whatever_becomes_of_its_picture(processor, monkeypatch):
    drawn = []

    def draw(region, *size):
        drawn.append(region)
        return region_mask(region, *size)

    monkeypatch.setattr(processing, "region_mask", draw)
    images = [tiny_image(index, size=(2 * SIZE, SIZE)) for index in range(3)]
    encoded = mask_api.encode(np.asfortranarray(np.eye(SIZE, 2 * SIZE, dtype=np.uint8)))
    regions = [[0, 0, 20, 64], encoded, None]

    processor(text="<image><image><image>", images=images, regions=regions)

    assert drawn == regions[:2]
