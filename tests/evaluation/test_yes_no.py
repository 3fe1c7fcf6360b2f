"""Strict parsing of yes and no."""

import json

import pytest

from deem_plugin.evaluation.yes_no import parse_yes_no


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
