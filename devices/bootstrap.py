"""How sure is a drop? A paired bootstrap over images: bias-corrected and accelerated intervals, in numpy alone.

1. Images are drawn, not pixels: pixels of one image are no independent witnesses. An image brings its counts of the
   bundle and of its parent together, so that what is hard for both does not count against either.
2. An interval is BCa (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 14.3): the quantiles of the
   resampled statistic, moved by its bias z0 and by the acceleration a, which the jackknife gives.
   `scipy.stats.bootstrap` computes the same; the tests hold the two together.
3. A bootstrap of few images is too narrow, because it draws from the images as if they were all there are. The normal
   quantiles are widened to sqrt(N / (N - 1)) t, as in the expanded percentile interval of Hesterberg (What Teachers
   Should Know About the Bootstrap, 2015). The degrees of freedom of t are those of the spread that the images show
   (`freedom_of`): where most of a drop lies in a few of them, it is known as badly as from a few
   (`benchmarks/bootstrap_coverage.py`, ADR 0010).
4. The same counts and seed give the same interval.
5. An interval tells how much the images differ among each other, not whether they are enough: images that agree with
   one another give an interval without width, and be they two. How many it takes is asked by the verdict
   (`edge_ilseg.devices.retention`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
CHUNK = 200
"""Resamples computed at once, at most: their weights are kept in memory, one number an image."""
WEIGHTS = 1 << 18
"""Numbers of these weights at once, at most: 2 MiB, so that 10,000 images take no more of them than 1,000."""

Weighted = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""How often each image counts, float64, B x N -> M statistics for each of the B rows, float64, B x M; nan: no value."""


class Interval(NamedTuple):
    """A statistic and the ends of its interval; nan where the images cannot tell."""

    value: float
    low: float
    high: float


