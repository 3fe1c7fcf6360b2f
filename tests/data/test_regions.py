import builtins

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from deem_plugin.data.documents import Region
from deem_plugin.data.regions import LeftOut, RegionDocuments, RegionError, RegionSample, encode_segmentation

WIDTH, HEIGHT = 6, 4
EXPECTED = np.zeros((HEIGHT, WIDTH), dtype=bool)
EXPECTED[1:3, 2:5] = True
BOX = (2.0, 1.0, 5.0, 3.0)
POLYGON = [[2.0, 1.0, 5.0, 1.0, 5.0, 3.0, 2.0, 3.0]]
COMPRESSED = coco_masks.encode(np.asfortranarray(EXPECTED.astype(np.uint8)))
# Runs of zeros and ones by turns, column by column.
UNCOMPRESSED = {"size": [HEIGHT, WIDTH], "counts": [9, 2, 2, 2, 2, 2, 5]}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(tmp_path / "a.png")
    return tmp_path


def sample(region=BOX, name="annotation 5", answer="a cat", size=(WIDTH, HEIGHT)):
    return RegionSample(name, "a.png", *size, [region, "What?"], answer)


@pytest.mark.parametrize(
    "region",
    [BOX, POLYGON, UNCOMPRESSED, COMPRESSED, {**COMPRESSED, "counts": COMPRESSED["counts"].decode()}],
    ids=["box", "polygon", "runs", "bytes", "string"],
)
def test_every_form_of_a_region_gives_the_same_mask(folder, region):
    document = RegionDocuments([sample(region)], folder)[0]

    assert isinstance(document.parts[0], Region)
    np.testing.assert_array_equal(document.parts[0].mask, EXPECTED)
    assert document.parts[1:] == ["What?", "a cat"]
    assert (document.learn_from, document.name) == (2, "annotation 5")


def test_several_polygons_are_one_region(folder):
    polygons = [[0, 0, 2, 0, 2, 2, 0, 2], [4, 2, 6, 2, 6, 4, 4, 4]]

    mask = RegionDocuments([sample(polygons)], folder)[0].masks[0]

    assert mask[:2, :2].all() and mask[2:, 4:].all() and mask.sum() == 8


BAD = {
    "with an empty region": [
        (6.0, 0.0, 9.0, 3.0),
        (2.2, 1.0, 2.8, 3.0),
        [[10, 10, 12, 10, 12, 12]],
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
    ],
    "with a broken region": [
        (0.0, 0.0, float("nan"), 1.0),
        [],
        [[0, 0, 4, 4]],
        [[0, 0, 4, 4, float("inf"), 1]],
        {"size": [HEIGHT, WIDTH], "counts": [3, 4]},
        {"size": [HEIGHT, WIDTH], "counts": None},
    ],
    "with a region of another size": [{"size": [WIDTH, HEIGHT], "counts": [9, 15]}],
}


@pytest.mark.parametrize(("reason", "region"), [(reason, region) for reason in BAD for region in BAD[reason]])
def test_a_bad_region_is_refused_by_its_annotation_or_counted_by_reason(folder, reason, region):
    with pytest.raises(RegionError, match="annotation 5"):
        RegionDocuments([sample(region)], folder)

    documents = RegionDocuments([sample(), sample(region)], folder, on_error="skip")
    assert (len(documents), documents.dropped) == (1, {reason: 1})


def test_counts_are_logged(folder, caplog):
    bad = LeftOut("of a crowd")

    RegionDocuments([bad, sample(), bad, sample(answer=" ")], folder, on_error="skip")

    assert "Left out 3 of 4 samples: 2 of a crowd, 1 without answer." in caplog.text


def test_what_a_rule_leaves_out_is_counted_and_does_not_raise(folder):
    assert RegionDocuments([LeftOut("of a crowd"), sample()], folder).dropped == {"of a crowd": 1}


def test_a_region_of_one_pixel_is_kept(folder):
    assert RegionDocuments([sample((2.0, 1.0, 3.0, 2.0))], folder)[0].masks[0].sum() == 1


def test_a_picture_of_another_size_raises_even_when_skipping(folder):
    documents = RegionDocuments([sample(size=(WIDTH + 1, HEIGHT))], folder, on_error="skip")

    with pytest.raises(ValueError, match="a.png is 6 x 4, but annotation 5 speaks of one of 7 x 4"):
        documents[0]


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="`on_error` is 'ignore'; expected one of raise, skip"):
        RegionDocuments([], tmp_path, on_error="ignore")
    with pytest.raises(ValueError, match="nowhere does not exist. Set `image_dir`"):
        RegionDocuments([], tmp_path / "nowhere")


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'deem-plugin\[regions\]'"):
        encode_segmentation(POLYGON, WIDTH, HEIGHT, "annotation 5")
