"""How far a score, or the difference of two, may be trusted: a bootstrap over images, and the exact sign test."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

RESAMPLES = 5000
CONFIDENCE = 0.95
_DRAWS_A_CHUNK = 4_000_000  # 32 MB of indices


@dataclass(frozen=True)
class Estimate:
    """
    A mean and what the choice of the images leaves open about it.

    Args:
        value (`float`): The mean over questions; of several sets, the mean of theirs.
        standard_error (`float`): Standard deviation over bootstrap samples; NaN for a set of one image.
        low (`float`): Lower end of the confidence interval; NaN for a set of one image.
        high (`float`): Upper end.
    """

    value: float
    standard_error: float
    low: float
    high: float


def cluster_totals(scores: Sequence[float], clusters: Sequence[Hashable]) -> np.ndarray:
    """
    Sums scores by cluster, in an order that does not depend on that of the rows.

    Args:
        scores (`Sequence[float]`): One for each question; for a paired difference, that of the question's two scores.
        clusters (`Sequence`): What each question's image is called.

    Returns:
        `np.ndarray`: Sum of the scores and number of questions of each cluster, shape `(clusters, 2)`.

    Raises:
        ValueError: If there is no score, or not one cluster for each.
    """
    if len(scores) != len(clusters) or not len(scores):
        raise ValueError(f"{len(scores)} scores of {len(clusters)} clusters; expected one of each for every question.")
    names = sorted({str(cluster) for cluster in clusters})
    place = {name: index for index, name in enumerate(names)}
    totals = np.zeros((len(names), 2))
    np.add.at(totals, [place[str(cluster)] for cluster in clusters], np.stack([scores, np.ones(len(scores))], axis=1))
    return totals


def bootstrap_means(*sets: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """
    Returns the mean on bootstrap samples of whole clusters; of several sets, the mean of their means.

    Questions of one image fail together, so images are drawn, with all their questions. Sets of the same size get the
    same draws for the same seed: differences of two results over the same images are paired.

    Args:
        sets (`np.ndarray`): Results of `cluster_totals`, shape `(clusters, 2)` each.
        resamples (`int`): Number of samples.
        seed (`int`): Seed of the draws.

    Returns:
        `np.ndarray`: Shape `(resamples,)`.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for totals in sets:
        chunk = max(1, _DRAWS_A_CHUNK // len(totals))
        for start in range(0, resamples, chunk):
            stop = min(start + chunk, resamples)
            drawn = rng.integers(len(totals), size=(stop - start, len(totals)))
            means[start:stop] += totals[drawn, 0].sum(axis=1) / totals[drawn, 1].sum(axis=1)
    return means / len(sets)


def estimate(*sets: np.ndarray, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """
    Estimates a mean with the percentile interval of `bootstrap_means`.

    Args:
        sets (`np.ndarray`): Results of `cluster_totals`, shape `(clusters, 2)` each.
        confidence (`float`): Probability mass of the interval, in (0, 1).
        resamples (`int`): Number of bootstrap samples.
        seed (`int`): Seed of the draws.
    """
    value = float(np.mean([totals[:, 0].sum() / totals[:, 1].sum() for totals in sets]))
    if min(len(totals) for totals in sets) < 2:
        return Estimate(value, nan, nan, nan)
    means = bootstrap_means(*sets, resamples=resamples, seed=seed)
    low, high = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Estimate(value, float(means.std(ddof=1)), float(low), float(high))


def sign_test(lost: int, gained: int) -> float:
    """
    Returns the two-sided p-value of the exact sign test, which is McNemar's where scores are 0 or 1: could as many
    have changed either way by chance?

    Those that did not change say nothing about it; with no change at all the value is 1. Questions are taken for
    independent.

    Args:
        lost (`int`): Questions (or pairs) that the first of two runs answered better.
        gained (`int`): Questions (or pairs) that the second answered better.
    """
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
