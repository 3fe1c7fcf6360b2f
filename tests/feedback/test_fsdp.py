"""Two ranks that shard model and conditioner (FSDP2) have the feedback of one process, and resume."""

import pytest
import torch

from ..tiny import tiny_llava
from .helpers import relative_difference, samples
from .run_two_ranks import gradients_of_a_share, train_by_events
from .runs import by_hand, run_two_ranks

pytestmark = pytest.mark.slow
EXACT = 1e-5


def assert_equal(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return run_two_ranks(tmp_path_factory.mktemp("shards"), "fsdp")


def test_sharded_gradients_are_those_of_one_process(shards):
    expected, _ = by_hand(samples(tiny_llava()[1]), conversations=4)
    gradients = {name: shards["gradients"][name] for name in expected}

    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, "vision_tower") < EXACT
    assert relative_difference(expected, gradients, "feedback_conditioner") < EXACT


def test_a_sharded_conditioner_is_saved_whole(shards):
    assert_equal(shards["expected"], shards["saved"])


def test_a_sharded_conditioner_is_resumed(shards):
    assert_equal(shards["expected"], shards["loaded"])
    assert shards["still_sharded"]


def test_a_sharded_model_is_left_without_feedback(shards):
    assert shards["left"] == []


def test_a_rank_that_draws_no_picture_does_not_hold_up_one_that_does(tmp_path):
    one, none = (gradients_of_a_share(rank, shard=False) for rank in range(2))
    assert one["feedback_conditioner.head.weight"].any() and not none["feedback_conditioner.head.weight"].any()

    gradients = run_two_ranks(tmp_path, "fsdp share")

    expected = {name: (one[name] + none[name]) / 2 for name in one}
    assert relative_difference(expected, gradients) < EXACT
    assert relative_difference(expected, gradients, "feedback_conditioner") < EXACT


def test_a_run_on_shards_trains_and_resumes_like_one_process(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    losses, weights = train_by_events(tmp_path / "one", shard=False)
    assert max(losses) - min(losses) > 1e-3

    two = run_two_ranks(tmp_path / "two", "fsdp resume")

    assert two["losses"] == pytest.approx(losses, rel=1e-5)
    assert two["resumed_losses"] == pytest.approx(losses[2:], rel=1e-5)
    assert_equal(weights, two["weights"])
    assert_equal(weights, two["resumed_weights"])
