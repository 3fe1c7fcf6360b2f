import numpy as np
import pytest
from PIL import Image

from deem_plugin.data.document_collator import DocumentCollator
from deem_plugin.data.documents import Document, Region

from ..models.tiny_deem import tiny_deem
from ..tiny import tiny_image

IMAGE = Image.new("RGB", (5, 3))


def region(mask=None):
    return Region(IMAGE, np.ones((3, 5), dtype=bool) if mask is None else mask)


def test_pictures_and_masks_come_in_reading_order():
    inside = region()
    document = Document(["a", IMAGE, inside, "b"])

    assert document.images == [IMAGE, IMAGE]
    assert document.masks == [None, inside.mask]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "sample 3 has no parts"),
        (["a", ""], "Part 1 of sample 3 is an empty text"),
        ([b"a"], "Part 0 of sample 3 is a bytes; expected a text, a PIL picture"),
        ([Region("a.jpg", None)], "region of a str; expected one of a PIL picture"),
        ([region(np.ones((3, 5)))], r"mask that is float64 \(3, 5\); expected a boolean"),
        ([region(np.ones((5, 3), dtype=bool))], r"mask that is bool \(5, 3\); expected .* shape \(3, 5\)"),
        ([region([[1]])], "mask that is list"),
        ([region(np.zeros((3, 5), dtype=bool))], "Part 0 of sample 3 has an empty mask.*Leave the sample out"),
    ],
)
def test_what_is_no_document_is_refused_by_name(parts, message):
    with pytest.raises(ValueError, match=message):
        Document(parts, name="sample 3")


@pytest.mark.parametrize("learn_from", [-1, 2])
def test_a_document_with_nothing_to_learn_is_refused(learn_from):
    with pytest.raises(ValueError, match=rf"`learn_from` of a document is {learn_from}.*expected 0 to 1"):
        Document(["a", "b"], learn_from=learn_from)


def test_columns_are_what_the_collator_takes():
    _, processor = tiny_deem()
    image = tiny_image(0, (32, 32))
    mask = np.zeros((32, 32), dtype=bool)
    mask[4:12, 8:24] = True
    document = Document([Region(image, mask), "What is it?", "a cat", image], learn_from=2)

    batch = DocumentCollator(processor)([document.columns()])

    expected = processor.region_masks([image, image], [mask, None])
    assert expected[0].sum() < expected[1].sum()
    assert batch["region_masks"].equal(expected)
    learned = batch["labels"][0][batch["labels"][0] >= 0].tolist()
    assert processor.tokenizer.decode(learned).startswith("a cat")
