"""Strict parsing, what answers are reduced to, and the scores against their definitions."""

import json
import math

import pytest

from deem_plugin.evaluation.yes_no import (
    accuracy,
    auc,
    f1,
    pair_accuracy,
    parse_yes_no,
    precision,
    read_margin,
    recall,
    settle_answer,
    unknown_rate,
    write_margin,
    yes_ratio,
)

POPE_PROMPT = "Is there a dog in the image?\nAnswer the question using a single word or phrase."


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


@pytest.mark.parametrize("answer", ["Yes.", "Yes, there is a dog.", "The answer is: yes", "yes"])
def test_an_answer_to_pope_becomes_the_word_that_pope_compares(answer):
    assert settle_answer(POPE_PROMPT, answer) == "yes"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        # What is on the sign is no verdict.
        ("What does the sign say?\nAnswer the question using a single word or phrase.", "No parking"),
        ("Who is there?\nAnswer the question using a single word or phrase.", "No one"),
        # An open question wants the whole sentence.
        ("Is this picture funny?", "Yes, because the dog wears a hat."),
        ("Is it red? Please answer yes or no and explain.", "Yes, it is as red as a cherry."),
        # No verdict, nothing to reduce to.
        (POPE_PROMPT, "A dog."),
    ],
)
def test_other_answers_stay_as_they_are(prompt, answer):
    assert settle_answer(prompt, answer) == answer


def test_scores_follow_their_definitions_and_count_unknown_as_wrong():
    targets = ["yes", "yes", "yes", "no", "no"]
    predictions = ["yes", "unknown", "no", "yes", "no"]

    assert accuracy(predictions, targets) == pytest.approx(2 / 5)
    assert precision(predictions, targets) == pytest.approx(1 / 2)  # 1 of the 2 yes predictions
    assert recall(predictions, targets) == pytest.approx(1 / 3)  # 1 of the 3 yes targets
    assert f1(predictions, targets) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert yes_ratio(predictions) == pytest.approx(2 / 5)
    assert unknown_rate(predictions) == pytest.approx(1 / 5)


def test_a_pair_counts_when_both_answers_are_right_and_half_a_pair_not_at_all():
    targets = ["yes", "no", "yes", "no", "yes"]
    predictions = ["yes", "no", "yes", "yes", "yes"]

    assert pair_accuracy(predictions, targets, ["a", "a", "b", "b", "cut off"]) == pytest.approx(1 / 2)


def test_always_yes_scores_half_but_no_pair():
    targets, predictions = ["yes", "no"] * 4, ["yes"] * 8

    assert accuracy(predictions, targets) == 0.5
    assert pair_accuracy(predictions, targets, [index // 2 for index in range(8)]) == 0.0
    assert yes_ratio(predictions) == 1.0


@pytest.mark.parametrize("margin", [12.5, -0.25, 0.0, 3e-9, -1.5e-7, 123456.0])
def test_a_margin_is_read_as_it_was_written_beside_the_verdict(margin):
    answer = write_margin(margin)

    assert parse_yes_no(answer) == ("yes" if margin > 0 else "no")
    assert read_margin(answer) == pytest.approx(margin)
    assert [read_margin(text) for text in ("Yes.", "No, it is not", "maybe (margin call)")] == [1.0, -1.0, 0.0]


def test_auc_is_the_share_of_pairs_in_the_right_order_wherever_the_threshold_lies():
    targets = ["yes", "yes", "no", "no"]

    assert auc([-1.0, -3.0, -4.0, -5.0], targets) == 1.0  # every answer a no, accuracy one half
    assert auc([2.0, -1.0, 1.0, -2.0], targets) == pytest.approx(3 / 4)  # of four pairs only (-1, 1) is wrong
    assert auc([1.0, -1.0, -1.0, -1.0], targets) == pytest.approx((1 / 2 + 1) / 2)  # verdicts alone
    assert auc([0.0] * 4, targets) == 0.5
    assert math.isnan(auc([1.0, 2.0], ["yes", "yes"]))


def test_scores_of_nothing_are_zero_and_lists_of_other_lengths_are_refused():
    assert accuracy([], []) == precision([], []) == recall([], []) == f1([], []) == 0.0
    with pytest.raises(ValueError):
        accuracy(["yes"], [])
