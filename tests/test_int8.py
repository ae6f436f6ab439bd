"""From a float ONNX to int8: one attempt after another, on real graphs with ranges that really fail."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from bundles import BASE_COUNT, class_entries, export_grown, grown_model, images_at_hand, step_entry, stretch_ranges
from fakes import HEIGHT_PX, WIDTH_PX
from numpy.typing import NDArray

from edge_ilseg.calibration.collect import collect_extremes, quantized_nodes
from edge_ilseg.calibration.merge import find_silent_channels
from edge_ilseg.calibration.moments import collect_moments
from edge_ilseg.calibration.sample import CalibrationImages
from edge_ilseg.devices.facts import read_device_facts
from edge_ilseg.devices.runtime import load_session
from edge_ilseg.errors import ExportError, MissingPackageError
from edge_ilseg.export import int8 as int8_module
from edge_ilseg.export import step_images
from edge_ilseg.export.executed import executed_convolutions
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.golden import golden_scenes
from edge_ilseg.export.int8 import Int8, check_int8_request, make_int8
from edge_ilseg.export.parent import ParentBundle, load_parent
from edge_ilseg.export.pieces import read_constants
from edge_ilseg.export.request import Evaluation, ExportRequest, LabelledImage, Subject
from edge_ilseg.export.sessions import Predict, load_onnx, load_openvino
from edge_ilseg.export.sqnr import layers_of_worst_signal
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.int8_record import RangesPolicy, SqnrRow, WeightRounding
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import no_progress

LIMIT = 20.0
"""Points, between what works here (a few points) and what does not (more than 50)."""
IMPOSSIBLE = -1000.0
Floats = dict[int, tuple[SegmentationModel, Path]]


class Made(msgspec.Struct):
    """What came of one call of `make_int8`, and where its graph is."""

    int8: Int8
    path: Path

    @property
    def attempts(self) -> list[tuple[str, str]]:
        return [(attempt.attempt, attempt.verdict) for attempt in self.int8.record.attempts]

    def float_convolutions(self) -> set[str]:
        """Those that onnxruntime does not compute in int8."""
        return {name for name, kind in executed_convolutions(self.path, "onnxruntime").items() if kind == "f32"}


class Maker:
    """Calls `make_int8` for a step on a copy of its float graph."""

    def __init__(self, floats: Floats, folder: Path) -> None:
        self.floats = floats
        self.folder = folder

    def subject(self, index: int, evaluation: Evaluation | None = None, **settings: object) -> Subject:
        model = self.floats[index][0]
        fixed: dict[str, object] = {"targets": ("onnx",), "precisions": ("int8",)}
        request = ExportRequest(**{**fixed, **settings})  # type: ignore[arg-type]
        return Subject(model, request, step_entry(index), class_entries(model), "c0", evaluation, no_progress)

    def __call__(
        self,
        index: int,
        parent: ParentBundle | None = None,
        *,
        images: CalibrationImages | None = None,
        evaluation: Evaluation | None = None,
        **settings: object,
    ) -> Made:
        work = self.folder / f"work{len(list(self.folder.iterdir()))}"
        work.mkdir()
        model, path = self.floats[index]
        shutil.copyfile(path, work / "float.onnx")
        golden_NHWC = golden_scenes(2, model.spec.input_height_px, model.spec.input_width_px, 0)
        int8 = make_int8(self.subject(index, evaluation, **settings), work, images, parent, golden_NHWC)
        return Made(int8, work / "int8.onnx")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Floats:
    """The networks of steps 0 and 1 with their float graphs; each takes seconds to export."""
    folder = tmp_path_factory.mktemp("float")
    found = {index: (grown_model(*additions), folder / f"{index}.onnx") for index, additions in enumerate([(), (2,)])}
    for model, path in found.values():
        write_float_onnx(model, path)
    return found


@pytest.fixture
def make(floats: Floats, tmp_path: Path) -> Maker:
    return Maker(floats, tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of step 0."""
    folder = tmp_path_factory.mktemp("base") / "00-step"
    export_grown(folder, targets=("onnx", "openvino"))
    return folder


