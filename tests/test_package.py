"""The bundle: whole or not at all, and what its manifest says is true of its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from bundles import stretch_ranges
from fakes import HEIGHT_PX, WIDTH_PX, random_images, small_model

from edge_ilseg.bundle import ClassEntry, Manifest, StepEntry, check_files, read_manifest
from edge_ilseg.calibration.collect import quantized_nodes
from edge_ilseg.calibration.ranges import Ranges, read_ranges
from edge_ilseg.devices.runtime import check_fit, load_session
from edge_ilseg.errors import DataError, ExportError, ParityError
from edge_ilseg.export.package import CalibrationImages, ExportRequest, ParentBundle, export_bundle
from edge_ilseg.export.parent import load_parent
from edge_ilseg.export.request import LabelledImage
from edge_ilseg.int8_notes import unmeasured
from edge_ilseg.models.segmentation import SegmentationModel

IMAGES = dict(zip(("a", "b", "c"), random_images(3, height_px=72, width_px=80), strict=True))
CALIBRATION = CalibrationImages(tuple(IMAGES), images_sha256="22", read=IMAGES.__getitem__, at_hand=tuple(IMAGES))
OLD_IMAGES = random_images(3, seed=1)
BASE_CALIBRATION = CalibrationImages(("0", "1", "2"), "33", lambda image_id: OLD_IMAGES[int(image_id)])
BASE_STEP = StepEntry(0, "00-base", "cd" * 32, None, "base", "ef" * 32, encoder_frozen=False)
STEP = StepEntry(1, "01-boat", "ab" * 32, "cd" * 32, "freeze+kd-output", "ef" * 32, encoder_frozen=True)
CLASSES = tuple(
    ClassEntry(name, step, (step, 0, 0)) for name, step in (("background", 0), ("cat", 0), ("dog", 0), ("big boat", 1))
)
EVERYTHING = ExportRequest(precisions=("int8", "fp32", "fp16"), targets=("openvino", "onnx"))


def evaluation() -> list[LabelledImage]:
    rng = np.random.default_rng(0)
    return [(image, rng.integers(0, 4, (72, 80)).astype(np.uint8)) for image in IMAGES.values()]


def base_model() -> SegmentationModel:
    return small_model((3,))


def grown_model() -> SegmentationModel:
    """The same network with a class more."""
    model = base_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.grow(1, "scaled")
    return model


def export(out: Path, request: ExportRequest, model: SegmentationModel | None = None, **options: object) -> Manifest:
    settings: dict[str, object] = {"step": STEP, "classes": CLASSES, "background": "background"}
    settings["calibration"] = CALIBRATION
    return export_bundle(model or grown_model(), out, request=request, **{**settings, **options})  # type: ignore[arg-type]


def export_base(out: Path, request: ExportRequest, **options: object) -> Manifest:
    settings = {"step": BASE_STEP, "classes": CLASSES[:3], "calibration": BASE_CALIBRATION}
    return export(out, request, base_model(), **{**settings, **options})


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> ParentBundle:
    out = tmp_path_factory.mktemp("bundles") / "00-base"
    export_base(out, ExportRequest(precisions=("int8",), golden_count=1))
    return load_parent(out, STEP)


@pytest.fixture(scope="module")
def told() -> list[tuple[str, float]]:
    return []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, parent: ParentBundle, told: list[tuple[str, float]]) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "01-boat"
    export(
        out,
        EVERYTHING,
        parent=parent,
        evaluation=evaluation,
        evaluation_name="made up",
        progress=lambda text, share: told.append((text, share)),
    )
    return out


def test_the_manifest_lists_every_file_with_its_hash(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert {name for name in manifest.files if name.startswith("models/")} == {
        "models/onnx/model.fp32.onnx",
        "models/onnx/model.int8.onnx",
        *(f"models/openvino/model.{p}.{suffix}" for p in ("fp32", "fp16", "int8") for suffix in ("xml", "bin")),
    }
    assert (manifest.step, manifest.classes, manifest.background) == (STEP, CLASSES, "background")
    assert manifest.old_count == 3
    assert (manifest.preprocessing.height_px, manifest.preprocessing.width_px) == (HEIGHT_PX, WIDTH_PX)
    assert {"torch", "onnx", "onnxruntime", "openvino", "edge-ilseg"} <= manifest.versions.keys()


def test_every_model_gives_its_golden_masks_on_the_session_of_a_device(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    images_NHWC = np.load(bundle / manifest.golden_images, allow_pickle=False)
    assert images_NHWC.shape == (4, HEIGHT_PX, WIDTH_PX, 3)
    assert images_NHWC.dtype == np.uint8
    assert len(manifest.models) == 5
    for entry in manifest.models:
        session = load_session(bundle, entry)
        check_fit(session, manifest)
        golden_NHW = np.load(bundle / entry.golden_masks, allow_pickle=False)
        for image_HWC, golden_HW in zip(images_NHWC, golden_NHW, strict=True):
            np.testing.assert_array_equal(session.mask(image_HWC), golden_HW)
        assert len(np.unique(golden_NHW)) > 1


def test_the_parity_table_has_a_row_for_every_form_of_the_model(bundle: Path) -> None:
    rows = {row.stage: row for row in read_manifest(bundle).parity}
    assert [name for name in rows if name != "openvino int8 simulated"] == [
        "torch",
        "onnx fp32",
        "onnx int8 simulated",
        "onnx int8",
        "openvino fp32",
        "openvino fp16",
        "openvino int8",
    ]
    assert rows["onnx fp32"].agreement >= 0.9999
    assert rows["onnx int8"].agreement > 0.85
    assert (rows["onnx int8"].max_abs or 0) > (rows["onnx fp32"].max_abs or 1)
    assert all(row.miou_old is not None and row.miou_new is not None for row in rows.values())


def test_expected_scores_are_those_of_the_shipped_model(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.expected_data == "made up"
    rows = {row.stage: row for row in manifest.parity}
    for entry in manifest.models:
        stage = f"{'onnx' if entry.runtime == 'onnxruntime' else 'openvino'} {entry.precision}"
        assert entry.expected is not None
        assert entry.expected.images == 3
        assert entry.expected.pixels == 3 * 72 * 80
        assert entry.expected.miou_old == pytest.approx(rows[stage].miou_old)
        assert list(entry.expected.iou) == ["background", "cat", "dog", "big boat"]


def test_int8_models_say_what_they_were_calibrated_on(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    for entry in manifest.models:
        if entry.precision != "int8":
            assert (entry.calibration, entry.convolutions) == (None, None)
            continue
        assert entry.calibration is not None
        assert entry.calibration.image_ids == ("a", "b", "c")
        assert entry.calibration.reduce_range
        assert (entry.calibration.policy, entry.calibration.float_layers) == ("carry", ())
        ranges = read_ranges(bundle / str(entry.calibration.ranges_file))
        assert ranges.image_ids == entry.calibration.image_ids
        assert ranges.method == entry.calibration.method
        new = {name: item.steps for name, item in ranges.tensors.items() if item.origin != "carried"}
        assert new == {"decoder.classifiers.0.steps.1/Conv": ("01-boat",)}
        assert {item.steps for item in ranges.tensors.values() if item.origin == "carried"} == {("00-base",)}


def test_every_quantized_convolution_is_computed_in_int8_and_the_manifest_says_so(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    convolutions = {
        node.name for node in onnx.load(bundle / "models/onnx/model.fp32.onnx").graph.node if node.op_type == "Conv"
    }
    for runtime in ("onnxruntime", "openvino"):
        executed = manifest.model(runtime, "int8").convolutions
        assert executed is not None
        assert executed.keys() == convolutions
        assert set(executed.values()) <= {"u8", "i8"}


def test_the_record_says_what_int8_costs_and_how_much_of_it_is_new(bundle: Path) -> None:
    record = read_manifest(bundle).int8
    assert record is not None
    assert (record.asked, record.taken, record.max_old_drop_points) == ("carry", "carry", 2.0)
    (attempt,) = record.attempts
    compared = ["images at hand", "golden images", "labelled images"]
    assert [(row.runtime, row.images) for row in attempt.rows] == [
        (runtime, images) for runtime in ("openvino", "onnxruntime") for images in compared
    ]
    counted = [row.drop_points for row in attempt.rows if row.images != "golden images"]
    assert attempt.max_drop_points == max(counted) <= 2.0
    assert len(record.worst_sqnr) == 10
    assert len(record.sqnr_db) > 20
    assert [record.sqnr_db[row.tensor] for row in record.worst_sqnr] == [row.sqnr_db for row in record.worst_sqnr]
    assert record.worst_sqnr[0].sqnr_db == min(value for value in record.sqnr_db.values() if value is not None)
    for row in (row for attempt in record.attempts for row in attempt.rows):
        fp32, int8 = np.mean(list(row.class_iou.values()), axis=0)
        assert (fp32, int8) == pytest.approx((row.fp32, row.int8))
        before, after = row.class_iou[row.worst_class]
        assert 100 * (before - after) == pytest.approx(row.worst_class_drop_points)
    assert sorted(row.runtime for row in record.delta) == ["onnxruntime", "openvino"]
    for row in record.delta:
        assert (row.encoder_changed_bytes, row.encoder_output_identical) == (0, True)


def test_the_costs_on_labelled_images_are_those_of_the_expected_scores(bundle: Path) -> None:
    """The int8 models that are judged and those that are shipped are the same."""
    manifest = read_manifest(bundle)
    assert manifest.int8 is not None
    for row in manifest.int8.attempts[0].rows:
        if row.images == "labelled images":
            for precision, miou in (("fp32", row.fp32), ("int8", row.int8)):
                expected = manifest.model(row.runtime, precision).expected  # type: ignore[arg-type]
                assert expected is not None
                assert miou == pytest.approx(expected.miou_old, abs=1e-3)


def test_the_table_has_the_size_of_each_form_and_its_latency_only_on_request(bundle: Path, tmp_path: Path) -> None:
    rows = {row.stage: row for row in read_manifest(bundle).parity}
    assert {row.latency_ms for row in rows.values()} == {None}
    assert rows["torch"].model_bytes is None
    for stage, files in (
        ("onnx fp32", ("onnx/model.fp32.onnx",)),
        ("onnx int8", ("onnx/model.int8.onnx",)),
        ("openvino fp16", ("openvino/model.fp16.xml", "openvino/model.fp16.bin")),
    ):
        shipped_bytes = sum((bundle / "models" / name).stat().st_size for name in files)
        assert rows[stage].model_bytes == pytest.approx(shipped_bytes, rel=0.02)  # with logits besides the mask
    request = ExportRequest(targets=("onnx",), precisions=("fp32",), time_stages=True)
    for row in export(tmp_path / "out", request).parity:
        assert row.latency_ms is not None
        assert row.latency_ms > 0


def test_logits_are_left_out_unless_asked_for(bundle: Path, tmp_path: Path) -> None:
    shipped = onnx.load(bundle / "models/onnx/model.int8.onnx")
    assert [output.name for output in shipped.graph.output] == ["mask"]
    assert {entry.key: entry.value for entry in shipped.metadata_props}["edge_ilseg.classes"] == (
        '["background","cat","dog","big boat"]'
    )
    manifest = export(tmp_path / "out", ExportRequest(targets=("onnx",), precisions=("fp32",), logits=True))
    (entry,) = manifest.models
    assert entry.outputs == ("mask", "logits")
    logits_CHW = load_session(tmp_path / "out", entry).logits(random_images(1)[0])
    assert logits_CHW.shape == (4, HEIGHT_PX, WIDTH_PX)


@pytest.mark.usefixtures("bundle")
def test_progress_is_told_for_every_stage(told: list[tuple[str, float]]) -> None:
    texts = " ".join(text for text, _ in told)
    stages = ["exporting to ONNX", "calibrating", "judging int8", "writing openvino int8", "comparing the exported"]
    for stage in (*stages, "scoring onnxruntime int8", "comparing with the parent's bundle"):
        assert stage in texts
    assert all(0.0 <= share <= 1.0 for _, share in told)


def test_only_what_the_targets_need_is_made_and_compared(tmp_path: Path) -> None:
    manifest = export(tmp_path / "out", ExportRequest(targets=("onnx",), precisions=("fp32",)), calibration=None)
    assert [row.stage for row in manifest.parity] == ["torch", "onnx fp32"]
    assert [row.miou_old for row in manifest.parity] == [None, None]
    assert manifest.expected_data is None
    assert "ranges.json" not in manifest.files
    assert manifest.int8 is None


ONNX_INT8 = ExportRequest(targets=("onnx",), precisions=("int8",), golden_count=1)


def of_another_network(ranges: Ranges) -> Ranges:
    return msgspec.structs.replace(
        ranges,
        tensors={
            f"other/{name}": msgspec.structs.replace(item, subgraph_sha256="00" * 32)
            for name, item in ranges.tensors.items()
        },
    )


def upside_down(ranges: Ranges) -> Ranges:
    name, item = list(ranges.tensors.items())[3]
    return msgspec.structs.replace(
        ranges,
        tensors={**ranges.tensors, name: msgspec.structs.replace(item, lowest=item.highest, highest=item.lowest - 1)},
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(of_another_network, "the parent's ranges are of another network"), (upside_down, "lowest")],
)
def test_the_parents_ranges_that_cannot_be_used_are_an_error_and_nothing_is_written(
    parent: ParentBundle, tmp_path: Path, spoil: Callable[[Ranges], Ranges], message: str
) -> None:
    assert parent.ranges is not None
    spoilt = ParentBundle(parent.folder, parent.manifest, spoil(parent.ranges))
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "out", ONNX_INT8, parent=spoilt)
    assert not list(tmp_path.iterdir())
    alone = msgspec.structs.replace(ONNX_INT8, ranges="new-only", max_old_drop_points=None)
    export(tmp_path / "out", alone, parent=spoilt)  # which looks at no range of the parent's


def test_images_of_one_colour_are_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    black = CalibrationImages(("black",), "00", lambda _: np.zeros((50, 40, 3), dtype=np.uint8))
    with pytest.raises(ExportError, match=r"every calibration image is of one colour(.|\n)*--ranges weights-only"):
        export_base(tmp_path / "out", ONNX_INT8, calibration=black)
    assert not list(tmp_path.iterdir())


def test_an_image_that_cannot_be_read_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    def read(image_id: str) -> np.ndarray:
        raise DataError("the image cannot be read", where=image_id, hint="restore it from a copy")

    with pytest.raises(DataError, match="cannot be read"):
        export_base(tmp_path / "out", ONNX_INT8, calibration=CalibrationImages(("a",), "00", read))
    assert not list(tmp_path.iterdir())


def test_activations_that_leave_float32_are_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    model = base_model()
    with torch.no_grad():
        dict(model.named_parameters())["decoder.classifiers.0.steps.0.weight"].fill_(3e38)
    with pytest.raises(ExportError, match="finite"):
        export(tmp_path / "out", ONNX_INT8, model, step=BASE_STEP, classes=CLASSES[:3], calibration=BASE_CALIBRATION)
    assert not list(tmp_path.iterdir())


def test_after_weights_alone_were_taken_the_next_step_still_finds_ranges(parent: ParentBundle, tmp_path: Path) -> None:
    wide = load_parent(stretch_ranges(parent.folder, tmp_path / "parent", 1000.0, ("",)), STEP)
    request = msgspec.structs.replace(ONNX_INT8, targets=("onnx", "openvino"), max_old_drop_points=20.0)
    manifest = export(tmp_path / "out", request, parent=wide)
    assert manifest.int8 is not None
    assert manifest.int8.taken == "weights-only"
    assert {entry.calibration.ranges_file for entry in manifest.models if entry.calibration} == {"ranges.json"}
    check_files(tmp_path / "out", manifest)
    following = msgspec.structs.replace(STEP, index=2, id="12" * 32, parent_id=STEP.id, name="02-same")
    found = load_parent(tmp_path / "out", following)
    assert found.ranges is not None
    assert found.ranges.step == STEP.name
    without_limit = msgspec.structs.replace(request, max_old_drop_points=None)
    manifest = export(tmp_path / "next", without_limit, step=following, parent=found)
    assert manifest.int8 is not None
    assert (manifest.int8.taken, manifest.int8.measured) == ("carry", 0)
    assert [row.encoder_output_identical for row in manifest.int8.delta] == [None, None]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ExportRequest(targets=("onnx",), precisions=("fp16",)), "fp16 is made for OpenVINO only"),
        (ExportRequest(targets=(), precisions=("fp32",)), "no such target"),
        (ExportRequest(precisions=("int4",)), "no such precision"),  # type: ignore[arg-type]
        (ExportRequest(golden_count=0), "golden image"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(tmp_path: Path, request_: ExportRequest, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "out", request_)
    assert not list(tmp_path.iterdir())


def test_int8_without_images_says_what_to_do_and_writes_nothing(tmp_path: Path) -> None:
    for images in (None, CalibrationImages((), "00", IMAGES.__getitem__)):
        with pytest.raises(ExportError, match="--precision fp32"):
            export(tmp_path / "out", ExportRequest(), calibration=images)
    assert not list(tmp_path.iterdir())


def test_int8_of_a_later_step_needs_its_parents_ranges_and_writes_nothing_without(
    parent: ParentBundle, tmp_path: Path
) -> None:
    without = ParentBundle(parent.folder, parent.manifest, None)
    for given, found in ((None, "no bundle of the parent step"), (without, "no ranges in")):
        with pytest.raises(ExportError, match=rf"needs the int8 ranges of its parent(.|\n)*{found}(.|\n)*--parent"):
            export(tmp_path / "out", ExportRequest(), parent=given)
    assert not list(tmp_path.iterdir())


def test_int8_that_costs_too_much_leaves_nothing_behind(parent: ParentBundle, tmp_path: Path) -> None:
    request = ExportRequest(targets=("onnx",), precisions=("fp32", "int8"), max_old_drop_points=-1000.0)
    with pytest.raises(ExportError, match=r"carry: (.|\n)*union: (.|\n)*mixed: (.|\n)*mixed: (.|\n)*weights-only: "):
        export(tmp_path / "out", request, parent=parent)
    assert not list(tmp_path.iterdir())


def test_the_bundle_holds_the_attempt_that_was_taken(parent: ParentBundle, tmp_path: Path) -> None:
    """The parent's ranges clip; the encoder is frozen, and may change all the same: that is what saves it."""
    clipping = load_parent(stretch_ranges(parent.folder, tmp_path / "parent", 0.05, ("encoder.",)), STEP)
    request = ExportRequest(precisions=("int8",), golden_count=1, max_old_drop_points=20.0)
    manifest = export(tmp_path / "out", request, parent=clipping)
    assert manifest.int8 is not None
    assert [attempt.verdict for attempt in manifest.int8.attempts] == ["refused", "taken"]
    assert (manifest.int8.asked, manifest.int8.taken) == ("carry", "union")
    ranges = read_ranges(tmp_path / "out" / "ranges.json")
    assert ranges.policy == "union"
    assert (manifest.int8.carried, manifest.int8.merged) == (0, ranges.count("merged"))
    for row in manifest.int8.delta:
        assert row.encoder_changed_bytes > 0
        assert row.encoder_output_identical is None
    for stage in manifest.parity:
        assert stage.agreement > 0.7, stage.stage


