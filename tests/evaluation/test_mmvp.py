"""MMVP's import: lmms-eval's task reads it offline, with the labels that the pictures show."""

import csv

import datasets
import pytest
from lmms_eval.tasks.mmvp import utils as stock

from deem_plugin.evaluation.mmvp import CORRECTIONS, DATASET, NUM_QUESTIONS, import_mmvp
from deem_plugin.evaluation.questions import QuestionDataError

from .helpers import write_mmvp_files


@pytest.fixture
def source(tmp_path):
    return write_mmvp_files(tmp_path / "mmvp")


def load(cache):
    return datasets.load_dataset(DATASET, cache_dir=str(cache), split="train")


def rewrite(source, change):
    with (source / "Questions.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    change(lines)
    with (source / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def test_questions_come_back_under_the_hub_name_with_corrected_answers(source, tmp_path):
    assert import_mmvp(source, tmp_path / "cache") == 4

    rows = load(tmp_path / "cache")

    assert rows["Index"] == list(range(1, NUM_QUESTIONS + 1))
    published = ["(a)", "(b)"] * (NUM_QUESTIONS // 2)
    assert rows["Published Answer"] == published
    expected = [CORRECTIONS.get(number, (answer,))[0] for number, answer in enumerate(published, start=1)]
    assert rows["Correct Answer"] == expected
    assert rows[298]["image"].size == (8, 8)


def test_the_stock_task_understands_the_rows(source, tmp_path):
    """Its prompt, its target, and both its scores for a model that always answers A, and for one that is right."""
    import_mmvp(source, tmp_path / "cache")
    docs = list(load(tmp_path / "cache"))

    assert (
        stock.mmvp_doc_to_text(docs[0], {"post_prompt": "\nLetter."})
        == "Is it open or shut?\nA. Open\nB. Shut\nLetter."
    )
    assert [stock.mmvp_doc_to_target(doc) for doc in docs[:2]] == ["A", "B"]
    always_a = [stock.mmvp_process_results(doc, ["A"]) for doc in docs]
    right = [stock.mmvp_process_results(doc, [stock.mmvp_doc_to_target(doc)]) for doc in docs]
    for rows, accuracy, pairs in ((always_a, 0.5, 0.0), (right, 1.0, 1.0)):
        assert stock.mmvp_aggregate_results([row["mmvp_accuracy"] for row in rows]) == accuracy
        assert stock.mmvp_aggregate_pair_results([row["mmvp_pair_accuracy"] for row in rows]) == pairs


def test_a_copy_that_is_corrected_already_stays_right(source, tmp_path):
    def correct(lines):
        for number, (answer, _) in CORRECTIONS.items():
            lines[number][3] = answer

    rewrite(source, correct)

    assert import_mmvp(source, tmp_path / "cache") == 0
    assert load(tmp_path / "cache")["Correct Answer"][98:100] == ["(b)", "(a)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(), "has 299 questions; MMVP has 300"),
        (lambda lines: lines.pop(5), r"question 5: got \['6'"),
        (lambda lines: lines[7].__setitem__(3, "(c)"), r"question 7: got .*expected 7, a question.*\(a\) or \(b\)"),
        (lambda lines: lines[0].pop(), "has the columns .*expected Index, Question, Options, Correct Answer"),
        (lambda lines: lines[99].__setitem__(1, "Is it a cat?"), "Question 99 is 'Is it a cat.'; .*'tusks'"),
        (lambda lines: lines.clear(), r"has the columns \[\]"),
    ],
)
def test_questions_that_are_not_mmvp_are_refused(source, tmp_path, change, message):
    rewrite(source, change)

    with pytest.raises(QuestionDataError, match=message):
        import_mmvp(source, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_missing_and_unreadable_images_are_counted_and_named(source, tmp_path):
    (source / "MMVP Images" / "7.jpg").unlink()
    (source / "MMVP Images" / "9.jpg").write_bytes(b"no image")

    with pytest.raises(
        QuestionDataError, match=r"1 of 300 images are missing \(the first: 7.jpg\) and 1 of 300 .*: 9.jpg"
    ):
        import_mmvp(source, tmp_path / "cache")
    with pytest.raises(QuestionDataError, match="Cannot read .*gone.*Give the folder of MMVP as published"):
        import_mmvp(tmp_path / "gone", tmp_path / "cache")
