"""Thresholds of pseudo-labels: the true median of the teacher's entropy over hidden pixels, for each class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import HEIGHT_PX, WIDTH_PX, small_model

from edge_ilseg import pseudo_labels
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.step_view import StepView
from edge_ilseg.evaluate import predict_masks
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.losses import entropy
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import no_progress
from edge_ilseg.scenario import label_lookup

SHAPES = Shapes(train=4, height_px=48, width_px=48)


@pytest.fixture(scope="module")
def teacher() -> SegmentationModel:
    return small_model((4,), seed=3)


@pytest.fixture(scope="module")
def view() -> StepView:
    classes = SHAPES.info.classes
    lookup = label_lookup("disjoint", classes, "background", old=classes[:4], new=classes[4:])
    return StepView(SHAPES, SHAPES.ids("train"), lookup)


def expected_thresholds(teacher: SegmentationModel, view: StepView) -> list[float]:
    values: dict[int, list[float]] = {channel: [] for channel in range(4)}
    for image_id in view.image_ids:
        image_HWC, labels_HW = view.read(image_id)
        small_HWC = resize_image(image_HWC, HEIGHT_PX, WIDTH_PX)
        labels_HW = resize_mask(labels_HW, HEIGHT_PX, WIDTH_PX)
        with torch.no_grad():
            entropy_HW = entropy(teacher(normalize(torch.from_numpy(small_HWC)[None], teacher.spec)).logits_NCHW)[0]
        (mask_HW,) = predict_masks(teacher, [image_HWC])
        for y in range(HEIGHT_PX):
            for x in range(WIDTH_PX):
                if labels_HW[y, x] == 0:
                    values[int(mask_HW[y, x])].append(float(entropy_HW[y, x]))
    return [max(float(np.median(item)), 0.001) if item else 0.001 for item in values.values()]


def test_thresholds_are_the_medians_of_a_plain_loop(teacher: SegmentationModel, view: StepView) -> None:
    found = pseudo_labels.entropy_thresholds(teacher, view, 0, no_progress)
    expected = expected_thresholds(teacher, view)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert sum(value > 0.001 for value in expected) >= 2


def test_of_many_pixels_a_regular_grid_is_taken(
    teacher: SegmentationModel, view: StepView, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pseudo_labels.entropy_thresholds(teacher, view, 0, no_progress)
    monkeypatch.setattr(pseudo_labels, "MAX_VALUES", HEIGHT_PX * WIDTH_PX)
    grid = pseudo_labels.entropy_thresholds(teacher, view, 0, no_progress)
    seen = whole > pseudo_labels.SMALLEST_THRESHOLD
    torch.testing.assert_close(grid[seen], whole[seen], rtol=0.3, atol=0.05)
    assert not torch.equal(grid, whole)


def test_where_nothing_is_hidden_nothing_is_believed(teacher: SegmentationModel, view: StepView) -> None:
    found = pseudo_labels.entropy_thresholds(teacher, view, None, no_progress)
    assert found.tolist() == pytest.approx([pseudo_labels.SMALLEST_THRESHOLD] * 4)