def test_a_cost_that_was_not_measured_is_told_for_each_runtime(bundle: Path, parent: ParentBundle) -> None:
    base, child = parent.manifest, read_manifest(bundle)
    assert base.int8 is not None
    assert child.int8 is not None
    (warning,) = unmeasured(base, base.int8)
    assert "in onnxruntime, openvino was not measured (nothing to compare with" in warning
    assert unmeasured(child, child.int8) == []
    (attempt,) = child.int8.attempts
    rows = tuple(row for row in attempt.rows if row.runtime == "onnxruntime" or row.images == "golden images")
    half = msgspec.structs.replace(child.int8, attempts=(msgspec.structs.replace(attempt, rows=rows),))
    (warning,) = unmeasured(child, half)
    assert "in openvino was not measured (the parent has no int8 model for it)" in warning


def test_weights_alone_need_no_image_no_parent_and_no_ranges(tmp_path: Path) -> None:
    request = ExportRequest(precisions=("fp32", "int8"), ranges="weights-only", golden_count=1)
    manifest = export(tmp_path / "out", request, calibration=None)
    assert "ranges.json" not in manifest.files
    assert manifest.int8 is not None
    assert (manifest.int8.taken, manifest.int8.delta) == ("weights-only", ())
    for runtime, folder in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        entry = manifest.model(runtime, "int8")
        assert entry.calibration is not None
        assert (entry.calibration.policy, entry.calibration.ranges_file) == ("weights-only", None)
        assert not entry.calibration.reduce_range
        assert entry.convolutions is not None
        assert set(entry.convolutions.values()) == {"f32"}
        fp32_bytes = sum(manifest.files[name].bytes for name in manifest.model(runtime, "fp32").files)
        assert sum(manifest.files[name].bytes for name in entry.files) < 0.4 * fp32_bytes, folder
        rows = {row.stage: row.agreement for row in manifest.parity}
        assert rows[f"{folder} int8"] > 0.9


