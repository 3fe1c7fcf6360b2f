"""Files of interleaved documents: read as written, packed into rows, learned where they should be."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from deem_plugin.data.conversations import list_conversations
from deem_plugin.data.document_collator import DocumentCollator
from deem_plugin.data.document_files import list_documents, write_documents
from deem_plugin.data.examples import Examples
from deem_plugin.data.parts import region_of

from ..models.official_labels import make_labels
from ..models.tiny_deem import QUERIES, SIZE, tiny_deem
from ..tiny import tiny_image

DOCUMENTS = [
    {"parts": ["a cat", {"image": "0.png"}, "and"]},
    {"parts": [{"image": "1.png", "box": [0, 0, 32, 64]}, "what?", "dog"], "learn_from": 2},
    {"parts": [{"image": "0.png", "mask": "mask.png"}, {"image": "1.png", "points": [[60, 60]]}, "x"]},
]


@pytest.fixture(scope="module")
def processor():
    return tiny_deem()[1]


@pytest.fixture
def folder(tmp_path):
    for index in range(2):
        tiny_image(index, size=(SIZE, SIZE)).save(tmp_path / f"{index}.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    write_documents(tmp_path / "documents.jsonl", DOCUMENTS)
    return tmp_path


def load(path):
    return Examples.of([list_documents(path)], cache_dir=path.parent / "cache")


def test_documents_come_back_as_they_were_written(folder):
    table = list_documents(folder / "documents.jsonl").read(cache_dir=folder / "cache")

    assert len(table) == 3 and table["learn_from"][:] == [0, 2, 0]
    first = table[0]["parts"]
    assert [part["text"] for part in first] == ["a cat", None, "and"]
    assert first[1]["image"] == str(folder / "0.png") and first[1]["box"] is None and first[1]["mask"] is None
    assert table[1]["parts"][0]["box"] == [0, 0, 32, 64]


def test_a_file_may_be_read_in_two_ways_from_one_cache(folder):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = write_documents(folder / "both.jsonl", [{"parts": ["a cat"], "messages": turns}])

    listings = list_documents(path), list_conversations(path)

    document, conversation = (listing.read(cache_dir=folder / "cache")[0] for listing in listings)
    assert document["parts"][0]["text"] == "a cat" and conversation["messages"] == turns


def test_regions_stay_as_they_are_given_until_the_processor_takes_them(folder):
    examples = load(folder / "documents.jsonl")
    (box, *_), (mask, points, _) = (examples[index]["parts"] for index in (1, 2))

    assert region_of(box) == [0, 0, 32, 64] and region_of(points) == [[60, 60]]
    assert region_of(mask).shape == (SIZE, SIZE) and region_of(mask)[:, 32:].all() and region_of(mask).mean() == 0.5


def test_a_batch_is_packed_and_learned_by_the_official_rules(folder, processor, tmp_path):
    dataset = load(folder / "documents.jsonl")

    batch = DocumentCollator(processor, max_length=34)([dataset[index] for index in range(3)])

    picture = 1 + QUERIES
    lengths = [1 + 5 + picture + 3 + 1, 1 + picture + 5 + 3 + 1, 1 + 2 * picture + 1 + 1]
    assert lengths == [15, 15, 13]
    assert batch["input_ids"].shape == (2, 30)
    assert batch["document_ids"].tolist() == [[0] * 15 + [1] * 15, [0] * 13 + [-1] * 17]
    assert batch["attention_mask"].sum(1).tolist() == [30, 13]
    rules = {"bos_token_id": 1, "image_token_id": processor.image_token_id}
    official = make_labels(
        batch["input_ids"],
        batch["attention_mask"],
        image_start_token_id=processor.image_start_token_id,
        **rules,
    )
    official[0, 15 : 15 + 1 + picture + 5] = -100  # the prompt of the second document
    assert torch.equal(batch["labels"], official)
    assert batch["pixel_values"].shape == (4, 3, SIZE, SIZE)
    shares = batch["region_masks"].flatten(1).mean(1).tolist()
    assert shares[:3] == [1.0, pytest.approx(0.5, abs=0.02), pytest.approx(0.5, abs=0.02)] and 0 < shares[3] < 0.05


def test_tokens_are_those_of_the_processor_in_use(folder, processor, tmp_path):
    dataset = load(folder / "documents.jsonl")

    batch = DocumentCollator(processor)([dataset[0]])
    asked = processor(text="a cat<image>and", images=[tiny_image(0, size=(SIZE, SIZE))], return_tensors="pt")

    assert batch["input_ids"][0].tolist() == [*asked["input_ids"][0].tolist(), 2]
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])


def test_a_document_that_is_too_long_is_cut_at_the_token_and_before_a_picture(folder, processor):
    dataset = load(folder / "documents.jsonl")
    whole = [DocumentCollator(processor)([dataset[index]]) for index in (0, 2)]

    collators = [DocumentCollator(processor, max_length=length) for length in (13, 10)]
    batch, short = (collate([dataset[0], dataset[2]]) for collate in collators)

    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][0], whole[0][name][0, :13])  # two of three letters behind the picture
        assert torch.equal(batch[name][1], whole[1][name][0])
        assert torch.equal(short[name][0, :6], whole[0][name][0, :6])  # five letters and no picture
        assert torch.equal(short[name][1, :6], whole[1][name][0, :6])  # the first picture of two
    assert short["attention_mask"].sum(1).tolist() == [6, 6]
    assert torch.equal(batch["pixel_values"][1:], whole[1]["pixel_values"])
    assert torch.equal(short["pixel_values"], whole[1]["pixel_values"][:1])
    assert torch.equal(short["region_masks"], whole[1]["region_masks"][:1])
    assert [collate.cut for collate in collators] == [1, 2]


def test_a_long_text_is_learned_up_to_the_cut_and_a_picture_behind_it_is_left_out(folder, processor, tmp_path):
    write_documents(folder / "long.jsonl", [{"parts": ["long " * 20, {"image": "0.png"}, "x"]}])
    dataset = load(folder / "long.jsonl")

    batch = DocumentCollator(processor, max_length=30)([dataset[0]])

    assert "pixel_values" not in batch and batch["labels"][0].tolist()[1:] == batch["input_ids"][0].tolist()[1:]
    assert processor.tokenizer.decode(batch["input_ids"][0, 1:]) == ("long " * 20)[:29]


def test_a_row_too_short_for_a_picture_is_refused(processor):
    with pytest.raises(ValueError, match="holds no picture, which takes 5 tokens"):
        DocumentCollator(processor, max_length=6)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "expected an object with a list `parts`"),
        ({"parts": []}, "expected an object with a list `parts` that is not empty"),
        ({"parts": ["a"], "learn_from": 1}, "learn_from=1; expected the number of a part, 0 to 0"),
        ({"parts": [""]}, "an empty text"),
        ({"parts": [{"image": "x", "box": 3}]}, "has the box 3"),
        ({"parts": [{"image": "x.png"}]}, "The image .*x.png of record 1 of .* does not exist"),
        ({"parts": [{"picture": "x"}]}, "with no `image`"),
        ({"parts": [{"image": "x", "bbox": [0]}]}, r"the unknown keys .'bbox'."),
        ({"parts": [{"image": "0.png", "box": [0, 1]}]}, r"the box .0, 1.; expected .left, top, right, bottom."),
        ({"parts": [{"image": "x", "box": [0] * 4, "mask": "y"}]}, "a picture with box and mask; give one"),
    ],
)
def test_a_bad_document_is_named(tmp_path, record, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"parts": ["fine"]}) + "\n" + json.dumps(record) + "\n")

    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "bad.jsonl")
    assert re.search("(document|record) 1 of", str(error.value))


def test_a_region_outside_of_its_picture_is_refused(folder, processor, tmp_path):
    write_documents(folder / "out.jsonl", [{"parts": [{"image": "0.png", "box": [70, 0, 90, 20]}, "x"]}])
    dataset = load(folder / "out.jsonl")

    with pytest.raises(ValueError, match="covers no pixel of a picture of 64 x 64"):
        DocumentCollator(processor)([dataset[0]])