@pytest.fixture(scope="module")
def parent(base: Path) -> ParentBundle:
    return load_parent(base, step_entry(1))


def test_averaged_extremes_have_a_fallback_that_clips_nothing(make: Maker, parent: ParentBundle) -> None:
    averaged = make(1, parent, images=NEW_IMAGES, ranges_method="mean-minmax", max_old_drop_points=None)
    assert averaged.int8.calibration.method == "mean-minmax"
    assert averaged.attempts == [("carry", "taken")]
    with pytest.raises(ExportError, match="whatever was tried") as raised:
        make(
            1,
            parent,
            images=NEW_IMAGES,
            ranges="union",
            ranges_method="mean-minmax",
            max_old_drop_points=IMPOSSIBLE,
        )
    assert str(raised.value.found).count("union") == 2


def test_where_nearly_all_is_kept_in_float_the_ladder_still_ends_with_weights_only(
    make: Maker, wide_at_the_end: ParentBundle
) -> None:
    nearly_all = ("encoder", "decoder.branches", "decoder.pooling", "decoder.projection")
    with pytest.raises(ExportError, match="whatever was tried") as raised:
        make(1, wide_at_the_end, images=images_at_hand(), max_old_drop_points=IMPOSSIBLE, float_layers=nearly_all)
    assert "weights-only" in str(raised.value.found)


def stretched(base: Path, factory: pytest.TempPathFactory, factor: float, prefix: str) -> ParentBundle:
    return load_parent(stretch_ranges(base, factory.mktemp("stretched") / "b", factor, (prefix,)), step_entry(1))


