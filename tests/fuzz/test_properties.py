"""What holds for every value: overrides, settings, parsers, image processing, layouts."""

import string

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from deem_plugin.evaluation.yes_no import NO, UNKNOWN, YES, parse_yes_no, score_likelihoods
from deem_plugin.feedback.config import FeedbackConfig
from deem_plugin.settings import build_settings, changed_settings, merge_settings, nest
from deem_plugin.training.recipes import load_recipe
from deem_plugin.vision.image_processing import DeemImageProcessor

from ..tiny import tiny_image
from ..vision.test_layouts import CASES, PATCH, cells_of, make

SIDES = st.integers(1, 80)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.floats(0, 1e6), st.integers(0, 2**32 - 1), st.sampled_from(["queries", "patches", "cls"]))
def test_what_an_override_says_is_what_the_recipe_has(weight, seed, kind):
    given_ = [f"feedback.weight={weight!r}", f"feedback.seed={seed}", f"feedback.condition.kind={kind}"]

    feedback = load_recipe("tiny-tune", ["training.use_cpu=true", "training.bf16=false", *given_]).feedback

    assert (feedback.weight, feedback.seed, feedback.condition.kind) == (weight, seed, kind)
    again = build_settings(FeedbackConfig, changed_settings(feedback), "feedback", "a test")
    assert again == feedback


@given(st.sampled_from(["model.freeze", "data.max_length", "feedback.weight", "training.max_steps"]), TREES)
def test_a_value_of_any_kind_is_taken_or_refused_by_its_name(key, value):
    override = f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}"
    try:
        load_recipe("tiny-tune", ["training.use_cpu=true", "training.bf16=false", override])
    except ValueError as error:
        assert key.partition(".")[2] in str(error)  # noqa: PT017


@given(TREES, TREES)
def test_what_is_laid_above_wins(below, above):
    merged = merge_settings(FeedbackConfig, nest(FeedbackConfig, "condition.kind", below), {"weight": above})

    assert repr(merged) == repr({"condition": {"kind": below}, "weight": above})
    assert repr(merge_settings(FeedbackConfig, merged, merged)) == repr(merged)


@given(st.text())
def test_an_answer_is_yes_or_no_only_if_it_has_the_word(answer):
    said = parse_yes_no(answer)

    assert said in (YES, NO, UNKNOWN)
    assert said == UNKNOWN or said in answer.lower()


@given(st.sampled_from([YES, NO]), st.sampled_from(["", ",", ".", "!", "\n"]), st.text(string.whitespace, max_size=3))
def test_a_plain_answer_is_read(word, end, before):
    assert parse_yes_no(before + word.title() + end) == word


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.booleans())
def test_the_likelier_answer_is_taken_and_the_margin_tells_by_how_much(yes, no, as_text):
    results = [(yes, False), (no, False)]
    rows = score_likelihoods({"answer": YES}, list(map(str, results)) if as_text else results, "task", ["auc"])

    assert rows["task_auc"]["margin"] == no - yes
    assert rows["task_accuracy"]["score"] == float(yes < no)


@given(SIDES, SIDES, st.sampled_from([16, 24]), st.sampled_from([None, 16, 32]))
def test_a_picture_of_any_shape_becomes_a_square_in_range(width, height, side, target):
    processor = DeemImageProcessor(size={"shortest_edge": side}, crop_size=side, target_size=target)

    batch = processor(tiny_image(size=(width, height)), return_tensors="pt")

    assert batch["pixel_values"].shape == (1, 3, side, side)
    assert ("target_pixel_values" in batch) is (target is not None)
    if target is not None:
        assert batch["target_pixel_values"].shape == (1, 3, target, target)
        assert batch["target_pixel_values"].abs().max() <= 1


@pytest.mark.parametrize("name", [name for name in CASES if name != "attending tiles"])
@given(data=st.data())
def test_what_a_layout_packs_it_splits_again(name, data):
    sides = st.integers(1, 6).map(lambda cells: PATCH * cells)
    sizes = data.draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
    if name == "grid":
        sizes = [sizes[0]] * len(sizes)
    layout, pictures = make(CASES[name][0]), [torch.rand(3, *size) for size in sizes]
    own = [cells_of(picture) for picture in pictures]
    together = {"grid": torch.stack, "padded patches": lambda tokens: pad_sequence(tokens, batch_first=True)}

    views = layout.split(layout.pack(pictures), together.get(name, torch.cat)(own))

    assert [view.image for view in views] == list(range(len(pictures)))
    for view, picture, tokens in zip(views, pictures, own, strict=True):
        assert torch.equal(view.picture, picture) and torch.equal(view.tokens, tokens)
