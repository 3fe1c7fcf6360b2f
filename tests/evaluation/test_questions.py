"""Question files: what is written is what is read, bad rows leave nothing behind, missing data says what to do."""

import io
import json
import os
import random

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deem_plugin.evaluation import details, questions, robustvqa
from deem_plugin.evaluation.questions import QuestionDataError

from ..tiny import tiny_image
from .helpers import details_rows, robustvqa_rows


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def read(path):
    return datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))


def test_rows_come_back_as_they_were_with_their_images_inside(tmp_path):
    rows = robustvqa_rows()
    tiny_image(0).save(tmp_path / "0.png")
    rows[0]["image"], rows[1]["image"] = tmp_path / "0.png", png(tiny_image(0))

    path = robustvqa.write_robustvqa(rows, tmp_path / "out" / "robustvqa_a.parquet")
    (tmp_path / "0.png").unlink()
    written = read(path)

    assert written.column_names == list(robustvqa.COLUMNS)
    for index, row in enumerate(written):
        expected = rows[index]
        assert {key: row[key] for key in row if key != "image"} == {k: expected[k] for k in row if k != "image"}
        assert row["image"].convert("RGB").tobytes() == tiny_image(index // 2).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3].update(answer="maybe"), "Row 3 has the answer 'maybe'; expected 'yes' or 'no'"),
        (lambda rows: rows[2].pop("caption"), r"Row 2 lacks \['caption'\]"),
        (lambda rows: rows[2].update(captoin="x"), r"Row 2 has the unknown columns \['captoin'\]"),
        (lambda rows: rows[4].update(question_id=rows[0]["question_id"]), "Row 4 has the question_id"),
        (lambda rows: rows.append({**rows[0], "question_id": "new"}), "Row 6 asks about the image 'a-0' again"),
        (lambda rows: rows[5].update(image=b"no image"), "Row 5: the given bytes is no readable image"),
        (lambda rows: rows[5].update(image="gone.png"), "Row 5: gone.png is no readable image"),
        (lambda rows: rows.clear(), "not one question"),
    ],
)
def test_a_bad_row_is_named_and_leaves_no_file(tmp_path, change, message):
    rows = robustvqa_rows()
    change(rows)

    with pytest.raises(QuestionDataError, match=message):
        robustvqa.write_robustvqa(rows, tmp_path / "robustvqa_a.parquet")

    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_earlier_file_as_it_was(tmp_path):
    path = robustvqa.write_robustvqa(robustvqa_rows(), tmp_path / "robustvqa_a.parquet")
    before = path.read_bytes()

    with pytest.raises(QuestionDataError):
        robustvqa.write_robustvqa([{**robustvqa_rows()[0], "answer": "perhaps"}], path)

    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_next_write_clears_what_a_killed_one_left(tmp_path):
    (tmp_path / ".details.parquet.partial").write_bytes(b"half a file")

    path = details.write_details(details_rows(), tmp_path / "details.parquet")

    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_output_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(QuestionDataError, match="Cannot write .*file/robustvqa_a.parquet.*may write to"):
        robustvqa.write_robustvqa(robustvqa_rows(), tmp_path / "file" / "robustvqa_a.parquet")


def test_data_is_looked_for_where_the_environment_says(tmp_path, monkeypatch):
    for variable in ("DEEM_ROBUSTVQA", "DEEM_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = [tmp_path / "cache" / "deem" / "robustvqa", tmp_path / "home" / "robustvqa", tmp_path / "own"]
    for folder in folders:
        robustvqa.write_robustvqa(robustvqa_rows(), folder / "robustvqa_a.parquet")

    found = [robustvqa.robustvqa_file("a")]
    monkeypatch.setenv("DEEM_HOME", str(tmp_path / "home"))
    found.append(robustvqa.robustvqa_file("a"))
    monkeypatch.setenv("DEEM_ROBUSTVQA", str(tmp_path / "own"))
    found.append(robustvqa.robustvqa_file("a"))

    assert found == [str(folder / "robustvqa_a.parquet") for folder in folders]


def test_missing_data_says_where_it_was_looked_for_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEM_ROBUSTVQA", str(tmp_path))
    monkeypatch.setenv("DEEM_DETAILS", str(tmp_path))

    with pytest.raises(QuestionDataError, match=f"not found: {tmp_path}/robustvqa_v2.parquet.*DEEM_ROBUSTVQA"):
        robustvqa.robustvqa_file("v2")
    with pytest.raises(QuestionDataError, match=f"not found: {tmp_path}/details.parquet.*DEEM_DETAILS"):
        details.details_file()
    with pytest.raises(ValueError, match="no split 'b'; choose one of a, r, v2"):
        robustvqa.robustvqa_file("b")


def test_a_truncated_file_and_one_with_other_columns_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEM_ROBUSTVQA", str(tmp_path))
    path = robustvqa.write_robustvqa(robustvqa_rows(), tmp_path / "robustvqa_a.parquet")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(QuestionDataError, match="no readable parquet file"):
        robustvqa.robustvqa_file("a")

    details.write_details(details_rows(), path)
    with pytest.raises(QuestionDataError, match=r"lacks the columns \['caption', 'source'\]"):
        robustvqa.robustvqa_file("a")


def test_content_hash_tells_data_apart_and_not_the_way_it_is_stored(tmp_path):
    rows = robustvqa_rows()
    path = robustvqa.write_robustvqa(rows, tmp_path / "robustvqa_a.parquet")
    first = questions.content_hash(path)

    stored_otherwise = tmp_path / "other.parquet"
    table = pq.read_table(path)
    pq.write_table(table.select(table.column_names[::-1]), stored_otherwise, compression="none", row_group_size=1)
    assert stored_otherwise.stat().st_size != path.stat().st_size
    assert questions.content_hash(stored_otherwise) == first

    seen = {first}
    for change in ({"image": tiny_image(9)}, {"caption": "ostrich"}, {"answer": "no"}, {"question_id": "other"}):
        # In place: the same path, found by name and read anew.
        robustvqa.write_robustvqa([{**rows[0], **change}, *rows[1:]], path)
        seen.add(questions.content_hash(path))
    robustvqa.write_robustvqa(rows[:-1], path)
    assert len(seen | {questions.content_hash(path)}) == 6


def test_content_hash_of_a_damaged_file_is_an_error(tmp_path):
    path = robustvqa.write_robustvqa(robustvqa_rows(), tmp_path / "robustvqa_a.parquet")
    path.write_bytes(b"\0" * 200 + path.read_bytes()[200:])
    with pytest.raises(QuestionDataError, match="robustvqa_a.parquet is damaged (?s:.*)Write it anew"):
        questions.content_hash(path)


def test_questions_are_the_authors_in_the_order_of_their_shuffle(shared_dir):
    """F6: the question list that the authors' code makes, for the three sets that RobustVQA has. Ours keeps pairs."""
    made_up = json.loads((shared_dir / "parity" / "f6_robustvqa_test.json").read_text())
    official = json.loads((shared_dir / "parity" / "f6_questions.json").read_text())
    for split in robustvqa.SPLITS:
        ours = [
            (image["file_name"], robustvqa.doc_to_text({"caption": image[caption]}), answer)
            for image in made_up[f"imagenet_{split}"]
            for caption, answer in (("gt_caption", "yes"), ("error_caption", "no"))
        ]
        random.Random(official["shuffle_seed"]).shuffle(ours)
        assert ours == [(row["file_name"], row["question"], row["answer"]) for row in official["datasets"][split]]
