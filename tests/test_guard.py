"""The guard: what int8 costs the old classes, against intersections and unions that are counted pixel by pixel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_ilseg.export.guard import AT_HAND, GOLDEN, LABELLED, MIN_SHARE, Guard, GuardSet, Masks, counted_drop
from edge_ilseg.int8_record import GuardImages, GuardRow

CLASSES = ("background", "cat", "dog", "boat")
OLD = (0, 1, 2)
HEIGHT_PX, WIDTH_PX = 20, 50
Mask = NDArray[np.uint8]


def image(number: int, height_px: int = HEIGHT_PX, width_px: int = WIDTH_PX) -> Mask:
    return np.full((height_px, width_px, 3), number, dtype=np.uint8)


def always(masks: Sequence[Mask]) -> Masks:
    """A model that answers image `number` with `masks[number]`."""
    return lambda image_HWC: masks[int(image_HWC[0, 0, 0])]


def made_up(seed: int, channels: int, *, like: Sequence[Mask] | None = None, count: int = 3) -> list[Mask]:
    """Random masks; with `like` nine of ten pixels are its."""
    rng = np.random.default_rng(seed)
    masks = [rng.integers(0, channels, (HEIGHT_PX, WIDTH_PX)).astype(np.uint8) for _ in range(count)]
    if like is None:
        return masks
    return [np.where(rng.random(mask.shape) < 0.9, old, mask) for mask, old in zip(masks, like, strict=True)]


def guard_set(
    kind: GuardImages,
    labels: Sequence[Mask | None],
    judged: tuple[int, ...] = OLD,
    size_px: tuple[int, int] = (HEIGHT_PX, WIDTH_PX),
) -> GuardSet:
    return GuardSet(kind, lambda: ((image(number, *size_px), item) for number, item in enumerate(labels)), judged)


def loop_iou(references: Sequence[Mask], predictions: Sequence[Mask], channel: int) -> float:
    """The IoU of a class, pixel by pixel; a prediction of another size is looked up at the nearest pixel centre."""
    both = either = 0
    for reference, prediction in zip(references, predictions, strict=True):
        for y in range(reference.shape[0]):
            for x in range(reference.shape[1]):
                row = int((y + 0.5) * prediction.shape[0] / reference.shape[0])
                column = int((x + 0.5) * prediction.shape[1] / reference.shape[1])
                if reference[y, x] != 255:
                    true, found = reference[y, x] == channel, prediction[row, column] == channel
                    both += true and found
                    either += true or found
    return both / either


def loop_row(
    references: Sequence[Mask], fp32: Sequence[Mask], int8: Sequence[Mask], judged: Sequence[int] = OLD
) -> tuple[float, float, float, str, float]:
    """Figures of a row: mean of fp32, of int8, of the drops, the worst class and its drop."""
    exact = [loop_iou(references, fp32, channel) for channel in judged]
    found = [loop_iou(references, int8, channel) for channel in judged]
    drops = [100 * (a - b) for a, b in zip(exact, found, strict=True)]
    worst = max(range(len(judged)), key=lambda position: drops[position])
    count = len(judged)
    return sum(exact) / count, sum(found) / count, sum(drops) / count, CLASSES[judged[worst]], drops[worst]


def figures(row: GuardRow) -> tuple[float, float, float, str, float]:
    return row.fp32, row.int8, row.drop_points, row.worst_class, row.worst_class_drop_points


TEACHER = made_up(0, 3)
FP32 = made_up(1, 4, like=TEACHER)
INT8 = made_up(2, 4, like=FP32)


@pytest.mark.parametrize("kind", [AT_HAND, GOLDEN])
def test_without_labels_the_drop_is_what_int8_agrees_less_with_the_teacher_than_fp32(kind: GuardImages) -> None:
    guard = Guard([guard_set(kind, [None] * 3)], always(FP32), {"openvino": always(TEACHER)}, CLASSES)
    (row,) = guard.rows("openvino", always(INT8))
    assert (row.runtime, row.images, row.count) == ("openvino", kind, 3)
    assert figures(row) == pytest.approx(loop_row(TEACHER, FP32, INT8))
    assert row.drop_points > 1


def test_labels_are_compared_at_their_own_size_and_void_is_left_out() -> None:
    rng = np.random.default_rng(3)
    labels = [rng.integers(0, 4, (30, 42)).astype(np.uint8) for _ in TEACHER]
    for labels_HW in labels:
        labels_HW[rng.random(labels_HW.shape) < 0.2] = 255
    guard = Guard([guard_set(LABELLED, labels)], always(FP32), {}, CLASSES)
    (row,) = guard.rows("onnxruntime", always(INT8))
    assert figures(row) == pytest.approx(loop_row(labels, FP32, INT8))


def test_each_runtime_has_its_own_teacher() -> None:
    other = made_up(7, 3)
    teachers = {"onnxruntime": always(TEACHER), "openvino": always(other)}
    guard = Guard([guard_set(AT_HAND, [None] * 3)], always(FP32), teachers, CLASSES)
    for runtime, references in (("onnxruntime", TEACHER), ("openvino", other)):
        (row,) = guard.rows(runtime, always(INT8))
        assert figures(row) == pytest.approx(loop_row(references, FP32, INT8))


def test_int8_that_agrees_better_than_fp32_has_a_negative_drop() -> None:
    guard = Guard([guard_set(AT_HAND, [None] * 3)], always(FP32), {"openvino": always(TEACHER)}, CLASSES)
    (row,) = guard.rows("openvino", always(TEACHER))
    assert row.int8 == 1.0
    assert row.drop_points == pytest.approx(100 * (row.fp32 - 1.0))
    assert counted_drop([row]) == row.drop_points < 0


def test_a_new_class_does_not_count_even_where_it_is_lost() -> None:
    labels = made_up(4, 4)
    lost = [np.where(labels_HW == 3, 0, labels_HW).astype(np.uint8) for labels_HW in labels]
    guard = Guard([guard_set(LABELLED, labels, judged=(1, 2))], always(labels), {}, CLASSES)
    (row,) = guard.rows("onnxruntime", always(lost))
    assert (row.fp32, row.int8, row.drop_points) == (1.0, 1.0, 0.0)
    guard = Guard([guard_set(LABELLED, labels, judged=(1, 2, 3))], always(labels), {}, CLASSES)
    (row,) = guard.rows("onnxruntime", always(lost))
    assert (row.worst_class, row.worst_class_drop_points) == ("boat", 100.0)


@pytest.mark.parametrize(("pixels", "is_judged"), [(1, False), (2, True)])
def test_a_class_is_judged_from_a_thousandth_of_the_pixels_on(pixels: int, is_judged: bool) -> None:
    """Rule 3. Two images have 2000 pixels."""
    assert MIN_SHARE == 0.001
    shown = [np.zeros((HEIGHT_PX, WIDTH_PX), dtype=np.uint8) for _ in range(2)]
    shown[0][0, :pixels] = 1
    lost = [np.zeros_like(mask) for mask in shown]
    guard = Guard([guard_set(AT_HAND, [None] * 2)], always(shown), {"openvino": always(shown)}, CLASSES)
    (row,) = guard.rows("openvino", always(lost))
    assert (row.worst_class == "cat") == is_judged
    background_drop = 100 * pixels / 2000
    assert row.drop_points == pytest.approx((100 + background_drop) / 2 if is_judged else background_drop)


def test_a_class_is_judged_by_what_the_reference_shows_not_by_what_is_predicted() -> None:
    shown = [np.zeros((HEIGHT_PX, WIDTH_PX), dtype=np.uint8)]
    with_a_cat = [np.zeros((HEIGHT_PX, WIDTH_PX), dtype=np.uint8)]
    with_a_cat[0][: HEIGHT_PX // 2] = 1
    guard = Guard([guard_set(AT_HAND, [None])], always(with_a_cat), {"openvino": always(shown)}, CLASSES)
    (row,) = guard.rows("openvino", always(shown))
    assert figures(row) == (0.5, 1.0, -50.0, "background", -50.0)
    (row,) = guard.rows("openvino", always(with_a_cat))
    assert figures(row) == (0.5, 0.5, 0.0, "background", 0.0)


def test_where_no_judged_class_is_shown_and_where_there_is_no_image_there_is_no_row() -> None:
    boats = [np.full((HEIGHT_PX, WIDTH_PX), 3, dtype=np.uint8)]
    void = [np.full((HEIGHT_PX, WIDTH_PX), 255, dtype=np.uint8)]
    sets = [guard_set(LABELLED, boats), guard_set(LABELLED, void), guard_set(AT_HAND, [])]
    guard = Guard(sets, always(boats), {"openvino": always(boats)}, CLASSES)
    assert guard.rows("openvino", always(boats)) == ()


def test_a_runtime_without_a_teacher_is_judged_on_labels_alone() -> None:
    labels = made_up(4, 4)
    sets = [guard_set(AT_HAND, [None] * 3), guard_set(GOLDEN, [None] * 3), guard_set(LABELLED, labels)]
    guard = Guard(sets, always(FP32), {"openvino": always(TEACHER)}, CLASSES)
    assert [row.images for row in guard.rows("openvino", always(INT8))] == [AT_HAND, GOLDEN, LABELLED]
    assert [row.images for row in guard.rows("onnxruntime", always(INT8))] == [LABELLED]


def test_teachers_and_fp32_run_once_for_each_image_however_many_int8_models_are_judged() -> None:
    seen: Counter[tuple[str, int]] = Counter()

    def counting(name: str, masks: Sequence[Mask]) -> Masks:
        def run(image_HWC: NDArray[np.uint8]) -> Mask:
            seen[name, int(image_HWC[0, 0, 0])] += 1
            return masks[int(image_HWC[0, 0, 0])]

        return run

    guard = Guard(
        [guard_set(AT_HAND, [None] * 3), guard_set(LABELLED, TEACHER)],
        counting("fp32", FP32),
        {name: counting(name, TEACHER) for name in ("onnxruntime", "openvino")},
        CLASSES,
    )
    first, again, other = (guard.rows("openvino", always(masks)) for masks in (INT8, INT8, TEACHER))
    assert first == again != other
    guard.rows("onnxruntime", always(INT8))
    assert seen == {
        (name, number): 2 if name == "fp32" else 1  # fp32 once for each of the two sets
        for name in ("fp32", "onnxruntime", "openvino")
        for number in range(3)
    }


def test_labelled_images_are_read_one_at_a_time() -> None:
    events: list[tuple[str, int]] = []

    def read() -> Iterator[tuple[NDArray[np.uint8], Mask]]:
        for number in range(3):
            events.append(("read", number))
            yield image(number), TEACHER[number]

    def model(image_HWC: NDArray[np.uint8]) -> Mask:
        events.append(("run", int(image_HWC[0, 0, 0])))
        return always(FP32)(image_HWC)

    Guard([GuardSet(LABELLED, read, OLD)], model, {}, CLASSES).rows("openvino", model)
    assert events == [(event, number) for _ in ("fp32", "int8") for number in range(3) for event in ("read", "run")]


def test_progress_names_the_model_and_the_images() -> None:
    told: list[str] = []
    sets = [guard_set(AT_HAND, [None] * 3), guard_set(LABELLED, made_up(4, 4))]
    teachers = {"openvino": always(TEACHER)}
    guard = Guard(sets, always(FP32), teachers, CLASSES, progress=lambda text, _: told.append(text))
    guard.rows("openvino", always(INT8))
    for who in ("the parent's int8", "fp32", "openvino"):
        assert any(who in text and AT_HAND in text for text in told), who
    assert any(LABELLED in text for text in told)


def row(images: GuardImages, drop: float) -> GuardRow:
    return GuardRow("openvino", images, 4, 0.9, 0.9 - drop / 100, drop, "cat", drop, {"cat": (0.9, 0.9 - drop / 100)})


def test_the_highest_drop_counts_and_golden_images_never_do() -> None:
    assert counted_drop([row(AT_HAND, 1.0), row(GOLDEN, 50.0), row(LABELLED, 2.5), row(AT_HAND, -3.0)]) == 2.5
    assert counted_drop([row(AT_HAND, -1.0), row(GOLDEN, 50.0)]) == -1.0
    assert counted_drop([row(GOLDEN, 50.0)]) is None
    assert counted_drop([]) is None
