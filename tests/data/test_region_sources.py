import json

import pytest

from deem_plugin.data.region_sources import (
    DESCRIBE_QUESTION,
    NAME_QUESTION,
    PART_QUESTION,
    iter_instances,
    iter_referring,
    iter_vcr,
    iter_visual_genome,
)
from deem_plugin.data.regions import RegionSample
from deem_plugin.data.tables import BrokenSample, LeftOut

SQUARE = [[0.0, 0.0, 2.0, 0.0, 2.0, 2.0, 0.0, 2.0]]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def split(samples):
    """What can be asked, and the reasons for all else in order."""
    samples = list(samples)
    assert all(isinstance(sample, RegionSample | LeftOut | BrokenSample) for sample in samples)
    asked = [sample for sample in samples if isinstance(sample, RegionSample)]
    return asked, [sample.reason for sample in samples if not isinstance(sample, RegionSample)]


@pytest.fixture
def instances(tmp_path):
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


def test_instances_are_named_by_their_category_and_what_is_dropped_is_told(instances):
    asked, reasons = split(iter_instances(instances))

    assert [sample.prompt[1] for sample in asked] == [NAME_QUESTION] * 3
    assert [sample.answer for sample in asked] == ["dog head", "dog head", ""]
    assert [sample.prompt[0] for sample in asked[:2]] == [SQUARE, (1.0, 1.0, 4.0, 3.0)]
    assert (asked[0].file, asked[0].width, asked[0].height) == ("a.png", 6, 4)
    assert "annotation 10 of" in asked[0].name and reasons == ["of a crowd", "without image"]


def test_parts_are_asked_for_as_parts(instances):
    assert next(iter_instances(instances, question=PART_QUESTION)).prompt[1] == PART_QUESTION


def test_a_bad_annotation_is_told_by_its_id(instances):
    (error,) = [sample for sample in iter_instances(instances) if isinstance(sample, BrokenSample)]

    assert "annotation 13 of" in str(error) and "belongs to image 2, which its file does not list" in str(error)


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (lambda data: data["images"][0].pop("file_name"), "without file name", "image of annotation 10 .*`file_name`"),
        (lambda data: data["images"][0].pop("width"), "broken record", "annotation 10 .*KeyError 'width'"),
        (lambda data: data["annotations"][0].pop("image_id"), "broken record", "annotation 10 .*KeyError 'image_id'"),
        (lambda data: data["annotations"].insert(0, 3), "broken record", "annotation number 0 of .*AttributeError"),
        (lambda data: data["annotations"].insert(0, {"id": 1, "image_id": 1, "category_id": 3, "bbox": []}),
         "broken record", "annotation 1 of .*not enough values"),
    ],
)  # fmt: skip
def test_what_an_export_lacks_is_told_by_annotation(instances, change, reason, message):
    data = json.loads(instances.read_text())
    change(data)

    first = next(iter_instances(write(instances, data)))

    assert isinstance(first, BrokenSample) and first.reason == reason
    with pytest.raises(BrokenSample, match=message):
        raise first


def test_exports_without_ids_or_with_addresses_alone_are_read(instances):
    """LVIS has no file names, other exports no ids of annotations."""
    data = json.loads(instances.read_text())
    data["images"][0] |= {"file_name": None, "coco_url": "http://example.org/train2017/1.jpg"}
    data["annotations"] = [{key: value for key, value in data["annotations"][0].items() if key != "id"}]

    ((sample,), reasons) = split(iter_instances(write(instances, data)))

    assert sample.file == "train2017/1.jpg" and "annotation number 0 of" in sample.name and not reasons


def test_each_referring_expression_of_the_split_is_a_document(instances, tmp_path):
    refs = write(
        tmp_path / "refs.json",
        [
            {"ref_id": 0, "ann_id": 10, "split": "train", "sentences": [{"sent": "left dog"}, "the head "]},
            {"ref_id": 1, "ann_id": 11, "split": "val", "sentences": ["right dog"]},
            {"ref_id": 2, "ann_id": 99, "split": "train", "sentences": ["nobody"]},
        ],
    )

    asked, reasons = split(iter_referring(instances, refs, split="train"))

    assert [sample.answer for sample in asked] == ["left dog", "the head"]
    assert asked[0].prompt == [SQUARE, DESCRIBE_QUESTION] and reasons == ["without annotation"]
    assert len(list(iter_referring(instances, refs))) == 4


def test_published_pickles_are_refused(instances):
    with pytest.raises(ValueError, match=r"refs\(unc\).p is no JSON.*pickles.*write the list .* as JSON"):
        next(iter_referring(instances, "refs(unc).p"))


def test_visual_genome_has_boxes_with_phrases(tmp_path):
    url = "https://example.org/images/VG_100K/7.jpg"
    images = write(tmp_path / "image_data.json", [{"image_id": 7, "url": url, "width": 6, "height": 4}])
    box = {"x": 1, "y": 0, "width": 9, "height": 2, "phrase": " a red car "}
    regions = [{"region_id": 1, "image_id": 7, **box}, {"region_id": 2, "image_id": 8, **box}]
    descriptions = write(tmp_path / "region_descriptions.json", [{"id": 7, "regions": regions}])

    ((sample,), reasons) = split(iter_visual_genome(descriptions, images))

    assert sample.prompt == [(1.0, 0.0, 10.0, 2.0), DESCRIBE_QUESTION] and sample.answer == "a red car"
    assert sample.file == "VG_100K/7.jpg" and reasons == ["without image"]


def test_vcr_introduces_each_object_once_and_then_asks(tmp_path):
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

    ((sample,), reasons) = split(iter_vcr(lines, tmp_path))

    assert sample.prompt == [
        "person 2: ",
        (2.0, 1.0, 5.0, 3.0),
        "\n",
        "person 1: ",
        SQUARE,
        "\n",
        "Why is person 2 looking at person 1 and person 2?\n",
    ]
    assert sample.answer == "person 1 doesn't care." and reasons == ["without answer", "without region"]


def test_a_file_in_another_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not in COCO's annotation format: it has no annotations, categories"):
        next(iter_instances(write(tmp_path / "a.json", {"images": []})))
