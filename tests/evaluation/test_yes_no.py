"""Strict parsing of yes and no, and the scores against their definitions."""

import json
import math

import pytest

from deem_plugin.evaluation import details, pope_task, robustvqa, yes_no
from deem_plugin.evaluation.yes_no import parse_yes_no

from .helpers import details_rows


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        (" YES!\n", "yes"),
        ("Yes it is", "yes"),
        ("Yes, there is no doubt", "yes"),
        ("[yes]", "yes"),
        ("It is a yes", "yes"),
        ("The answer is: yes", "yes"),
        ("The correct answer is **Yes**.", "yes"),
        ("No, it is not", "no"),
        ("No dog is in the image.", "no"),
        ("'no'", "no"),
        ("answer: no", "no"),
        ("I would say no because it is a cat", "no"),
        ("The answer is no it is not", "no"),
        ("There is no dog, so no.", "no"),
        ("The answer is no.\nASSISTANT", "no"),
        ("yes or no", "unknown"),
        ("Yes/No", "unknown"),
        ("no and yes", "unknown"),
        ("yes\nno", "unknown"),
        ("This is a cat", "unknown"),
        ("There is no dog in the image", "unknown"),
        ("No idea", "unknown"),
        ("I know his eyes", "unknown"),
        ("nope", "unknown"),
        ("yes_man", "unknown"),
        ("not sure", "unknown"),
        ("", "unknown"),
        (" . ", "unknown"),
    ],
)
def test_only_a_clear_verdict_is_read_as_one(answer, verdict):
    assert parse_yes_no(answer) == verdict


def test_the_verdict_equals_the_official_one_but_where_that_is_wrong(shared_dir):
    """F6: forty answers as the authors' code scores them. Strict parsing differs on these, and on no others."""
    cases = json.loads((shared_dir / "parity" / "f6_scoring.json").read_text())["cases"]
    cases = [case for case in cases if case["gt"] in ("yes", "no")]
    differs = {
        case["answer"] for case in cases if (parse_yes_no(case["answer"]) == case["gt"]) != case["correct_extract"]
    }
    missed_by_the_official_code = {"The answer is: yes", "Yes it is", "answer: no", "This is yes the object"}
    contradictory = {"yes\nno", "yes or no", "no and yes"}

    assert len(cases) == 33
    assert differs == missed_by_the_official_code | contradictory


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

    assert yes_no.accuracy(rows) == pytest.approx(2 / 5)
    assert yes_no.precision(rows) == pytest.approx(1 / 2)  # 1 of the 2 yes predictions
    assert yes_no.recall(rows) == pytest.approx(1 / 3)  # 1 of the 3 yes targets
    assert yes_no.f1(rows) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert yes_no.yes_ratio(rows) == pytest.approx(2 / 5)
    assert yes_no.unknown_rate(rows) == pytest.approx(1 / 5)


def test_a_pair_counts_when_both_answers_are_right_and_half_a_pair_not_at_all():
    rows = answered([("yes", "yes"), ("no", "no"), ("yes", "yes"), ("yes", "no"), ("yes", "yes")], "aabbc")

    assert yes_no.pair_accuracy(rows) == pytest.approx(1 / 2)


def test_always_yes_scores_half_but_no_pair():
    rows = answered([("yes", "yes"), ("yes", "no")] * 4, "aabbccdd")

    assert (yes_no.accuracy(rows), yes_no.pair_accuracy(rows), yes_no.yes_ratio(rows)) == (0.5, 0.0, 1.0)
    assert (yes_no.recall(rows), yes_no.recall(answered([("no", "yes")]))) == (1.0, 0.0)


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
    assert yes_no.accuracy(rows) == pytest.approx(2 / 3)


def test_auc_is_the_share_of_pairs_in_the_right_order_wherever_the_threshold_lies():
    targets = ("yes", "yes", "no", "no")

    def auc(*margins):
        return yes_no.auc(likelihoods(list(zip(margins, targets, strict=True))))

    assert auc(-1.0, -3.0, -4.0, -5.0) == 1.0  # every answer a no, accuracy one half
    assert auc(2.0, -1.0, 1.0, -2.0) == pytest.approx(3 / 4)  # of four pairs only (-1, 1) is wrong
    assert auc(0.0, 0.0, 0.0, 0.0) == 0.5
    assert math.isnan(yes_no.auc(likelihoods([(1.0, "yes"), (2.0, "yes")])))


def test_pope_tells_the_models_own_yes_ratio_and_the_answers_it_could_not_read():
    docs = [
        {"question_id": str(number), "category": "random", "image_source": "COCO_1", "answer": answer}
        for number, answer in enumerate(("yes", "no", "yes", "no"))
    ]
    answers = ["Yes, there is.", "yes", "I cannot tell", "No."]
    rows = [pope_task.process_results(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]

    def metric(name, aggregate):
        return aggregate([row[f"deem_pope_{name}"] for row in rows])

    assert metric("accuracy", yes_no.accuracy) == 0.5
    assert metric("yes_ratio", yes_no.yes_ratio) == 0.5
    assert metric("unknown_rate", yes_no.unknown_rate) == 0.25
    assert metric("precision", yes_no.precision) == metric("recall", yes_no.recall) == 0.5
    first = rows[0]["deem_pope_accuracy"]
    assert (first["question_id"], first["image_id"], first["score"]) == ("random-0", "COCO_1", 1.0)
    by_likelihood = pope_task.process_likelihoods(docs[0], [(0.5, True), "(2.0, False)"])
    assert by_likelihood["deem_pope_auc"]["margin"] == 1.5 and "deem_pope_unknown_rate" not in by_likelihood


def test_categories_are_scored_apart_and_pair_within_one():
    docs = details_rows(images=1)  # left yes, left no, big yes, big no
    answers = ["yes", "no", "yes", "yes"]
    rows = [
        details.process_results(doc, [answer])["deem_details_accuracy"]
        for doc, answer in zip(docs, answers, strict=True)
    ]

    assert yes_no.accuracy_by_category(rows) == {"big": 0.5, "left": 1.0}
    assert yes_no.pair_accuracy(rows) == 0.5


def test_likelihoods_may_be_zero_but_not_unknown():
    doc = {"question_id": "a-1", "answer": "yes"}

    row = yes_no.score_likelihoods(doc, ["(1.5, True)", "(inf, False)"], "x", ())["x_accuracy"]

    assert row["prediction"] == "yes" and row["margin"] == math.inf
    for results in (["(nan, False)", "(nan, False)"], [(math.nan, False), (1.0, False)]):
        with pytest.raises(ValueError, match="to question a-1 are nan .*dtype=bfloat16"):
            yes_no.score_likelihoods(doc, results, "x", ())
