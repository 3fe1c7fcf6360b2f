"""Published data sets of regions, named by a recipe: one table, everything left out is counted by source."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deem_plugin.data.document_collator import DocumentCollator
from deem_plugin.data.region_sets import load_regions
from deem_plugin.data.region_sources import PART_QUESTION, iter_instances, iter_referring, iter_vcr
from deem_plugin.data.regions import RegionDocuments, RegionError

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
    return lambda sources, on_error="skip": load_regions(sources, on_error, tmp_path / "cache")


def texts(document):
    return [part["text"] for part in document["parts"] if part["text"]]


def test_all_formats_are_one_table_and_what_is_left_out_is_said_by_source(sources, load, caplog):
    with caplog.at_level(logging.INFO, logger="deem_plugin"):
        table = load(sources)

    assert [texts(document)[-1] for document in table] == ["dog head"] * 2 + ["left dog", "a red car", "Nobody."]
    left_out = {"of a crowd": 1, "without image": 1, "with an empty region": 1}
    assert list(table.dropped.values()) == [left_out, {}, {}, {}]
    assert f"Of coco {sources[0]['annotations']}, 3 samples are left out: 1 of a crowd, " in caplog.text
    assert "5 questions about regions" in caplog.text


def test_documents_are_those_of_the_readers(sources, load):
    table = load(sources)
    pictures = sources[0]["image_dir"]
    readers = [
        iter_instances(sources[0]["annotations"], PART_QUESTION),
        iter_referring(sources[1]["instances"], sources[1]["refs"], "train"),
        iter_vcr(sources[3]["path"], sources[3]["metadata_dir"]),
    ]
    expected = [document.columns() for reader in readers for document in RegionDocuments(reader, pictures, "skip")]

    for ours, theirs in zip([table[0], table[1], table[2], table[4]], expected, strict=True):
        assert ours["learn_from"] == theirs["learn_from"] and texts(ours) == texts(theirs)
        for part, other in zip(ours["parts"], theirs["parts"], strict=True):
            for name in ("image", "mask"):
                same = part[name] is other[name] is None or np.array_equal(*map(np.asarray, (part[name], other[name])))
                assert same, name


def test_a_second_run_reads_the_table_of_the_first_and_knows_what_it_left_out(sources, load, monkeypatch):
    first = load(sources)
    monkeypatch.setattr("deem_plugin.data.region_sets.READERS", {name: None for name in ("coco", "refcoco")})
    monkeypatch.setattr("deem_plugin.data.region_sets._check_source", lambda source, where: None)

    again = load(sources)

    assert again.dropped == first.dropped and len(again) == len(first)
    assert [texts(document) for document in again] == [texts(document) for document in first]


def test_a_changed_file_is_read_anew(sources, load):
    assert len(load(sources[:1])) == 2
    path = sources[0]["annotations"]
    content = json.loads(open(path).read())
    content["annotations"] = content["annotations"][:1]
    open(path, "w").write(json.dumps(content))

    assert len(load(sources[:1])) == 1


def test_it_travels_to_the_workers_of_a_data_loader(sources, load):
    table = load(sources)

    assert texts(pickle.loads(pickle.dumps(table))[0]) == texts(table[0])


def test_what_is_wrong_raises_by_its_name(sources, load):
    with pytest.raises(RegionError, match="annotation 3 of .* belongs to image 7"):
        load(sources, "raise")
    with pytest.raises(ValueError, match="`on_error` is 'ignore'; expected one of raise, skip"):
        load(sources, "ignore")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "voc"}, r"`data.sources\[0\]` is .*; expected a mapping with `format`, one of coco, refcoco, vis"),
        ({"split": "train"}, r"unknown keys \['split'\]; those of the format coco are format, image_dir, annotations"),
        ({"image_dir": None}, r"`data.sources\[0\]` lacks image_dir; the format coco needs image_dir, annotations"),
        ({"annotations": "nowhere.json"}, "The `annotations` of .*nowhere.json, does not exist"),
    ],
)
def test_a_source_that_is_not_as_described_is_refused(sources, load, change, message):
    source = {name: value for name, value in (sources[0] | change).items() if value is not None}

    with pytest.raises(ValueError, match=message):
        load([source])


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_folder_without_the_pictures_is_refused(sources, load, tmp_path, on_error):
    with pytest.raises(ValueError, match=r"0.png of .* does not exist. Set `image_dir`"):
        load([sources[0] | {"image_dir": str(tmp_path)}], on_error)


def test_a_lost_picture_is_counted(sources, load):
    Path(sources[0]["image_dir"], "1.png").unlink()

    table = load(sources[:1])

    assert len(table) == 1 and table.dropped[f"coco {sources[0]['annotations']}"]["without its picture"] == 1


def test_nothing_left_and_a_broken_file_are_errors(sources, load, tmp_path):
    with pytest.raises(
        ValueError, match="The source .*'split': 'trian'.* has no sample. Check its files, and its `split`"
    ):
        load([sources[1] | {"split": "trian"}])
    content = json.loads(open(sources[0]["annotations"]).read())
    broken = write_json(tmp_path / "bad.json", content | {"annotations": content["annotations"][2:]})
    with pytest.raises(ValueError, match="No sample of `data.sources` is left: .*of a crowd"):
        load([sources[0] | {"annotations": broken}])
    (tmp_path / "broken.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"broken.json is no valid JSON .* broken or cut off"):
        load([sources[0] | {"annotations": str(tmp_path / "broken.json")}])


def test_a_picture_that_was_resized_is_refused_when_it_is_opened(sources, load):
    Image.new("RGB", (32, 32)).save(f"{sources[0]['image_dir']}/1.png")

    with pytest.raises(ValueError, match="1.png is 32 x 32, but annotation 1 of .* speaks of one of 64 x 64"):
        load(sources)[1]


def test_the_collator_takes_them(sources, load):
    _, processor = tiny_deem()

    batch = DocumentCollator(processor)(list(load(sources)))

    assert batch["region_masks"].shape == (5, 1, SIZE, SIZE)
    assert batch["region_masks"][1].sum() == 10 * 20
