"""POPE's import: what lmms-eval's tasks load offline equals the files, and a failed import changes nothing."""

import json
import shutil

import datasets
import pytest
from PIL import Image

from deem_plugin.evaluation.pope import CATEGORIES, import_pope
from deem_plugin.evaluation.questions import QuestionDataError

from .helpers import write_pope_files

HUB_NAME = "lmms-lab-encoder/POPE"


@pytest.fixture
def source(tmp_path):
    return write_pope_files(tmp_path / "pope")


def load(cache, config=None):
    return datasets.load_dataset(HUB_NAME, config, cache_dir=str(cache))


def test_questions_come_back_under_the_hub_name_in_both_configurations(source, tmp_path):
    cache = tmp_path / "cache"

    counts = import_pope(source, source / "images", cache)
    pooled, full = load(cache), load(cache, "Full")

    assert counts == dict.fromkeys(CATEGORIES, 4)
    assert list(pooled) == ["test"] and sorted(full) == sorted(CATEGORIES)
    lines = [json.loads(line) for line in (source / "coco_pope_popular.json").read_text().splitlines()]
    for row, line in zip(full["popular"], lines, strict=True):
        assert row["question_id"] == str(line["question_id"])
        assert (row["question"], row["answer"], row["category"]) == (line["text"], line["label"], "popular")
        assert row["image_source"] + ".jpg" == line["image"]
        assert row["image"].tobytes() == Image.open(source / "images" / line["image"]).tobytes()
    together = [(row["category"], row["question_id"]) for row in pooled["test"].remove_columns("image")]
    assert together == [(category, str(number)) for category in CATEGORIES for number in range(1, 5)]


def test_an_import_replaces_the_one_before(source, tmp_path):
    cache = tmp_path / "cache"
    import_pope(source, source / "images", cache)
    shutil.rmtree(source)
    write_pope_files(source, images=3)

    import_pope(source, source / "images", cache)

    assert load(cache)["test"].num_rows == 3 * 6


def test_parquet_files_give_the_same_as_the_json_they_hold(source, tmp_path):
    import_pope(source, source / "images", tmp_path / "first")
    files = []
    for category, split in load(tmp_path / "first", "Full").items():
        files.append(tmp_path / "parquet" / f"{category}.parquet")
        split.to_parquet(files[-1])

    counts = import_pope(files, cache_dir=tmp_path / "second")

    assert counts == dict.fromkeys(CATEGORIES, 4)
    assert (
        load(tmp_path / "second", "Full")["random"].to_list() == load(tmp_path / "first", "Full")["random"].to_list()
    )
    with pytest.raises(QuestionDataError, match="comes twice"):
        import_pope([*files, files[0]], cache_dir=tmp_path / "third")


@pytest.mark.parametrize("damage", ["missing", "corrupt", "truncated"])
def test_images_that_cannot_be_read_are_counted_and_named_and_leave_no_cache(source, tmp_path, damage):
    image = source / "images" / "COCO_1.jpg"
    if damage == "missing":
        image.unlink()
    else:
        image.write_bytes(b"no image" if damage == "corrupt" else image.read_bytes()[:-200])
    what = "missing" if damage == "missing" else "unreadable"

    with pytest.raises(QuestionDataError, match=rf"1 of 2 images are {what} \(the first: COCO_1.jpg\)"):
        import_pope(source, source / "images", tmp_path / "cache")

    assert not (tmp_path / "cache").exists()


def test_a_failed_import_keeps_the_earlier_one(source, tmp_path):
    cache = tmp_path / "cache"
    import_pope(source, source / "images", cache)
    import_again = load(cache, "Full")["random"].to_parquet(tmp_path / "random.parquet")
    assert import_again
    table = datasets.Dataset.from_parquet(str(tmp_path / "random.parquet"), cache_dir=str(tmp_path / "other"))
    # The last row is bad, so that the import fails after it has written the others.
    answers = [*table["answer"][:-1], "perhaps"]
    table.remove_columns("answer").add_column("answer", answers).to_parquet(tmp_path / "random.parquet")

    with pytest.raises(QuestionDataError, match="the answer is 'perhaps'; expected yes or no"):
        import_pope(tmp_path / "random.parquet", cache_dir=cache)

    assert load(cache)["test"].num_rows == 12
    assert not list(cache.glob(".*partial"))


def test_what_is_not_pope_is_refused_with_what_is_expected(source, tmp_path):
    images, cache = source / "images", tmp_path / "cache"
    with pytest.raises(QuestionDataError, match="The image folder is None"):
        import_pope(source, cache_dir=cache)
    with pytest.raises(QuestionDataError, match="No such file or folder: .*gone"):
        import_pope(tmp_path / "gone", images, cache)
    with pytest.raises(QuestionDataError, match="holds neither coco_pope_adversarial.json.* nor parquet"):
        import_pope(images, images, cache)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(QuestionDataError, match="broken.parquet is no readable parquet file"):
        import_pope(tmp_path / "broken.parquet", cache_dir=cache)
    with pytest.raises(QuestionDataError, match="`image_dir` goes with the JSON question files"):
        import_pope(tmp_path / "broken.parquet", images, cache)
    (source / "coco_pope_random.json").write_text('{"question_id": 1}')
    with pytest.raises(
        QuestionDataError, match="coco_pope_random.json, line 1: expected a JSON object with question_id"
    ):
        import_pope(source, images, cache)
    (source / "coco_pope_random.json").unlink()
    with pytest.raises(QuestionDataError, match="lacks coco_pope_random.json"):
        import_pope(source, images, cache)


def test_an_unwritable_cache_is_an_error_that_names_it(source, tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(QuestionDataError, match="Cannot write the datasets cache .*file"):
        import_pope(source, source / "images", tmp_path / "file")


@pytest.mark.slow
def test_all_official_questions_are_imported(shared_dir, tmp_path):
    """9,000 questions on 500 stand-in pictures."""
    folder = shared_dir / "data" / "pope"
    names = {json.loads(line)["image"] for line in (folder / "coco_pope_random.json").read_text().splitlines()}
    (tmp_path / "images").mkdir()
    for index, name in enumerate(sorted(names)):
        Image.new("RGB", (8, 8), (index % 256, 0, 0)).save(tmp_path / "images" / name)

    assert import_pope(folder, tmp_path / "images", tmp_path / "cache") == dict.fromkeys(CATEGORIES, 3000)
    assert len(names) == 500
    assert load(tmp_path / "cache")["test"].num_rows == 9000
