"""Every score against a plain loop, and by hand where the rules are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_ilseg.metrics import VOID, class_accuracy, class_iou, confusion_matrix, retention_confusion, score

K = 4


def loop_confusion(labels: list[int], predicted: list[int], class_count: int) -> NDArray[np.int64]:
    counts = np.zeros((class_count, class_count), dtype=np.int64)
    for true, guess in zip(labels, predicted, strict=True):
        if true != VOID:
            counts[true, guess] += 1
    return counts


def loop_iou(labels: list[int], predicted: list[int], channel: int) -> float:
    pairs = [(true, guess) for true, guess in zip(labels, predicted, strict=True) if true != VOID]
    both = sum(true == guess == channel for true, guess in pairs)
    either = sum(channel in (true, guess) for true, guess in pairs)
    return both / either if either else math.nan


pixels = st.lists(
    st.tuples(st.sampled_from([*range(K), VOID]), st.integers(0, K - 1)), min_size=0, max_size=60
)  # fmt: skip


@given(pixels)
@settings(max_examples=200, deadline=None)
def test_counts_and_scores_are_those_of_a_plain_loop(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = [true for true, _ in pairs], [guess for _, guess in pairs]
    confusion = confusion_matrix(np.array(labels, np.uint8), np.array(predicted, np.uint8), K)
    np.testing.assert_array_equal(confusion, loop_confusion(labels, predicted, K))
    assert confusion.dtype == np.int64
    expected = [loop_iou(labels, predicted, channel) for channel in range(K)]
    np.testing.assert_allclose(class_iou(confusion), expected, rtol=1e-12)
    known = [value for value in expected if not math.isnan(value)]
    metrics = score(confusion, list("abcd"), old_count=2, background="a", images=1)
    assert metrics.miou_all == (pytest.approx(sum(known) / len(known)) if known else None)
    counted = [(true, guess) for true, guess in pairs if true != VOID]
    assert metrics.pixels == len(counted)
    right = sum(true == guess for true, guess in counted)
    assert metrics.mpa == (pytest.approx(right / len(counted)) if counted else None)
    rows = [[guess == true for true, guess in counted if true == channel] for channel in range(K)]
    accuracies = [sum(row) / len(row) for row in rows if row]
    assert metrics.mca == (pytest.approx(sum(accuracies) / len(accuracies)) if accuracies else None)


@given(st.lists(st.tuples(st.sampled_from([*range(K), VOID]), st.integers(0, K - 1), st.integers(1, 40)), max_size=30))
@settings(max_examples=200, deadline=None)
def test_long_runs_of_equal_pixels_are_counted_as_a_plain_loop_counts_them(runs: list[tuple[int, int, int]]) -> None:
    labels = [true for true, _, length in runs for _ in range(length)]
    predicted = [guess for _, guess, length in runs for _ in range(length)]
    confusion = confusion_matrix(np.array(labels, np.uint8), np.array(predicted, np.uint8), K)
    np.testing.assert_array_equal(confusion, loop_confusion(labels, predicted, K))
    assert confusion.dtype == np.int64


@pytest.mark.parametrize("run_px", [1, 50])
def test_labels_counted_through_a_lookup_are_those_looked_up_one_by_one(run_px: int) -> None:
    """Classes that share a channel, that are void, and a channel whose number is another class's label."""
    rng = np.random.default_rng(run_px)
    lookup = np.full(256, VOID, np.uint8)
    lookup[:7] = (1, 0, 3, 3, VOID, 2, 0)
    labels_HW = rng.choice([*range(7), 200, VOID], (20, 4)).astype(np.uint8).repeat(run_px, axis=1)
    predicted_HW = rng.integers(0, K, (20, 4), dtype=np.uint8).repeat(run_px, axis=1)
    counted = confusion_matrix(labels_HW, predicted_HW, K, lookup)
    np.testing.assert_array_equal(counted, confusion_matrix(lookup[labels_HW], predicted_HW, K))
    assert counted.dtype == np.int64
    lookup[3] = K
    with pytest.raises(ValueError, match=f"channel {K} with {K} classes"):
        confusion_matrix(labels_HW, predicted_HW, K, lookup)


def test_images_are_added_up_before_anything_is_scored() -> None:
    """IoU of the whole set, not a mean over images."""
    rng = np.random.default_rng(0)
    labels_NHW = rng.integers(0, K, (5, 6, 7), dtype=np.uint8)
    predicted_NHW = rng.integers(0, K, (5, 6, 7), dtype=np.uint8)
    added = sum(confusion_matrix(*pair, K) for pair in zip(labels_NHW, predicted_NHW, strict=True))
    np.testing.assert_array_equal(added, confusion_matrix(labels_NHW, predicted_NHW, K))


def test_rows_are_the_truth() -> None:
    confusion = confusion_matrix(np.array([[1]], np.uint8), np.array([[0]], np.uint8), 2)
    np.testing.assert_array_equal(confusion, [[0, 0], [1, 0]])


def test_void_is_left_out_whatever_is_predicted_there() -> None:
    labels_HW = np.array([[VOID, 0]], np.uint8)
    np.testing.assert_array_equal(confusion_matrix(labels_HW, np.array([[9, 0]], np.uint8), 1), [[1]])
    assert confusion_matrix(np.full((2, 2), VOID, np.uint8), np.zeros((2, 2), np.uint8), 3).sum() == 0


