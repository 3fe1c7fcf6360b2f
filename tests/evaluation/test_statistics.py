"""Intervals and tests, against closed forms and scipy; none depends on the order of the rows."""

import math

import numpy as np
import pytest

from deem_plugin.evaluation import statistics
from deem_plugin.evaluation.statistics import bootstrap_means, cluster_totals, estimate, sign_test


def clustered_scores(images: int = 300, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Makes 0/1 scores of one to four questions an image, alike within an image more often than not."""
    rng = np.random.default_rng(seed)
    scores, clusters = [], []
    for image in range(images):
        ease = rng.random()
        for _ in range(rng.integers(1, 5)):
            scores.append(float(rng.random() < ease))
            clusters.append(f"image-{image}")
    return np.array(scores), clusters


def analytic_standard_error(totals: np.ndarray) -> float:
    """The cluster-robust standard error of a mean (a ratio of sums, linearised)."""
    mean = totals[:, 0].sum() / totals[:, 1].sum()
    return float(np.sqrt(((totals[:, 0] - mean * totals[:, 1]) ** 2).sum()) / totals[:, 1].sum())


def test_totals_are_sums_and_counts_of_each_image():
    assert cluster_totals([1.0, 0.0, 1.0], ["b", "a", "b"]).tolist() == [[0.0, 1.0], [2.0, 2.0]]


def test_bootstrap_agrees_with_the_analytic_clustered_standard_error():
    totals = cluster_totals(*clustered_scores())
    result = estimate(totals)

    error = analytic_standard_error(totals)
    assert result.standard_error == pytest.approx(error, rel=0.05)
    assert result.low == pytest.approx(result.value - 1.96 * error, abs=0.1 * error)
    assert result.high == pytest.approx(result.value + 1.96 * error, abs=0.1 * error)


def test_questions_taken_for_independent_would_give_too_narrow_an_interval():
    scores, clusters = clustered_scores()
    by_image = estimate(cluster_totals(scores, clusters))
    by_question = estimate(cluster_totals(scores, range(len(scores))))

    assert by_question.value == by_image.value
    assert by_question.standard_error < 0.85 * by_image.standard_error
    plain = math.sqrt(by_question.value * (1 - by_question.value) / len(scores))
    assert by_question.standard_error == pytest.approx(plain, rel=0.05)


def test_repeating_every_question_leaves_the_interval_as_it_is():
    scores, clusters = clustered_scores(50)
    assert estimate(cluster_totals(scores, clusters)) == estimate(cluster_totals([*scores, *scores], clusters * 2))


def test_order_of_the_rows_does_not_matter():
    scores, clusters = clustered_scores(50)
    order = np.random.default_rng(1).permutation(len(scores))
    shuffled = cluster_totals(scores[order], [clusters[index] for index in order])

    assert estimate(cluster_totals(scores, clusters)) == estimate(shuffled)


def test_interval_covers_the_truth_as_often_as_it_says():
    truth, covered = 0.5, 0
    for seed in range(200):
        result = estimate(cluster_totals(*clustered_scores(60, seed)), resamples=400)
        covered += result.low <= truth <= result.high
    assert 0.89 <= covered / 200 <= 0.99


def test_difference_of_two_runs_is_that_of_their_samples():
    """Pairing by question is the same as drawing the same images for both runs."""
    base, clusters = clustered_scores(80)
    new = np.where(np.random.default_rng(2).random(len(base)) < 0.1, 1 - base, base)
    samples = [bootstrap_means(cluster_totals(scores, clusters)) for scores in (base, new)]

    difference = estimate(cluster_totals(new - base, clusters))

    assert difference.value == pytest.approx(new.mean() - base.mean())
    assert difference.standard_error == pytest.approx((samples[1] - samples[0]).std(ddof=1))
    assert (difference.low, difference.high) == pytest.approx(np.quantile(samples[1] - samples[0], (0.025, 0.975)))


def test_several_sets_count_alike_and_their_errors_add():
    first, second = cluster_totals(*clustered_scores(400, 1)), cluster_totals(*clustered_scores(40, 2))
    result = estimate(first, second)

    values = [totals[:, 0].sum() / totals[:, 1].sum() for totals in (first, second)]
    assert result.value == pytest.approx(np.mean(values))
    expected = math.hypot(analytic_standard_error(first), analytic_standard_error(second)) / 2
    assert result.standard_error == pytest.approx(expected, rel=0.05)


def test_no_difference_is_certain_and_one_image_says_nothing():
    same = estimate(cluster_totals(np.zeros(30), range(30)))
    assert (same.value, same.standard_error, same.low, same.high) == (0.0, 0.0, 0.0, 0.0)
    single = estimate(cluster_totals([1.0, 0.0], ["a", "a"]))
    assert single.value == 0.5 and all(map(math.isnan, (single.standard_error, single.low, single.high)))


def test_draws_in_chunks_are_those_in_one_go(monkeypatch):
    totals = cluster_totals(*clustered_scores(50))
    whole = bootstrap_means(totals, resamples=101)
    monkeypatch.setattr(statistics, "_DRAWS_A_CHUNK", 500)
    np.testing.assert_array_equal(bootstrap_means(totals, resamples=101), whole)


def test_the_sign_test_is_the_share_of_coin_throws_as_far_from_even():
    assert sign_test(1, 3) == pytest.approx(2 * (1 + 4) / 16)
    assert sign_test(3, 1) == sign_test(1, 3)
    assert sign_test(0, 5) == pytest.approx(2 / 32)


def test_what_did_not_change_says_nothing():
    assert sign_test(0, 0) == 1.0
    assert sign_test(3, 3) == 1.0


def test_impossible_input_is_refused():
    with pytest.raises(ValueError, match="2 scores of 1 clusters"):
        cluster_totals([1.0, 0.0], ["a"])
    with pytest.raises(ValueError, match="0 scores"):
        cluster_totals([], [])
