import json

import pytest
from PIL import Image

from deem_plugin.data.region_sources import (
    DESCRIBE_QUESTION,
    NAME_QUESTION,
    PART_QUESTION,
    iter_instances,
    iter_referring,
    iter_vcr,
    iter_visual_genome,
)
from deem_plugin.data.regions import RegionDocuments, RegionError

SQUARE = [[0.0, 0.0, 2.0, 0.0, 2.0, 2.0, 0.0, 2.0]]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def instances(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    return write(
        tmp_path / "instances.json",
        {
            "images": [{"id": 1, "file_name": "a.png", "width": 6, "height": 4}],
            "categories": [{"id": 3, "name": "dog_head"}],
            "annotations": [
                {"id": 10, "image_id": 1, "category_id": 3, "segmentation": SQUARE, "bbox": [0, 0, 2, 2]},
                {"id": 11, "image_id": 1, "category_id": 3, "bbox": [1, 1, 3, 2]},
                {"id": 12, "image_id": 1, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 1, 1]},
                {"id": 13, "image_id": 2, "category_id": 3, "bbox": [0, 0, 1, 1]},
                {"id": 14, "image_id": 1, "category_id": 9, "bbox": [0, 0, 1, 1]},
            ],
        },
    )


def test_instances_are_named_by_their_category_and_what_is_dropped_is_counted(instances):
    documents = RegionDocuments(iter_instances(instances), instances.parent, on_error="skip")

    assert [document.parts[1:] for document in documents] == [[NAME_QUESTION, "dog head"]] * 2
    assert [int(document.masks[0].sum()) for document in documents] == [4, 6]
    assert "annotation 10 of" in documents[0].name
    assert documents.dropped == {"of a crowd": 1, "without image": 1, "without answer": 1}


def test_parts_are_asked_for_as_parts(instances):
    assert next(iter_instances(instances, question=PART_QUESTION)).prompt[1] == PART_QUESTION


def test_a_bad_annotation_is_refused_by_its_id(instances):
    with pytest.raises(RegionError, match="annotation 13 of .* belongs to image 2, which its file does not list"):
        RegionDocuments(iter_instances(instances), instances.parent)


def test_each_referring_expression_of_the_split_is_a_document(instances, tmp_path):
    refs = write(
        tmp_path / "refs.json",
        [
            {"ref_id": 0, "ann_id": 10, "split": "train", "sentences": [{"sent": "left dog"}, "the head "]},
            {"ref_id": 1, "ann_id": 11, "split": "val", "sentences": ["right dog"]},
            {"ref_id": 2, "ann_id": 99, "split": "train", "sentences": ["nobody"]},
        ],
    )

    documents = RegionDocuments(iter_referring(instances, refs, split="train"), tmp_path, on_error="skip")

    assert [document.parts[1:] for document in documents] == [
        [DESCRIBE_QUESTION, "left dog"],
        [DESCRIBE_QUESTION, "the head"],
    ]
    assert documents.dropped == {"without annotation": 1}
    assert len(list(iter_referring(instances, refs))) == 4


def test_published_pickles_are_refused(instances):
    with pytest.raises(ValueError, match=r"refs\(unc\).p is no JSON.*pickles.*write the list .* as JSON"):
        next(iter_referring(instances, "refs(unc).p"))


def test_visual_genome_has_boxes_with_phrases(tmp_path):
    (tmp_path / "VG_100K").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "VG_100K" / "7.jpg")
    url = "https://example.org/images/VG_100K/7.jpg"
    images = write(tmp_path / "image_data.json", [{"image_id": 7, "url": url, "width": 6, "height": 4}])
    box = {"x": 1, "y": 0, "width": 9, "height": 2, "phrase": " a red car "}
    regions = [{"region_id": 1, "image_id": 7, **box}, {"region_id": 2, "image_id": 8, **box}]
    descriptions = write(tmp_path / "region_descriptions.json", [{"id": 7, "regions": regions}])

    documents = RegionDocuments(iter_visual_genome(descriptions, images), tmp_path, on_error="skip")

    assert documents[0].parts[1:] == [DESCRIBE_QUESTION, "a red car"]
    assert documents[0].masks[0].sum() == 10
    assert documents.dropped == {"without image": 1}


def test_vcr_introduces_each_object_once_and_then_asks(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    square = [[0, 0], [2, 0], [2, 2], [0, 2]]
    write(
        tmp_path / "a.json",
        {"width": 6, "height": 4, "boxes": [[0, 0, 2, 2, 0.9], [0, 0, 1, 1, 1], [2, 1, 5, 3, 1]],
         "segms": [[square], [], []]},
    )  # fmt: skip
    record = {
        "img_fn": "a.png",
        "metadata_fn": "a.json",
        "annot_id": "train-0",
        "objects": ["person", "dog", "person"],
        "question": ["Why", "is", [2], "looking", "at", [0, 2], "?"],
        "answer_choices": [["No", "."], [[0], "does", "n't", "care", "."]],
        "answer_label": 1,
    }
    unlabelled = {key: value for key, value in record.items() if key != "answer_label"}
    silent = {**record, "question": ["Why", "?"], "answer_label": 0}
    lines = tmp_path / "train.jsonl"
    lines.write_text("\n".join(map(json.dumps, [record, unlabelled, silent])))

    documents = RegionDocuments(iter_vcr(lines, tmp_path), tmp_path, on_error="skip")

    document = documents[0]
    assert [part for part in document.parts if isinstance(part, str)] == [
        "person 2: ",
        "\n",
        "person 1: ",
        "\n",
        "Why is person 2 looking at person 1 and person 2?\n",
        "person 1 doesn't care.",
    ]
    assert [int(mask.sum()) for mask in document.masks] == [6, 4]
    assert document.learn_from == len(document.parts) - 1
    assert documents.dropped == {"without answer": 1, "without region": 1}


def test_a_file_in_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not in COCO's annotation format: it has no annotations, categories"):
        next(iter_instances(write(tmp_path / "a.json", {"images": []})))
