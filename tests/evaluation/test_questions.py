"""Question files: what is written is what is read, bad rows leave nothing behind, missing data says what to do."""

import io
import json
import math
import os
import random

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deem_plugin.evaluation import details, pope_task, questions, robustvqa
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


def test_metric_rows_carry_ids_and_only_the_accuracy_a_score():
    doc = details_rows()[0]

    rows = details.process_results(doc, ["Yes, it is."])

    assert set(rows) == {f"deem_details_{metric}" for metric in details.METRICS}
    for name, row in rows.items():
        assert (row["question_id"], row["image_id"], row["category"]) == ("0-left-yes", "0", "left")
        assert ("score" in row) == (name == "deem_details_accuracy") and row["is_correct"]
    assert rows["deem_details_accuracy"]["score"] == 1.0


def answered(pairs: list[tuple[str, str]], images: str = "") -> list[dict]:
    """Makes the rows of predictions and targets, of one image each or of the images named by letters."""
    docs = [
        {"question_id": str(index), "image_id": image, "answer": target}
        for index, (image, (_, target)) in enumerate(zip(images or map(str, range(len(pairs))), pairs, strict=True))
    ]
    return [
        robustvqa.process_results(doc, [prediction])["robustvqa_accuracy"]
        for doc, (prediction, _) in zip(docs, pairs, strict=True)
    ]


def test_scores_follow_their_definitions_and_count_unknown_as_wrong():
    rows = answered([("yes", "yes"), ("maybe", "yes"), ("no", "yes"), ("yes", "no"), ("no", "no")])

    assert questions.accuracy(rows) == pytest.approx(2 / 5)
    assert questions.precision(rows) == pytest.approx(1 / 2)  # 1 of the 2 yes predictions
    assert questions.recall(rows) == pytest.approx(1 / 3)  # 1 of the 3 yes targets
    assert questions.f1(rows) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert questions.yes_ratio(rows) == pytest.approx(2 / 5)
    assert questions.unknown_rate(rows) == pytest.approx(1 / 5)


def test_a_pair_counts_when_both_answers_are_right_and_half_a_pair_not_at_all():
    rows = answered([("yes", "yes"), ("no", "no"), ("yes", "yes"), ("yes", "no"), ("yes", "yes")], "aabbc")

    assert questions.pair_accuracy(rows) == pytest.approx(1 / 2)


def test_always_yes_scores_half_but_no_pair():
    rows = answered([("yes", "yes"), ("yes", "no")] * 4, "aabbccdd")

    assert (questions.accuracy(rows), questions.pair_accuracy(rows), questions.yes_ratio(rows)) == (0.5, 0.0, 1.0)
    assert (questions.recall(rows), questions.recall(answered([("no", "yes")]))) == (1.0, 0.0)


def likelihoods(pairs: list[tuple[float, str]]) -> list[dict]:
    """Makes the rows of margins, log P(yes) - log P(no), and targets; lmms-eval hands over costs."""
    return [
        robustvqa.process_likelihoods(
            {"question_id": str(index), "image_id": str(index), "answer": target}, [(3.0 - margin, True), (3.0, False)]
        )["robustvqa_auc"]
        for index, (margin, target) in enumerate(pairs)
    ]


def test_the_likelier_of_yes_and_no_is_the_answer_and_no_preference_is_a_no():
    rows = likelihoods([(1.25, "yes"), (-0.5, "yes"), (0.0, "no")])

    assert [row["prediction"] for row in rows] == ["yes", "no", "no"]
    assert [row["margin"] for row in rows] == [1.25, -0.5, 0.0]
    assert questions.accuracy(rows) == pytest.approx(2 / 3)


def test_auc_is_the_share_of_pairs_in_the_right_order_wherever_the_threshold_lies():
    targets = ("yes", "yes", "no", "no")

    def auc(*margins):
        return questions.auc(likelihoods(list(zip(margins, targets, strict=True))))

    assert auc(-1.0, -3.0, -4.0, -5.0) == 1.0  # every answer a no, accuracy one half
    assert auc(2.0, -1.0, 1.0, -2.0) == pytest.approx(3 / 4)  # of four pairs only (-1, 1) is wrong
    assert auc(0.0, 0.0, 0.0, 0.0) == 0.5
    assert math.isnan(questions.auc(likelihoods([(1.0, "yes"), (2.0, "yes")])))


def test_pope_tells_the_models_own_yes_ratio_and_the_answers_it_could_not_read():
    docs = [
        {"question_id": str(number), "category": "random", "image_source": "COCO_1", "answer": answer}
        for number, answer in enumerate(("yes", "no", "yes", "no"))
    ]
    answers = ["Yes, there is.", "yes", "I cannot tell", "No."]
    rows = [pope_task.process_results(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]

    def metric(name, aggregate):
        return aggregate([row[f"deem_pope_{name}"] for row in rows])

    assert metric("accuracy", questions.accuracy) == 0.5
    assert metric("yes_ratio", questions.yes_ratio) == 0.5
    assert metric("unknown_rate", questions.unknown_rate) == 0.25
    assert metric("precision", questions.precision) == metric("recall", questions.recall) == 0.5
    first = rows[0]["deem_pope_accuracy"]
    assert (first["question_id"], first["image_id"], first["score"]) == ("random-0", "COCO_1", 1.0)
    by_likelihood = pope_task.process_likelihoods(docs[0], [(0.5, True), (2.0, False)])
    assert by_likelihood["deem_pope_auc"]["margin"] == 1.5 and "deem_pope_unknown_rate" not in by_likelihood


def test_categories_are_scored_apart_and_pair_within_one():
    docs = details_rows(images=1)  # left yes, left no, big yes, big no
    answers = ["yes", "no", "yes", "yes"]
    rows = [
        details.process_results(doc, [answer])["deem_details_accuracy"]
        for doc, answer in zip(docs, answers, strict=True)
    ]

    assert questions.accuracy_by_category(rows) == {"big": 0.5, "left": 1.0}
    assert questions.pair_accuracy(rows) == 0.5