def test_layers_that_were_to_stay_in_float_do_in_both_runtimes(tmp_path: Path) -> None:
    request = ExportRequest(precisions=("fp32", "int8"), golden_count=1, float_layers=("last", "encoder.stem"))
    manifest = export_base(tmp_path / "out", request)
    layers = ("encoder.stem.conv/Conv", "encoder.stem/Clip", "decoder.classifiers.0.steps.0/Conv")
    nodes = quantized_nodes(onnx.load(tmp_path / "out/models/onnx/model.fp32.onnx"), layers)
    for runtime in ("onnxruntime", "openvino"):
        entry = manifest.model(runtime, "int8")
        assert entry.calibration is not None
        assert entry.calibration.float_layers == layers
        assert entry.convolutions is not None
        assert {name for name, kind in entry.convolutions.items() if kind == "f32"} == {layers[0], layers[2]}
        assert {name for name in nodes if name.endswith("/Conv")} == entry.convolutions.keys() - set(layers)


def test_nan_weights_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = small_model()
    model.encoder.stages[1][0].bn.running_var[2] = float("nan")
    with pytest.raises(ExportError, match=r"'encoder\.stages\.1\.0\.bn\.running_var'"):
        export(tmp_path / "out", ExportRequest(), model)
    assert not list(tmp_path.iterdir())