@pytest.fixture(scope="module")
def narrow(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ParentBundle:
    """The ranges of the frozen encoder clip nearly everything; their envelope with measured ones clips nothing."""
    return stretched(base, tmp_path_factory, 0.05, "encoder.")


@pytest.fixture(scope="module")
def wide_at_the_end(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ParentBundle:
    """One tensor has a range in which all its values fall on one level, and no envelope makes a range narrower."""
    return stretched(base, tmp_path_factory, 1000.0, "decoder.projection/")


@pytest.fixture(scope="module")
def wide_at_the_start(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ParentBundle:
    """The values of one early layer fall on a few levels, and the envelope is a little better than the parent's own."""
    return stretched(base, tmp_path_factory, 300.0, "encoder.stages.0.0")


@pytest.fixture(scope="module")
def wide(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ParentBundle:
    """All of them do."""
    return stretched(base, tmp_path_factory, 1000.0, "")


NEW_IMAGES = images_at_hand(seed=1)
NEARLY_BLACK = np.eye(9, dtype=np.uint8)[..., np.newaxis].repeat(3, axis=2)
BLACK = CalibrationImages(
    ("black",),
    "00",
    {**{key: NEW_IMAGES.read(key) for key in NEW_IMAGES.ids}, "black": NEARLY_BLACK}.__getitem__,
    at_hand=NEW_IMAGES.at_hand,
)
"""Calibrates on what excites nothing, and is judged on the same images as the others."""


def labelled(index: int) -> list[LabelledImage]:
    """Images with labels that the models know nothing of, every class of a step among them, at a size of their own."""
    rng = np.random.default_rng(0)
    images = images_at_hand(2, seed=5)
    count = BASE_COUNT + 2 * index
    return [(images.read(key), rng.integers(0, count, (36, 40)).astype(np.uint8)) for key in images.ids]


def mean_iou(references: Sequence[NDArray[np.uint8]], found: Sequence[NDArray[np.uint8]], count: int) -> float:
    """Mean IoU of the first `count` classes that the references show on a thousandth of their pixels."""
    shown, masks = np.stack(references), np.stack(found)
    ious = [
        ((shown == channel) & (masks == channel)).sum() / ((shown == channel) | (masks == channel)).sum()
        for channel in range(count)
        if (shown == channel).mean() >= 0.001
    ]
    assert len(ious) > 1
    return float(np.mean(ious))


def test_what_was_asked_for_is_taken_where_it_keeps_the_old_classes(make: Maker, parent: ParentBundle) -> None:
    made = make(1, parent, images=NEW_IMAGES)
    record, calibration = made.int8.record, made.int8.calibration
    assert made.attempts == [("carry", "taken")]
    assert (record.asked, record.taken, record.max_old_drop_points) == ("carry", "carry", 2.0)
    assert [row.images for row in record.attempts[0].rows] == ["images at hand", "golden images"]
    assert record.attempts[0].max_drop_points == record.attempts[0].rows[0].drop_points <= 2.0
    assert (calibration.method, calibration.policy, calibration.float_layers) == ("minmax", "carry", ())
    assert (calibration.image_ids, calibration.images_sha256) == (NEW_IMAGES.ids, NEW_IMAGES.images_sha256)
    assert made.int8.ranges is not None
    assert made.int8.ranges.image_ids == NEW_IMAGES.ids
    assert made.float_convolutions() == set()
    figures = [row.sqnr_db for row in record.worst_sqnr if row.sqnr_db is not None]
    assert len(figures) == 10
    assert figures == sorted(figures)


def test_agreement_is_that_of_the_float_and_the_int8_graph_with_the_parents_int8_model(
    make: Maker, parent: ParentBundle
) -> None:
    made = make(1, parent, images=NEW_IMAGES)
    row = made.int8.record.attempts[0].rows[0]
    images = [resize_image(NEW_IMAGES.read(key), HEIGHT_PX, WIDTH_PX) for key in NEW_IMAGES.at_hand]
    teacher = load_session(parent.folder, parent.manifest.model("onnxruntime", "int8"))
    references = [teacher.mask(image_HWC) for image_HWC in images]
    for path, agreement in ((made.path.with_name("float.onnx"), row.fp32), (made.path, row.int8)):
        predict = load_onnx(path)
        found = [predict(image_HWC[np.newaxis]).mask_NHW[0] for image_HWC in images]
        assert agreement == pytest.approx(mean_iou(references, found, BASE_COUNT))
    assert row.drop_points == pytest.approx(100 * (row.fp32 - row.int8))
    assert row.count == 3


@pytest.mark.parametrize(
    ("index", "kinds"),
    [(0, ["labelled images"]), (1, ["images at hand", "golden images", "labelled images"])],
)
def test_labelled_images_judge_all_classes_at_step_0_and_the_old_ones_later(
    index: int, kinds: list[str], make: Maker, parent: ParentBundle
) -> None:
    images = labelled(index)
    made = make(index, parent if index else None, images=images_at_hand(seed=index), evaluation=lambda: images)
    rows = made.int8.record.attempts[0].rows
    assert [row.images for row in rows] == kinds
    labels = [labels_HW for _, labels_HW in images]
    for path, miou in ((made.path.with_name("float.onnx"), rows[-1].fp32), (made.path, rows[-1].int8)):
        predict = load_onnx(path)
        masks = [
            predict(resize_image(image_HWC, HEIGHT_PX, WIDTH_PX)[np.newaxis]).mask_NHW[0] for image_HWC, _ in images
        ]
        assert miou == pytest.approx(mean_iou(labels, [resize_mask(mask, 36, 40) for mask in masks], BASE_COUNT))


def test_at_step_0_a_class_that_int8_loses_counts(make: Maker) -> None:
    """The labels are what fp32 says, so all that int8 does otherwise is a loss."""
    images = images_at_hand(seed=5)
    predict = load_onnx(make.floats[0][1])
    resized = [resize_image(images.read(key), HEIGHT_PX, WIDTH_PX) for key in images.ids]
    answers = [(image_HWC, predict(image_HWC[np.newaxis]).mask_NHW[0]) for image_HWC in resized]
    black = dataclasses.replace(BLACK, at_hand=())
    made = make(0, images=black, evaluation=lambda: answers, max_old_drop_points=None)
    (row,) = made.int8.record.attempts[0].rows
    assert (row.fp32, row.count) == (1.0, 3)
    assert made.int8.record.attempts[0].max_drop_points == row.drop_points > 50
    with pytest.raises(ExportError, match=r"labelled images, onnxruntime; mixed"):
        make(0, images=black, evaluation=lambda: answers, max_old_drop_points=-1.0)
    assert make(0, images=black, evaluation=lambda: answers, max_old_drop_points=LIMIT).attempts[-1] == (
        "weights-only",
        "taken",
    )


def test_without_a_limit_the_first_attempt_is_taken_and_its_drop_recorded(make: Maker, narrow: ParentBundle) -> None:
    made = make(1, narrow, images=NEW_IMAGES, max_old_drop_points=None)
    (attempt,) = made.int8.record.attempts
    assert (attempt.attempt, attempt.verdict, made.int8.record.max_old_drop_points) == ("carry", "taken", None)
    assert attempt.max_drop_points is not None
    assert attempt.max_drop_points > 50
    assert f"{attempt.max_drop_points:+.2f} points" in attempt.reason


def test_where_the_parents_ranges_clip_the_envelope_is_taken(make: Maker, narrow: ParentBundle) -> None:
    made = make(1, narrow, images=NEW_IMAGES, max_old_drop_points=LIMIT)
    assert made.attempts == [("carry", "refused"), ("union", "taken")]
    refused, taken = made.int8.record.attempts
    assert refused.max_drop_points is not None
    assert taken.max_drop_points is not None
    assert refused.max_drop_points > 50 > LIMIT >= taken.max_drop_points
    assert (made.int8.record.asked, made.int8.record.taken, made.int8.calibration.policy) == ("carry", "union", "union")
    assert made.int8.ranges is not None
    tensor = made.int8.ranges.tensors["encoder.stages.2.1/Clip"]
    assert (tensor.origin, tensor.steps) == ("merged", ("00-step", "01-step"))
    assert made.int8.record.merged == len(narrow.ranges.tensors if narrow.ranges else ())


def weights_of(path: Path, prefix: str) -> dict[str, bytes]:
    constants = read_constants([path])
    return {k: v for k, v in constants.items() if k.startswith(prefix) and k.endswith("_quantized")}


def test_the_weights_of_a_frozen_encoder_are_the_parents_however_others_are_rounded(
    make: Maker, parent: ParentBundle
) -> None:
    both: tuple[WeightRounding, ...] = ("fitted", "nearest")
    made = {name: make(1, parent, images=NEW_IMAGES, rounding=name, max_old_drop_points=None) for name in both}
    before = {name: value for name, value in parent.int8_constants().items() if name.endswith("_quantized")}
    for name, item in made.items():
        assert (item.int8.calibration.rounding, item.int8.record.taken) == (name, "carry")
        encoder = weights_of(item.path, "encoder.")
        assert encoder == {key: before[key] for key in encoder}
        assert len(encoder) > 10
    assert weights_of(made["fitted"].path, "decoder.") != weights_of(made["nearest"].path, "decoder.")


def test_an_envelope_keeps_the_frozen_weights_and_moves_what_they_are_scaled_by(
    make: Maker, narrow: ParentBundle
) -> None:
    made = make(1, narrow, images=NEW_IMAGES, max_old_drop_points=LIMIT)
    assert made.int8.record.taken == "union"
    before, now = narrow.int8_constants(), read_constants([made.path])
    weights = [name for name in now if name.startswith("encoder.") and name.endswith(".weight_quantized")]
    assert len(weights) > 4
    assert all(now[name] == before[name] for name in weights)
    scales = [name for name in now if name.startswith("encoder.") and name.endswith(".bias_quantized_scale")]
    assert any(now[name] != before[name] for name in scales)


def test_where_the_envelope_is_what_was_tried_already_it_is_not_tried_again(make: Maker, parent: ParentBundle) -> None:
    with pytest.raises(ExportError, match="whatever was tried") as raised:
        make(1, parent, images=images_at_hand(), max_old_drop_points=IMPOSSIBLE)  # what the parent's are from
    assert [part.split(":")[0] for part in str(raised.value.found).split("; ")] == [
        "carry",
        "mixed",
        "mixed",
        "weights-only",
    ]


def test_images_of_one_colour_are_refused(make: Maker, parent: ParentBundle) -> None:
    colours = CalibrationImages(("red", "grey"), "00", lambda name: np.full((9, 9, 3), len(name), np.uint8))
    with pytest.raises(ExportError, match=r"of one colour(.|\n)*2 images, 'red'(.|\n)*weights-only"):
        make(1, parent, images=colours)


def test_what_layers_read_is_looked_at_once_and_only_where_weights_are_to_be_fitted(
    make: Maker, floats: Floats, parent: ParentBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def note(path: Path, images: Iterable[NDArray[np.uint8]], nodes: Collection[str], **settings: Any) -> Any:
        asked.append(set(nodes))
        return collect_moments(path, images, nodes, **settings)

    monkeypatch.setattr(step_images, "collect_moments", note)
    with pytest.raises(ExportError, match="whatever was tried"):
        make(1, parent, images=NEW_IMAGES, max_old_drop_points=IMPOSSIBLE)
    asked = [nodes for nodes in asked if nodes]
    (fitted,) = asked  # carry: what is not frozen; union and mixed: nothing more
    every = {name for name in quantized_nodes(onnx.load(floats[1][1])) if name.endswith("/Conv")}
    assert fitted < every
    assert all(name.startswith("decoder.") for name in fitted)
    assert all(not name.startswith("decoder.classifiers.1") for name in every - fitted)


def test_where_one_tensor_is_at_fault_its_layers_are_kept_in_float(make: Maker, wide_at_the_end: ParentBundle) -> None:
    made = make(1, wide_at_the_end, images=NEW_IMAGES, max_old_drop_points=LIMIT)
    assert made.attempts[:3] == [("carry", "refused"), ("union", "refused"), made.attempts[2]]
    assert made.attempts[-1] == ("mixed", "taken")
    taken = made.int8.record.attempts[-1]
    assert (made.int8.record.taken, made.int8.calibration.float_layers) == ("mixed", taken.float_layers)
    assert made.int8.calibration.policy in ("carry", "union")
    nodes = quantized_nodes(onnx.load(made.path.with_name("float.onnx")))
    assert "decoder.projection/Relu" in taken.float_layers
    assert 1 <= len(taken.float_layers) <= 0.3 * len(nodes) + 1
    assert list(taken.float_layers) == [name for name in nodes if name in taken.float_layers]
    assert made.float_convolutions() == {name for name in taken.float_layers if name.endswith("Conv")}


def test_layers_are_kept_in_float_with_the_ranges_that_lost_least(make: Maker, wide_at_the_start: ParentBundle) -> None:
    made = make(1, wide_at_the_start, images=NEW_IMAGES, max_old_drop_points=LIMIT)
    drops = {attempt.attempt: attempt.max_drop_points for attempt in made.int8.record.attempts[:2]}
    assert made.attempts[-1] == ("mixed", "taken")
    assert drops["carry"] is not None
    assert drops["union"] is not None
    assert drops["carry"] != drops["union"]
    assert made.int8.calibration.policy == ("carry" if drops["carry"] < drops["union"] else "union")
    assert made.int8.ranges is not None
    assert made.int8.ranges.policy == made.int8.calibration.policy


def test_layers_that_were_to_stay_in_float_stay_there_in_every_attempt(
    make: Maker, wide_at_the_end: ParentBundle
) -> None:
    made = make(1, wide_at_the_end, images=NEW_IMAGES, max_old_drop_points=LIMIT, float_layers=("first",))
    assert made.int8.record.taken == "mixed"
    for attempt in made.int8.record.attempts:
        assert "encoder.stem.conv/Conv" in attempt.float_layers
    assert "encoder.stem.conv/Conv" in made.float_convolutions()


def test_where_no_range_can_help_weights_alone_are_taken(make: Maker, wide: ParentBundle) -> None:
    made = make(1, wide, images=NEW_IMAGES, max_old_drop_points=LIMIT)
    assert [name for name, _ in made.attempts] == ["carry", "mixed", "mixed", "weights-only"]  # no envelope is wider
    assert [verdict for _, verdict in made.attempts] == ["refused"] * 3 + ["taken"]
    record, calibration = made.int8.record, made.int8.calibration
    assert (record.asked, record.taken, record.worst_sqnr) == ("carry", "weights-only", ())
    assert (record.carried, record.merged, record.measured) == (0, 0, 0)
    assert made.int8.ranges is not None
    assert made.int8.ranges.policy == "carry"  # kept for the next step
    assert (calibration.method, calibration.policy, calibration.reduce_range) == (None, "weights-only", False)
    assert (calibration.image_ids, calibration.images_sha256) == ((), "")
    convolutions = [node.name for node in onnx.load(made.path).graph.node if node.op_type == "Conv"]
    assert made.float_convolutions() == set(convolutions)


@pytest.mark.parametrize(
    ("asked", "tried"),
    [
        ("carry", ["carry", "union", "mixed", "mixed", "weights-only"]),
        ("union", ["union", "mixed", "mixed", "weights-only"]),
        ("new-only", ["new-only", "union", "mixed", "mixed", "weights-only"]),
        ("weights-only", ["weights-only"]),
    ],
)
def test_a_limit_that_nothing_meets_is_an_error_that_lists_all_that_was_tried(
    asked: RangesPolicy, tried: list[str], make: Maker, parent: ParentBundle
) -> None:
    with pytest.raises(ExportError, match="whatever was tried") as raised:
        make(1, parent, images=NEW_IMAGES, ranges=asked, max_old_drop_points=IMPOSSIBLE)
    assert re.findall(r"([a-z-]+): [+-]\d", str(raised.value.found)) == tried
    assert raised.value.expected == "at most -1000.0 points less than fp32"
    assert "--max-old-drop" in str(raised.value.hint)
    (work,) = make.folder.iterdir()
    assert not (work / "int8.onnx").exists()
    assert len(list(work.glob("int8.*.onnx"))) == len(tried)


def test_at_step_0_there_is_no_parent_to_make_an_envelope_with(make: Maker) -> None:
    with pytest.raises(ExportError, match="whatever was tried") as raised:
        make(0, images=images_at_hand(), evaluation=lambda: labelled(0), max_old_drop_points=IMPOSSIBLE)
    tried = re.findall(r"([a-z-]+): [+-]\d", str(raised.value.found))
    assert tried == ["carry", "mixed", "mixed", "weights-only"]


def test_where_nothing_can_be_compared_the_first_attempt_is_taken_whatever_the_limit(make: Maker) -> None:
    made = make(0, images=images_at_hand(), max_old_drop_points=IMPOSSIBLE)
    (attempt,) = made.int8.record.attempts
    assert (attempt.rows, attempt.max_drop_points, attempt.verdict) == ((), None, "taken")
    assert "nothing to compare with" in attempt.reason


def test_golden_images_are_compared_and_never_counted(make: Maker, parent: ParentBundle) -> None:
    unseen = dataclasses.replace(NEW_IMAGES, at_hand=())
    made = make(1, parent, images=unseen, max_old_drop_points=IMPOSSIBLE)
    (attempt,) = made.int8.record.attempts
    assert [(row.images, row.count) for row in attempt.rows] == [("golden images", 2)]
    assert (attempt.max_drop_points, attempt.verdict) == (None, "taken")


def test_at_most_so_many_images_at_hand_are_compared(
    make: Maker, parent: ParentBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_module, "GUARD_IMAGES", 2)
    rows = make(1, parent, images=NEW_IMAGES).int8.record.attempts[0].rows
    assert [row.count for row in rows if row.images == "images at hand"] == [2]


def test_weights_alone_need_no_image(make: Maker, parent: ParentBundle) -> None:
    made = make(1, parent, ranges="weights-only")
    (attempt,) = made.int8.record.attempts
    assert (attempt.attempt, [row.images for row in attempt.rows]) == ("weights-only", ["golden images"])
    assert made.int8.ranges is None
    assert made.path.stat().st_size < 0.35 * made.path.with_name("float.onnx").stat().st_size


def test_ranges_of_new_images_alone_clip_and_the_envelope_with_the_parents_does_not(
    make: Maker, parent: ParentBundle
) -> None:
    made = make(1, parent, images=BLACK, ranges="new-only", max_old_drop_points=LIMIT)
    assert made.attempts == [("new-only", "refused"), ("union", "taken")]
    assert made.int8.record.asked == "new-only"
    alone = make(1, parent, images=BLACK, ranges="new-only", max_old_drop_points=None).int8
    assert alone.ranges is not None
    assert {item.origin for item in alone.ranges.tensors.values()} == {"measured"}
    assert alone.record.measured == len(alone.ranges.tensors)


def test_the_method_of_the_ranges_is_the_one_that_was_asked_for(make: Maker, parent: ParentBundle) -> None:
    made = make(1, parent, images=NEW_IMAGES, ranges_method="mean-minmax", max_old_drop_points=None)
    assert made.int8.ranges is not None
    assert made.int8.calibration.method == made.int8.ranges.method == "mean-minmax"


def test_ranges_of_new_images_alone_need_no_parent(make: Maker) -> None:
    made = make(1, images=NEW_IMAGES, ranges="new-only")
    assert made.attempts == [("new-only", "taken")]
    assert (made.int8.record.carried, made.int8.record.silent_channels) == (0, {})


def test_channels_that_only_the_parents_images_excite_are_counted(
    make: Maker, parent: ParentBundle, floats: Floats
) -> None:
    made = make(1, parent, images=BLACK)
    measured = collect_extremes(
        floats[1][1],
        [resize_image(NEARLY_BLACK, HEIGHT_PX, WIDTH_PX)[np.newaxis]],
        image_ids=["b"],
        images_sha256="",
        step="01",
    )
    assert parent.ranges is not None
    silent = find_silent_channels(measured, parent.ranges)
    assert made.int8.record.silent_channels == {name: len(channels) for name, channels in silent.items()}
    assert sum(made.int8.record.silent_channels.values()) > 100


@pytest.mark.parametrize(
    ("reduce_range", "flags", "simulated"),
    [(True, (), False), (False, ("avx2", "fma"), True), (False, ("avx2", "avx_vnni"), False), (False, None, True)],
)
def test_8_bit_weights_are_judged_in_simulation_where_there_are_no_integer_dot_products(
    reduce_range: bool,
    flags: tuple[str, ...] | None,
    simulated: bool,
    make: Maker,
    parent: ParentBundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rule 3."""
    loaded: list[tuple[str, bool]] = []

    def spy(name: str) -> None:
        load = getattr(int8_module, name)

        def note(path: Path, *, simulated: bool = False) -> Predict:
            loaded.append((path.name, simulated))
            predict: Predict = load(path, simulated=simulated)
            return predict

        monkeypatch.setattr(int8_module, name, note)

    facts = msgspec.structs.replace(read_device_facts(), int8_flags=flags)
    monkeypatch.setattr(int8_module, "read_device_facts", lambda: facts)
    spy("load_onnx")
    spy("load_openvino")
    made = make(1, parent, images=NEW_IMAGES, reduce_range=reduce_range, targets=("onnx", "openvino"))
    assert loaded[:3] == [("float.onnx", False), ("int8.0.onnx", simulated), ("int8.0.xml", simulated)]
    assert made.int8.calibration.reduce_range == reduce_range
    assert [row.runtime for row in made.int8.record.attempts[0].rows] == ["onnxruntime"] * 2 + ["openvino"] * 2
    weights = {item.name: item for item in onnx.load(made.path).graph.initializer}
    levels = onnx.numpy_helper.to_array(weights["encoder.stages.1.0.conv.weight_quantized"])
    assert np.abs(levels.astype(int)).max() == (64 if reduce_range else 127)


def test_an_openvino_that_cannot_simulate_is_judged_as_it_is(
    make: Maker, parent: ParentBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(path: Path, *, simulated: bool = False) -> Predict:
        if simulated:
            raise MissingPackageError("this OpenVINO cannot simulate int8")
        return load_openvino(path)

    monkeypatch.setattr(int8_module, "DOT_PRODUCT_FLAGS", frozenset())
    monkeypatch.setattr(int8_module, "load_openvino", cannot)
    made = make(1, parent, images=NEW_IMAGES, reduce_range=False, targets=("openvino",), max_old_drop_points=None)
    assert [row.runtime for row in made.int8.record.attempts[0].rows] == ["openvino"] * 2


@pytest.mark.parametrize("policy", ["carry", "union"])
def test_a_later_step_is_refused_without_its_parents_ranges(
    policy: RangesPolicy, make: Maker, parent: ParentBundle
) -> None:
    subject = make.subject(1, ranges=policy)
    for given, found in (
        (None, "no bundle of the parent step"),
        (ParentBundle(parent.folder, parent.manifest, None), f"no ranges in {parent.folder}"),
    ):
        with pytest.raises(ExportError, match="'01-step' needs the int8 ranges of its parent") as raised:
            check_int8_request(subject, NEW_IMAGES, given)
        assert raised.value.found == found
        assert "--parent" in str(raised.value.hint)
        assert "--ranges weights-only" in str(raised.value.hint)
    check_int8_request(subject, NEW_IMAGES, parent)
    check_int8_request(make.subject(0, ranges=policy), NEW_IMAGES, None)
    for other in ("new-only", "weights-only"):
        check_int8_request(make.subject(1, ranges=other), NEW_IMAGES, None)


def test_images_are_needed_for_ranges_and_for_nothing_else(make: Maker, parent: ParentBundle) -> None:
    for images in (None, CalibrationImages((), "", NEW_IMAGES.read)):
        for policy in ("carry", "union", "new-only"):
            with pytest.raises(ExportError, match="needs images to calibrate on") as raised:
                check_int8_request(make.subject(1, ranges=policy), images, parent)
            assert "weights-only" in str(raised.value.hint)
        check_int8_request(make.subject(1, ranges="weights-only"), images, parent)


def test_a_layer_that_is_not_there_is_refused_before_an_image_is_read(make: Maker, parent: ParentBundle) -> None:
    images = CalibrationImages(("a",), "", lambda image_id: pytest.fail(f"{image_id} was read"))
    with pytest.raises(ExportError, match="no such layer to keep in float"):
        make(1, parent, images=images, float_layers=("encoder.stages.7",))


STAGE = ("encoder.stages.0.0.conv/Conv", "encoder.stages.0.0/Clip")


def test_the_worst_tensors_are_kept_in_float_each_with_the_convolution_before_it(floats: Floats) -> None:
    model = onnx.load(floats[1][1])
    nodes = quantized_nodes(model)
    rows = [SqnrRow("decoder/Concat", 12.0), SqnrRow("encoder.stages.2.1/Clip", None), SqnrRow(STAGE[1], 3.0)]
    assert layers_of_worst_signal(model, rows, 0.0) == STAGE
    assert layers_of_worst_signal(model, rows, 2 / len(nodes)) == STAGE
    assert layers_of_worst_signal(model, rows, 3 / len(nodes)) == (*STAGE, "decoder/Concat")
    assert layers_of_worst_signal(model, rows, 1.0) == (*STAGE, "decoder/Concat")
    assert layers_of_worst_signal(model, [SqnrRow(STAGE[0], 1.0)], 1.0) == STAGE[:1]
    assert layers_of_worst_signal(model, [], 0.5) == ()
