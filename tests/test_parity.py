"""The parity chain's figures, against figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from edge_ilseg.bundle import ParityRow
from edge_ilseg.errors import EXIT_PARITY, ExportError, ParityError
from edge_ilseg.export import parity
from edge_ilseg.export.parity import ParityImage, Stage, check_parity, measure_parity
from edge_ilseg.export.sessions import Outputs, Predict

CLASSES = ("background", "cat", "boat")


def fixed(mask_HW: list[list[int]], shift: float = 0.0) -> Predict:
    """A model that always says `mask_HW`: logit 3 for the class, -1 for the others, all moved by `shift`."""
    mask_NHW = np.array([mask_HW], dtype=np.uint8)
    logits_NCHW = np.moveaxis(np.eye(3, dtype=np.float32)[mask_NHW] * 4.0 - 1.0, 3, 1) + np.float32(shift)
    return lambda _: Outputs(logits_NCHW, mask_NHW)


def images(labels: list[list[list[int]] | None]) -> Iterator[ParityImage]:
    for item in labels:
        labels_HW = None if item is None else np.array(item, dtype=np.uint8)
        yield ParityImage(np.zeros((1, 2, 2, 3), dtype=np.uint8), labels_HW)


REFERENCE = Stage(parity.TORCH, fixed([[0, 1], [2, 2]]))
OTHER = Stage(parity.ONNX_INT8, fixed([[0, 1], [2, 0]], shift=0.5))


def measure(labels: list[list[list[int]] | None], old_count: int = 2) -> tuple[ParityRow, ...]:
    return measure_parity([REFERENCE, OTHER], images(labels), CLASSES, old_count=old_count, background="background")


def test_the_reference_agrees_with_itself() -> None:
    row = measure([None])[0]
    assert row == ParityRow("torch", 0.0, 0.0, 1.0, None, None)


def test_error_and_agreement_are_over_all_images() -> None:
    row = measure([None, None])[1]
    # 10 of 12 logits are off by 0.5; where the class differs, one by 4.5 and one by -3.5. Reference: 4 x 9 + 8 x 1.
    assert row.max_abs == 4.5
    assert row.relative_rmse == pytest.approx(math.sqrt((10 * 0.25 + 4.5**2 + 3.5**2) / 44.0))
    assert row.agreement == 0.75


def test_miou_is_taken_at_the_size_of_the_labels() -> None:
    labels = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 255, 255]]
    torch_row, int8_row = measure([labels])
    assert (torch_row.miou_old, torch_row.miou_new) == (1.0, 1.0)
    assert int8_row.miou_old == pytest.approx((4 / 6 + 1.0) / 2)
    assert int8_row.miou_new == pytest.approx(4 / 6)


def test_a_base_step_has_no_old_classes() -> None:
    row = measure([[[0, 1], [2, 2]]], old_count=0)[0]
    assert (row.miou_old, row.miou_new) == (None, 1.0)


def test_no_image_is_an_error() -> None:
    with pytest.raises(ExportError, match="no image"):
        measure([])


def test_a_reference_of_zeros_has_no_relative_error() -> None:
    zeros = Outputs(np.zeros((1, 3, 2, 2), dtype=np.float32), np.zeros((1, 2, 2), dtype=np.uint8))
    rows = measure_parity([Stage("torch", lambda _: zeros)], images([None]), CLASSES, old_count=0, background=None)
    assert rows[0].relative_rmse is None


@pytest.mark.parametrize(
    ("stage", "agreement", "limit"),
    [("onnx fp32", 0.99989, "99.99%"), ("openvino fp32", 0.99989, "99.99%"), ("openvino fp16", 0.9949, "99.50%")],
)
def test_too_little_agreement_names_the_stage_the_figure_and_the_limit(
    stage: str, agreement: float, limit: str
) -> None:
    row = ParityRow(stage, 0.25, 0.1, agreement, None, None)
    with pytest.raises(ParityError) as caught:
        check_parity([ParityRow("torch", 0.0, 0.0, 1.0, None, None), row])
    assert stage in str(caught.value)
    assert f"{agreement:.4%}" in str(caught.value)
    assert limit in str(caught.value)
    assert caught.value.exit_code == EXIT_PARITY
    check_parity([msgspec.structs.replace(row, agreement=0.99995)])


@pytest.mark.parametrize("stage", ["onnx int8", "openvino int8"])
def test_int8_is_checked_only_against_a_limit_that_was_given(stage: str) -> None:
    row = ParityRow(stage, 9.0, 0.5, 0.6, None, None)
    check_parity([row])
    check_parity([row], min_int8_agreement=0.6)
    with pytest.raises(ParityError, match=f"'{stage}'"):
        check_parity([row], min_int8_agreement=0.61)


def test_logits_that_are_not_finite_are_an_error_in_every_stage() -> None:
    nan_NCHW = np.full((1, 3, 2, 2), np.nan, dtype=np.float32)
    broken = Stage("onnx int8", lambda image: Outputs(nan_NCHW, REFERENCE.predict(image).mask_NHW))
    rows = measure_parity([REFERENCE, broken], images([None, None]), CLASSES, old_count=0, background=None)
    with pytest.raises(ParityError, match="not finite"):
        check_parity(rows)


def test_the_size_of_a_form_stands_in_its_row() -> None:
    stages = [REFERENCE, OTHER._replace(model_bytes=1234)]
    rows = measure_parity(stages, images([None]), CLASSES, old_count=2, background="background")
    assert [row.model_bytes for row in rows] == [None, 1234]
    assert [row.latency_ms for row in rows] == [None, None]


def test_latency_is_the_median_of_runs_in_turns_after_one_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that a run moves on by as much as it is told to take, in ms."""
    clock = {"ns": 0}
    order: list[str] = []

    def taking(name: str, durations_ms: list[float]) -> Stage:
        left = iter(durations_ms)

        def predict(image_NHWC: np.ndarray) -> Outputs:
            order.append(name)
            clock["ns"] += round(next(left) * 1e6)
            return REFERENCE.predict(image_NHWC)

        return Stage(name, predict)

    monkeypatch.setattr(parity.time, "perf_counter_ns", lambda: clock["ns"])
    stages = [taking("slow", [900.0, 30.0, 10.0, 20.0]), taking("fast", [500.0, 1.5, 1.0, 700.0])]
    assert parity.time_stages(stages, np.zeros((1, 2, 2, 3), np.uint8), 3) == pytest.approx((20.0, 1.5))
    assert order == ["slow", "fast"] * 4


def test_another_limit_for_fp16_can_be_set() -> None:
    row = ParityRow("openvino fp16", 0.1, 0.003, 0.9937, None, None)
    check_parity([row], min_fp16_agreement=0.993)
    with pytest.raises(ParityError, match="half precision"):
        check_parity([row])


def test_the_sums_over_many_images_are_streamed() -> None:
    seen = []

    def one_at_a_time() -> Iterator[ParityImage]:
        for number in range(3):
            assert len(seen) == number
            yield ParityImage(np.full((1, 2, 2, 3), number, dtype=np.uint8), None)

    def note(image_NHWC: np.ndarray) -> Outputs:
        seen.append(int(image_NHWC[0, 0, 0, 0]))
        return REFERENCE.predict(image_NHWC)

    measure_parity([REFERENCE, Stage("onnx fp32", note)], one_at_a_time(), CLASSES, old_count=0, background=None)
    assert seen == [0, 1, 2]