def test_a_class_list_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="3 classes"):
        export(tmp_path / "out", ExportRequest(), classes=CLASSES[:3])


def test_an_export_that_fails_parity_leaves_nothing_behind(tmp_path: Path) -> None:
    request = ExportRequest(targets=("onnx",), precisions=("int8",), min_int8_agreement=1.01)
    with pytest.raises(ParityError, match="'onnx int8'"):
        export_base(tmp_path / "out", request)
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_is_there_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    request = ExportRequest(targets=("onnx",), precisions=("fp32",), golden_count=1)
    first = export(tmp_path / "out", request)
    with pytest.raises(ExportError, match="there already"):
        export(tmp_path / "out", request)
    assert read_manifest(tmp_path / "out") == first
    other = msgspec.structs.replace(STEP, name="01-other")
    assert export(tmp_path / "out", request, step=other, replace=True).step.name == "01-other"
    check_files(tmp_path / "out", read_manifest(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def workspace(path: Path) -> None:
    (path / "steps/00-base").mkdir(parents=True)
    (path / "edge-ilseg.toml").write_text("format_version = 1")
    (path / "steps/00-base/step.json").write_text('{"format": "edge-ilseg-step"}')


def photographs(path: Path) -> None:
    path.mkdir()
    (path / "a.jpg").write_bytes(b"a")
    (path / "manifest.json").write_text('{"format": "a web application"}')


def link_to_a_bundle(path: Path) -> None:
    target = path.with_name("bundle")
    target.mkdir()
    (target / "manifest.json").write_text('{"format": "edge-ilseg-bundle"}')
    path.symlink_to(target)


@pytest.mark.parametrize(
    "make",
    [
        workspace,
        photographs,
        link_to_a_bundle,
        lambda path: path.write_bytes(b"my thesis"),
        lambda path: path.symlink_to("nowhere"),
    ],
)
def test_nothing_but_a_bundle_is_replaced(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "out")
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    with pytest.raises(ExportError, match="only a bundle is replaced") as caught:
        export(tmp_path / "out", ExportRequest(targets=("onnx",), precisions=("fp32",)), replace=True)
    assert caught.value.where == tmp_path / "out"
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before
    with pytest.raises(ExportError, match="there already"):
        export(tmp_path / "out", ExportRequest(targets=("onnx",), precisions=("fp32",)))


@pytest.mark.parametrize("damage", ["no file at all", "a file gone", "a byte of the manifest"])
def test_an_empty_folder_and_a_damaged_bundle_are_replaced(damage: str, bundle: Path, tmp_path: Path) -> None:
    request = ExportRequest(targets=("onnx",), precisions=("fp32",), golden_count=1)
    out = tmp_path / "out"
    if damage == "no file at all":
        out.mkdir()
    else:
        shutil.copytree(bundle, out)
        path = out / ("models/onnx/model.fp32.onnx" if damage == "a file gone" else "manifest.json")
        path.unlink() if damage == "a file gone" else path.write_bytes(path.read_bytes()[:-2] + b"\xff\n")
    assert len(export(out, request, replace=True).models) == 1
    check_files(out, read_manifest(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_the_same_model_gives_the_same_model_files(parent: ParentBundle, tmp_path: Path) -> None:
    request = ExportRequest(targets=("openvino",), precisions=("int8",), golden_count=1)
    one, two = (export(tmp_path / name, request, parent=parent) for name in ("one", "two"))
    assert one.files == two.files
    assert "ranges.json" in one.files