@pytest.mark.parametrize(
    ("labels", "predicted", "message"),
    [([0, 2], [0, 0], "channel 2 with 2 classes"), ([0, 0], [0, 3], "channel 3"), ([0], [0, 1], "differ in shape")],
)
def test_values_that_are_no_channel_are_refused(labels: list[int], predicted: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(labels, np.uint8), np.array(predicted, np.uint8), 2)


@pytest.mark.parametrize("class_count", [0, 256])
def test_more_classes_than_channels_beside_void_are_refused(class_count: int) -> None:
    with pytest.raises(ValueError, match="classes"):
        confusion_matrix(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8), class_count)


def test_255_classes_are_counted() -> None:
    labels_HW = np.arange(255, dtype=np.uint8)[None]
    np.testing.assert_array_equal(confusion_matrix(labels_HW, labels_HW, 255), np.eye(255))


def test_a_class_without_a_pixel_has_no_iou_and_is_out_of_every_mean() -> None:
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(class_iou(confusion), [3 / 4, 4 / 5, np.nan])
    metrics = score(confusion, ["a", "b", "c"], old_count=2, background=None, images=1)
    assert metrics.iou == {"a": 0.75, "b": 0.8, "c": None}
    assert metrics.miou_new is None
    assert metrics.hiou is None
    assert metrics.miou_all == metrics.miou_old == pytest.approx(0.775)


def test_a_class_that_is_only_predicted_has_iou_0_and_no_accuracy() -> None:
    confusion = np.array([[3, 1], [0, 0]])
    np.testing.assert_allclose(class_iou(confusion), [0.75, 0.0])
    np.testing.assert_allclose(class_accuracy(confusion), [0.75, np.nan])


def test_old_new_and_background_are_averaged_as_their_names_say() -> None:
    confusion = np.diag([10, 10, 10, 10])
    confusion[0, 3] = 10  # background called new
    confusion[1, 2] = 30  # an old class called another old one
    iou = [10 / 20, 10 / 40, 10 / 40, 10 / 20]
    metrics = score(confusion, ["background", "a", "b", "new"], old_count=3, background="background", images=7)
    assert metrics.images == 7
    assert metrics.miou_old == pytest.approx(sum(iou[:3]) / 3)
    assert metrics.miou_old_without_background == pytest.approx((iou[1] + iou[2]) / 2)
    assert metrics.miou_new == pytest.approx(iou[3])
    assert metrics.miou_all == pytest.approx(sum(iou) / 4)
    assert metrics.miou_all_without_background == pytest.approx(sum(iou[1:]) / 3)
    assert metrics.mpa == pytest.approx(40 / 80)
    assert metrics.mca == pytest.approx((1 / 2 + 1 / 4 + 1 + 1) / 4)
    assert metrics.hiou == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_the_background_need_not_be_channel_0_nor_exist() -> None:
    confusion = np.diag([1, 1])
    confusion[0, 1] = 1
    assert score(confusion, ["a", "bg"], old_count=0, background="bg", images=1).miou_all_without_background == 0.5
    assert score(confusion, ["a", "b"], old_count=0, background=None, images=1).miou_all_without_background == 0.5


def test_at_step_0_every_class_is_new_and_nothing_is_old() -> None:
    metrics = score(np.diag([1, 2]), ["a", "b"], old_count=0, background=None, images=1)
    assert (metrics.miou_old, metrics.miou_new, metrics.hiou) == (None, 1.0, None)


def test_a_model_that_lost_all_old_classes_has_harmonic_mean_0_and_not_none() -> None:
    metrics = score(np.array([[0, 5], [0, 5]]), ["old", "new"], old_count=1, background=None, images=1)
    assert (metrics.miou_old, metrics.hiou) == (0.0, 0.0)
    both_lost = score(np.array([[0, 5], [5, 0]]), ["old", "new"], old_count=1, background=None, images=1)
    assert both_lost.hiou == 0.0


def test_names_that_do_not_fit_the_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="for 1 classes"):
        score(np.diag([1, 2]), ["a"], old_count=0, background=None, images=1)


def test_retention_counts_the_pixels_whose_truth_is_old_and_no_others() -> None:
    confusion = np.array([[8, 1, 1], [2, 8, 0], [5, 0, 5]])
    kept = retention_confusion(confusion, 2)
    np.testing.assert_array_equal(kept, [[8, 1, 1], [2, 8, 0], [0, 0, 0]])
    np.testing.assert_array_equal(confusion[2], [5, 0, 5])  # the matrix that was given is as it was
    # an old pixel that turned into the new class (column 2) is a miss of class 0; a new object that was called class 0
    # (5 pixels) is not held against it
    np.testing.assert_allclose(class_iou(kept)[:2], [8 / (8 + 2 + 2), 8 / (8 + 1 + 2)])


def test_a_parent_and_a_child_that_kept_everything_have_the_same_retention() -> None:
    """The parent calls each of the 5 new pixels class 0, having no other name for them."""
    child, parent = np.array([[9, 1, 0], [0, 10, 0], [0, 0, 5]]), np.array([[9, 1, 0], [0, 10, 0], [5, 0, 0]])
    np.testing.assert_array_equal(retention_confusion(child, 2), retention_confusion(parent, 2))
    assert class_iou(parent)[0] < class_iou(child)[0]  # which the whole matrix would call forgetting


def test_retention_at_step_0_is_empty() -> None:
    assert retention_confusion(np.diag([1, 2]), 0).sum() == 0
