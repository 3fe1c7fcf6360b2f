import builtins

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from deem_plugin.data.regions import compact_region
from deem_plugin.data.tables import BrokenSample
from deem_plugin.vision.regions import region_mask

WIDTH, HEIGHT = 6, 4
EXPECTED = np.zeros((HEIGHT, WIDTH), dtype=bool)
EXPECTED[1:3, 2:5] = True
BOX = (2.0, 1.0, 5.0, 3.0)
POLYGON = [[2.0, 1.0, 5.0, 1.0, 5.0, 3.0, 2.0, 3.0]]
COMPRESSED = coco_masks.encode(np.asfortranarray(EXPECTED.astype(np.uint8)))
# Runs of zeros and ones by turns, column by column.
UNCOMPRESSED = {"size": [HEIGHT, WIDTH], "counts": [9, 2, 2, 2, 2, 2, 5]}


def mask_of(region, width=WIDTH, height=HEIGHT):
    """The mask of a region that was stored in its compact form."""
    (compact,) = compact_region(region, width, height, "annotation 5").values()
    return region_mask(compact, width, height)


@pytest.mark.parametrize(
    "region",
    [BOX, POLYGON, UNCOMPRESSED, COMPRESSED, {**COMPRESSED, "counts": COMPRESSED["counts"].decode()}],
    ids=["box", "polygon", "runs", "bytes", "string"],
)
def test_every_form_of_a_region_gives_the_same_mask(region):
    np.testing.assert_array_equal(mask_of(region), EXPECTED)


def test_several_polygons_are_one_region():
    mask = mask_of([[0, 0, 2, 0, 2, 2, 0, 2], [4, 2, 6, 2, 6, 4, 4, 4]])

    assert mask[:2, :2].all() and mask[2:, 4:].all() and mask.sum() == 8


@pytest.mark.parametrize("seed", range(5))
def test_compressed_runs_are_read_as_they_were_written(seed):
    """Long runs, with differences of either sign, against the masks that they were made of."""
    rng = np.random.default_rng(seed)
    expected = np.repeat(rng.random((70, 5)) < 0.5, rng.integers(1, 40), axis=1)
    encoded = coco_masks.encode(np.asfortranarray(expected.astype(np.uint8)))

    np.testing.assert_array_equal(mask_of(encoded, *expected.shape[::-1]), expected)


BAD = {
    "with an empty region": [
        (6.0, 0.0, 9.0, 3.0),
        (2.2, 1.0, 2.8, 3.0),
        [[7, 5, 8, 5, 8, 6]],
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    ],
    "with a broken region": [
        (0.0, 0.0, float("nan"), 1.0),
        [],
        [[0, 0, 4, 4]],
        [[0, 0, 4, 4, float("inf"), 1]],
        {"size": [HEIGHT, WIDTH], "counts": [3, 4]},
        {"size": [HEIGHT, WIDTH], "counts": None},
        # What crashes pycocotools 2.0.11, or makes it ask for all memory.
        [[0, 0, 1e8, 0, 1e8, 1e8]],
        {"size": [HEIGHT, WIDTH], "counts": b"\xff\x01zz"},
        {"size": [HEIGHT, WIDTH], "counts": "oooooooooooo0"},
        {"size": [HEIGHT, WIDTH], "counts": "9"},
        {"size": [HEIGHT, WIDTH], "counts": "o"},
    ],
    "with a region of another size": [
        {"size": [WIDTH, HEIGHT], "counts": [9, 15]},
        {"size": None, "counts": [9, 15]},
    ],
}


@pytest.mark.parametrize(("reason", "region"), [(reason, region) for reason in BAD for region in BAD[reason]])
def test_a_bad_region_is_refused_by_its_annotation(reason, region):
    with pytest.raises(BrokenSample, match="annotation 5") as error:
        compact_region(region, WIDTH, HEIGHT, "annotation 5")
    assert error.value.reason == reason


def test_a_region_of_one_pixel_is_kept():
    assert mask_of((2.0, 1.0, 3.0, 2.0)).sum() == 1


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'deem-plugin\[regions\]'"):
        compact_region(POLYGON, WIDTH, HEIGHT, "annotation 5")
