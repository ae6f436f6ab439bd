"""Does the 95 % interval hold the true drop in 95 of 100 cases? On test sets whose true drop is known.

    python benchmarks/bootstrap_coverage.py --cases 400 --images 20,60,256

Draws so many test sets from a population of images with a model and its parent that err in them, for which the drop of
endlessly many images can be written down; takes the interval of the mean drop and of each class from each set; and
counts in how many the true drop lies within. Prints the share with its own exact binomial interval (Clopper and
Pearson), and in how many the true drop is above the interval: there a bundle could pass that loses more than its limit
(nominal 2.5 %). 256 is the number of the test images of MSRC-v2, 20 the fewest that decide. Asked for: 93 to 97 %.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from edge_ilseg.devices.bootstrap import PairedCounts, bootstrap_intervals, old_drops

OLD_COUNT, CLASS_COUNT = 4, 5


def main() -> None:
    """Simulate, and print one row a size of the test set and a drop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--images", default="20,60,256", help="sizes of the test sets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    world = World()
    names = ("mean", *(f"class {number}" for number in range(OLD_COUNT)))
    interval = "95 % interval of the share"
    print(f"{'images':>6}  {'drop of':<8} {'true':>6}  {'covered':>8}  {interval:>26}  {'above it':>8}")
    for count in map(int, options.images.split(",")):
        found = covered_cases(world, count, options.cases, seed=options.seed)
        for name, true, covered, above in zip(names, world.true_drops(), *found, strict=True):
            ends = binomtest(int(covered), options.cases).proportion_ci(method="exact")
            print(
                f"{count:>6}  {name:<8} {true:>6.2f}  {100 * covered / options.cases:>6.2f} %  "
                f"{100 * ends.low:>14.2f} to {100 * ends.high:.2f} %  {100 * above / options.cases:>6.2f} %"
            )


class Covered(NamedTuple):
    """In how many cases: of the mean drop, then of each class, int64."""

    within_M: NDArray[np.int64]
    """The interval holds the true drop."""
    above_M: NDArray[np.int64]
    """The true drop is above it."""


def covered_cases(world: World, image_count: int, cases: int, *, seed: int) -> Covered:
    """Where the true drop is beside the intervals of so many cases."""
    rng = np.random.default_rng(seed)
    true_M = world.true_drops()
    found = Covered(np.zeros(len(true_M), np.int64), np.zeros(len(true_M), np.int64))
    for case in range(cases):
        counts = all_at_once(*world.draw(rng, image_count))
        ends = np.array(bootstrap_intervals(old_drops(counts), image_count, seed=case))
        found.within_M[:] += (ends[:, 1] <= true_M) & (true_M <= ends[:, 2])
        found.above_M[:] += true_M > ends[:, 2]
    return found


class World(NamedTuple):
    """A population of images, from which test sets are drawn, with a model and its parent that err in them.

    An image shows a class by chance, in a size by chance. Of each class in it the parent loses a share that is the
    image's own; the bundle loses that share too, and of what is left another one: some images are hard for both.
    Lost pixels go to the other classes evenly; to the new one too, but never by the parent.
    """

    presence_K: tuple[float, ...] = (1.0, 0.6, 0.4, 0.3, 0.3)
    pixels_K: tuple[float, ...] = (3000.0, 900.0, 600.0, 800.0, 500.0)
    """Mean size of a class where an image shows it."""
    size_spread: float = 0.5
    hard: tuple[float, float] = (2.0, 10.0)
    """Beta distribution of what the parent loses."""
    forgotten_K: tuple[float, ...] = (0.02, 0.05, 0.15, 0.02, 0.01)
    """Mean share of the rest that the bundle loses besides."""

    def draw(self, rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Confusion matrices of so many images, of the bundle and its parent: N x K x K each."""
        shown_NK = rng.random((count, CLASS_COUNT)) < self.presence_K
        sizes_NK = rng.lognormal(np.log(self.pixels_K) - self.size_spread**2 / 2, self.size_spread, shown_NK.shape)
        true_NK = (shown_NK * sizes_NK).round().astype(np.int64)
        hard_NK = rng.beta(*self.hard, shown_NK.shape)
        besides_NK = rng.beta(2.0, 2.0 / np.array(self.forgotten_K) - 2.0, shown_NK.shape)

        def confused(rate_NK: NDArray[np.float64], share_KK: NDArray[np.float64]) -> NDArray[np.int64]:
            lost_NK = rng.binomial(true_NK, rate_NK)
            confusion_NKK = rng.multinomial(lost_NK, share_KK).astype(np.int64)
            confusion_NKK[:, range(CLASS_COUNT), range(CLASS_COUNT)] += true_NK - lost_NK
            return confusion_NKK

        bundle = confused(1 - (1 - hard_NK) * (1 - besides_NK), spread_evenly(CLASS_COUNT))
        return bundle, confused(hard_NK, spread_evenly(OLD_COUNT))

    def true_drops(self) -> NDArray[np.float64]:
        """The drop over endlessly many images, the mean first. Chances are independent, so their means multiply."""
        true_K = np.array(self.presence_K) * self.pixels_K
        hard = self.hard[0] / sum(self.hard)

        def iou(rate_K: NDArray[np.float64], share_KK: NDArray[np.float64]) -> NDArray[np.float64]:
            confusion = (true_K * rate_K)[:, None] * share_KK + np.diag(true_K * (1 - rate_K))
            kept = confusion[:OLD_COUNT]
            hit_K = np.diag(kept)
            return hit_K / (kept.sum(axis=1) + kept.sum(axis=0)[:OLD_COUNT] - hit_K)

        before_K = iou(np.full(CLASS_COUNT, hard), spread_evenly(OLD_COUNT))
        drop_K = 100 * (before_K - iou(1 - (1 - hard) * (1 - np.array(self.forgotten_K)), spread_evenly(CLASS_COUNT)))
        return np.concatenate([[drop_K.mean()], drop_K])


def spread_evenly(predicted_count: int) -> NDArray[np.float64]:
    """To which of the other classes a lost pixel goes, among the first so many: K x K, rows sum to 1."""
    share_KK = np.zeros((CLASS_COUNT, CLASS_COUNT))
    share_KK[:, :predicted_count] = 1.0
    np.fill_diagonal(share_KK, 0.0)
    return share_KK / share_KK.sum(axis=1, keepdims=True)


def all_at_once(bundle_NKK: NDArray[np.int64], parent_NKK: NDArray[np.int64]) -> PairedCounts:
    """The counts that a bundle and its parent give, image by image, from their confusion matrices, N x K x K each."""

    def counts(confusion_NKK: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        kept = confusion_NKK[:, :OLD_COUNT]
        hit_NK = kept[:, range(OLD_COUNT), range(OLD_COUNT)]
        return kept.sum(2), hit_NK, kept.sum(2) + kept.sum(1)[:, :OLD_COUNT] - hit_NK

    return PairedCounts(*counts(bundle_NKK), *counts(parent_NKK)[1:])


if __name__ == "__main__":
    main()
