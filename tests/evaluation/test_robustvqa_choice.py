"""RobustVQA's other wordings: a choice in both orders, read strictly, with its order bias; and corrected spelling."""

import json

import datasets
import pytest

from deem_plugin.evaluation import robustvqa, yes_no
from deem_plugin.evaluation import robustvqa_choice as choice

from .helpers import robustvqa_rows


@pytest.fixture
def docs():
    rows = [{name: value for name, value in row.items() if name != "image"} for row in robustvqa_rows(images=4)]
    return list(choice.as_choices(datasets.Dataset.from_list(rows)))


def test_each_picture_is_asked_about_in_both_orders(docs):
    assert len(docs) == 8 and len({doc["question_id"] for doc in docs}) == 8
    for first, second in zip(docs[::2], docs[1::2], strict=True):
        assert first["image_id"] == second["image_id"]
        assert (first["first"], first["second"], first["answer"]) == ("tabby", "wall_clock", "first")
        assert (second["first"], second["second"], second["answer"]) == ("wall_clock", "tabby", "second")
        assert first["truth"] == second["truth"] == "tabby"


def test_the_choice_is_worded_as_the_authors_word_it(shared_dir):
    """F6's sets s and d, whose choices the authors shuffle."""
    official = json.loads((shared_dir / "parity" / "f6_questions.json").read_text())["datasets"]
    for entry in official["s"] + official["d"]:
        first, second = entry["question"].split("[")[1].rstrip("]").split(", ")
        assert choice.choice_text({"first": first, "second": second}) == entry["question"]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("tabby", "first"),
        ("Wall clock.", "second"),
        ("The main object is a wall_clock", "second"),
        ("a tabby, not a wall clock", "unknown"),
        ("a clock", "unknown"),
        ("tabbys", "unknown"),
        ("", "unknown"),
    ],
)
def test_an_answer_has_to_name_one_of_the_two(answer, read):
    assert choice.parse_choice(answer, "tabby", "wall_clock") == read


def test_a_name_within_the_other_counts_where_it_stands_apart():
    assert choice.parse_choice("a sea slug", "slug", "sea_slug") == "second"
    assert choice.parse_choice("a slug", "slug", "sea_slug") == "first"


def test_a_model_that_favours_a_place_shows_in_the_order_bias_and_not_in_the_accuracy(docs):
    def score(answers):
        rows = [choice.choice_results(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
        rows = [row["robustvqa_choice_accuracy"] for row in rows]
        return yes_no.accuracy(rows), yes_no.pair_accuracy(rows), choice.order_bias(rows)

    assert score([doc["first"] for doc in docs]) == (0.5, 0, 1)
    assert score([doc["second"] for doc in docs]) == (0.5, 0, -1)
    assert score([doc["truth"] for doc in docs]) == (1, 1, 0)


def test_metric_rows_carry_ids_and_only_the_accuracy_a_score(docs):
    rows = choice.choice_results(docs[0], ["tabby"])
    assert set(rows) == {f"robustvqa_choice_{metric}" for metric in choice.METRICS}
    assert [name for name, row in rows.items() if "score" in row] == ["robustvqa_choice_accuracy"]
    assert {(row["question_id"], row["image_id"]) for row in rows.values()} == {("a-0#first", "a-0")}


def test_the_corrected_wording_has_neither_the_misspelling_nor_underscores():
    text = robustvqa.reworded_text({"caption": "wall_clock"})
    assert text == "Is wall clock the main object in this image? Please answer yes or no."
