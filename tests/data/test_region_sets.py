"""Published data sets of regions, named by a recipe: one table, everything left out is counted by source."""

import json
import logging
import pickle
from pathlib import Path

import pytest
from PIL import Image

from deem_plugin.data.document_collator import DocumentCollator
from deem_plugin.data.examples import Examples
from deem_plugin.data.parts import region_of
from deem_plugin.data.region_sets import list_regions
from deem_plugin.data.region_sources import PART_QUESTION
from deem_plugin.data.tables import BrokenSample
from deem_plugin.vision.regions import region_mask

from ..models.tiny_deem import SIZE, tiny_deem
from ..tiny import tiny_image

SQUARE = [[8, 8, 40, 8, 40, 40, 8, 40]]


def write_json(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def write_sources(folder):
    """Writes a tiny data set of each format over three pictures and returns the recipe's entries."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for index in range(3):
        tiny_image(index, (SIZE, SIZE)).save(pictures / f"{index}.png")
    images = [{"id": index, "file_name": f"{index}.png", "width": SIZE, "height": SIZE} for index in range(3)]
    annotations = [
        {"id": 0, "image_id": 0, "category_id": 1, "segmentation": SQUARE},
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 20]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9]},
        {"id": 4, "image_id": 2, "category_id": 1, "bbox": [70, 0, 9, 9]},
    ]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog_head"}]}
    refs = [{"ann_id": i, "split": split, "sentences": ["left dog"]} for i, split in enumerate(("val", "train"))]
    refs = write_json(folder / "refs.json", refs)
    box = {"x": 1, "y": 2, "width": 9, "height": 20, "phrase": "a red car"}
    image_data = [{"image_id": 5, "url": "u/pictures/2.png", "width": SIZE, "height": SIZE}]
    write_json(folder / "0.json", {"width": SIZE, "height": SIZE, "boxes": [[0, 0, 9, 9]], "segms": [[]]})
    vcr = {
        "img_fn": "0.png", "metadata_fn": "0.json", "annot_id": "train-0", "objects": ["person"],
        "question": ["Who", "is", [0], "?"], "answer_choices": [["Nobody", "."]], "answer_label": 0,
    }  # fmt: skip
    (folder / "vcr.jsonl").write_text(json.dumps(vcr))
    instances = write_json(folder / "instances.json", coco)
    at = {"image_dir": str(pictures)}
    return [
        {"format": "coco", "annotations": instances, "question": PART_QUESTION, **at},
        {"format": "refcoco", "instances": instances, "refs": refs, "split": "train", **at},
        {
            "format": "visual_genome", "image_dir": str(folder),
            "descriptions": write_json(folder / "vg.json", [{"regions": [{"region_id": 1, "image_id": 5, **box}]}]),
            "image_data": write_json(folder / "image_data.json", image_data),
        },
        {"format": "vcr", "path": str(folder / "vcr.jsonl"), "metadata_dir": str(folder), **at},
    ]  # fmt: skip


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "data").mkdir()
    return write_sources(tmp_path / "data")


@pytest.fixture
def load(tmp_path):
    return lambda sources, on_error="skip": Examples.of(map(list_regions, sources), on_error, tmp_path / "cache")


def opened(examples):
    return [examples[index] for index in range(len(examples))]


def texts(document):
    return [part["text"] for part in document["parts"] if part["text"]]


def test_all_formats_are_read_and_what_is_left_out_is_said_by_source(sources, load, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="deem_plugin"):
        examples = load(sources)

    answers = [texts(document)[-1] for document in opened(examples)]
    assert answers == ["dog head"] * 2 + ["left dog", "a red car", "Nobody."]
    checked = [list_regions(source).check(tmp_path / "cache") for source in sources]
    left_out = {"of a crowd": 1, "without image": 1, "with an empty region": 1}
    assert [each.left_out for each in checked] == [left_out, {}, {}, {}]
    assert f"coco {sources[0]['annotations']}: 2 of 5 samples; 1 of a crowd, " in caplog.text


def test_documents_have_their_picture_their_region_and_their_answer(sources, load):
    examples = load(sources)
    square, box, _, _, vcr = opened(examples)

    assert [part["text"] for part in square["parts"]] == [None, PART_QUESTION, "dog head"]
    assert square["learn_from"] == 2 and square["parts"][0]["image"].size == (SIZE, SIZE)
    inside = region_mask(region_of(square["parts"][0]), SIZE, SIZE)
    assert inside[8:40, 8:40].all() and inside.sum() == 32 * 32
    assert region_of(box["parts"][0]) == [0, 0, 10, 20]
    assert [part["text"] for part in vcr["parts"]] == ["person 1: ", None, "\n", "Who is person 1?\n", "Nobody."]


def test_a_second_run_reads_the_table_of_the_first_and_knows_what_it_left_out(sources, load, monkeypatch, caplog):
    first = opened(load(sources[:1]))
    monkeypatch.setattr("deem_plugin.data.region_sets._rows", _not_again)

    again = load(sources[:1])

    assert [texts(document) for document in opened(again)] == [texts(document) for document in first]
    assert caplog.text.count("2 of 5 samples; 1 of a crowd") == 2


def _not_again(source):
    raise AssertionError("the source was read again")


# Parts of the key of the table.
_not_again.__module__, _not_again.__qualname__ = "deem_plugin.data.region_sets", "_rows"


def test_a_changed_file_is_read_anew(sources, load):
    assert len(load(sources[:1])) == 2
    path = sources[0]["annotations"]
    content = json.loads(open(path).read())
    content["annotations"] = content["annotations"][:1]
    open(path, "w").write(json.dumps(content))

    assert len(load(sources[:1])) == 1


def test_it_travels_to_the_workers_of_a_data_loader(sources, load):
    examples = load(sources)

    assert texts(pickle.loads(pickle.dumps(examples))[0]) == texts(examples[0])


def test_what_is_wrong_raises_by_its_name(sources, load):
    with pytest.raises(ValueError, match="2 of 5 samples of coco .*(?s:.*)annotation 3 of .* belongs to image 7"):
        load(sources, "raise")
    with pytest.raises(ValueError, match="`on_error` is 'ignore'; expected one of raise, skip"):
        load(sources, "ignore")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "voc"}, r"the source is .*; expected a mapping with `format`, one of coco, refcoco, vis"),
        ({"split": "train"}, r"unknown keys \['split'\]; those of the format coco are format, image_dir, annotations"),
        ({"image_dir": None}, r"the source lacks image_dir; the format coco needs image_dir, annotations"),
        ({"annotations": "nowhere.json"}, "The `annotations` of .*nowhere.json, does not exist"),
    ],
)
def test_a_source_that_is_not_as_described_is_refused(sources, load, change, message):
    source = {name: value for name, value in (sources[0] | change).items() if value is not None}

    with pytest.raises(ValueError, match=message):
        load([source])


def test_lost_pictures_are_listed_or_counted(sources, load, tmp_path, caplog):
    Path(sources[0]["image_dir"], "1.png").unlink()

    assert len(load(sources[:1])) == 1 and "1 without its picture" in caplog.text
    with pytest.raises(ValueError, match="1.png of record 1 of coco .* does not exist. Set `data.image_dir`"):
        load(sources[:1], "raise")
    with pytest.raises(ValueError, match="No sample of coco .* is left: .*'without its picture': 2"):
        load([sources[0] | {"image_dir": str(tmp_path)}])


def test_nothing_left_and_a_broken_file_are_errors(sources, load, tmp_path):
    with pytest.raises(ValueError, match="refcoco .*refs.json holds no sample. Check its files, and its `split`"):
        load([sources[1] | {"split": "trian"}])
    content = json.loads(open(sources[0]["annotations"]).read())
    broken = write_json(tmp_path / "bad.json", content | {"annotations": content["annotations"][2:]})
    with pytest.raises(ValueError, match="No sample of coco .* is left: .*of a crowd"):
        load([sources[0] | {"annotations": broken}])
    (tmp_path / "broken.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"broken.json is no valid JSON .* broken or cut off"):
        load([sources[0] | {"annotations": str(tmp_path / "broken.json")}])


@pytest.mark.parametrize("exif", [None, 2, 3, 6])
def test_a_picture_that_was_resized_or_is_turned_is_skipped_or_refused_when_it_is_opened(sources, load, exif):
    """Turned by 180 degrees a picture has the size that is expected, and its regions lie on the wrong side."""
    path = f"{sources[0]['image_dir']}/1.png"
    data = Image.Exif()
    if exif is not None:
        data[0x0112] = exif
    Image.new("RGB", (32, 32) if exif is None else (SIZE, SIZE)).save(path, exif=data)
    what = (
        "1.png is 32 x 32, but annotation 1 of .* speaks of one of 64 x 64"
        if exif is None
        else "is turned by its EXIF"
    )

    assert load(sources)[1]["skipped"].total() == 2
    whole = Examples([(load(sources[:1]).sources[0])])
    with pytest.raises(BrokenSample, match=what):
        whole[1]


def test_the_collator_takes_them(sources, load):
    _, processor = tiny_deem()

    batch = DocumentCollator(processor)(opened(load(sources)))

    assert batch["region_masks"].shape == (5, 1, SIZE, SIZE)
    assert batch["region_masks"][1].sum() == 10 * 20