def bootstrap_intervals(
    weighted: Weighted,
    image_count: int,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    widen: bool = True,
) -> tuple[Interval, ...]:
    """The BCa interval of each statistic (rule 2).

    Args:
        weighted: the statistics as a function of how often each image counts.
        image_count: N.
        confidence: of the two-sided interval, in 0..1.
        resamples: how many samples of N images, with repetition, are drawn.
        seed: of the draws.
        widen: rule 3.

    Returns:
        One interval a statistic. With fewer than two images, or where a statistic has no value once some image is left
        out, the ends are nan.

    Raises:
        ValueError: there is no image.
    """
    if image_count < 1:
        raise ValueError("a bootstrap needs images")
    rng = np.random.default_rng(seed)
    values_M = weighted(np.ones((1, image_count)))[0]
    if image_count < 2:
        return tuple(Interval(float(value), np.nan, np.nan) for value in values_M)
    drawn, chunk = [], max(1, min(CHUNK, WEIGHTS // image_count))
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        drawn.append(weighted(rng.multinomial(image_count, np.full(image_count, 1 / image_count), count).astype(float)))
    samples_BM = np.concatenate(drawn)
    jackknife_NM = np.concatenate(
        [weighted(_each_left_out(image_count, start, chunk)) for start in range(0, image_count, chunk)]
    )
    return tuple(
        _interval(float(value), samples_BM[:, m], jackknife_NM[:, m], confidence, widen)
        for m, value in enumerate(values_M)
    )


def _each_left_out(image_count: int, start: int, chunk: int) -> NDArray[np.float64]:
    """Weights of the jackknife's samples that leave out image `start`, `start` + 1, ...: at most `chunk` of them."""
    count = min(chunk, image_count - start)
    weights_BN = np.ones((count, image_count))
    weights_BN[np.arange(count), start + np.arange(count)] = 0.0
    return weights_BN


def freedom_of(deviations_N: NDArray[np.float64]) -> float:
    """Degrees of freedom of a variance that is estimated from N deviations: 2 N / (kurtosis - 1), but 2 to N - 1.

    Of the chi-squared distribution with the mean and variance of the estimate (Satterthwaite, An Approximate
    Distribution of Estimates of Variance Components, 1946): the variance of a sample variance is about
    (kurtosis - 1) / N of its square, that of chi-squared / f is 2 / f. Normal deviations give N. The kurtosis is that
    of the sample, corrected for its size (Joanes & Gill, Comparing Measures of Sample Skewness and Kurtosis, 1998, G2);
    fewer than four deviations have none.

    Args:
        deviations_N: what each image moves a statistic by; their mean is 0.
    """
    count, spread = len(deviations_N), float((deviations_N**2).sum())
    if count < 4 or not spread:
        return count - 1.0
    biased = count * float((deviations_N**4).sum()) / spread**2
    excess = (count - 1) / ((count - 2) * (count - 3)) * ((count + 1) * biased - 3 * (count - 1))
    return min(count - 1.0, max(2.0, 2 * count / max(excess + 2, 1.0)))


def student_quantile(share: float, freedom: float) -> float:
    """The quantile of Student's t, from that of the normal distribution (Abramowitz & Stegun, 26.7.5).

    Args:
        share: in 0..1.
        freedom: degrees of freedom, at least 1; between shares of 0.025 and 0.975 the error is below 0.01 from 2.5 on,
            and below 0.04 from 2 on.
    """
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def _interval(
    value: float, samples_B: NDArray[np.float64], jackknife_N: NDArray[np.float64], confidence: float, widen: bool
) -> Interval:
    """Rule 2 for one statistic. Resamples without a value are left out."""
    samples_B = samples_B[~np.isnan(samples_B)]
    if np.isnan(value) or not samples_B.size or np.isnan(jackknife_N).any():
        return Interval(value, np.nan, np.nan)
    if samples_B.min() == samples_B.max():
        return Interval(value, float(samples_B[0]), float(samples_B[0]))
    normal = NormalDist()
    below = ((samples_B < value).sum() + (samples_B <= value).sum()) / (2 * samples_B.size)
    least = 0.5 / samples_B.size  # a share of 0 or 1 has no finite quantile
    bias = normal.inv_cdf(float(np.clip(below, least, 1 - least)))
    deviations_N = jackknife_N.mean() - jackknife_N
    spread = float((deviations_N**2).sum())
    acceleration = float((deviations_N**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    count, freedom = len(deviations_N), freedom_of(deviations_N)
    ends = []
    for share in ((1 - confidence) / 2, (1 + confidence) / 2):
        quantile = normal.inv_cdf(share)
        if widen:
            quantile = math.sqrt(count / (count - 1)) * student_quantile(share, freedom)
        z = bias + quantile
        # |acceleration| is 1/6 at most, so that only a z beyond 6 can leave nothing: the last sample
        left = 1 - acceleration * z
        ends.append(normal.cdf(bias + z / left if left > 0 else math.copysign(math.inf, z)))
    low, high = np.quantile(samples_B, ends)
    return Interval(value, float(low), float(high))


class PairedCounts(NamedTuple):
    """For each image and old class, over the pixels whose truth is an old class; whole numbers, N x K."""

    true_NK: NDArray[np.integer]
    """Pixels that are truly of the class."""
    hit_NK: NDArray[np.integer]
    """Pixels that are of the class and were predicted to be, by the bundle; then by its parent."""
    union_NK: NDArray[np.integer]
    """Pixels that are of the class or were predicted to be."""
    parent_hit_NK: NDArray[np.integer]
    parent_union_NK: NDArray[np.integer]


def old_drops(counts: PairedCounts) -> Weighted:
    """The drop of the old classes' IoU against the parent, percentage points: the mean, then each class.

    A class without a true pixel in a sample is not in its mean.
    """

    def weighted(weights_BN: NDArray[np.float64]) -> NDArray[np.float64]:
        # one part after another, so that there is no floating-point copy of all counts
        true_BK, hit_BK, union_BK, parent_hit_BK, parent_union_BK = (weights_BN @ part.astype(float) for part in counts)
        shown_BK = true_BK > 0
        drops_BK = np.full(true_BK.shape, np.nan)
        drops_BK[shown_BK] = 100 * (
            parent_hit_BK[shown_BK] / parent_union_BK[shown_BK] - hit_BK[shown_BK] / union_BK[shown_BK]
        )
        shown_B = shown_BK.sum(axis=1)
        sums_B = np.where(shown_BK, drops_BK, 0.0).sum(axis=1)
        mean_B = np.divide(sums_B, shown_B, out=np.full(len(sums_B), np.nan), where=shown_B > 0)
        return np.column_stack([mean_B, drops_BK])

    return weighted
