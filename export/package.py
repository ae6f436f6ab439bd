"""From a model to a bundle: the stages of an export, one under another.

float ONNX -> int8 ONNX (`edge_ilseg.export.int8`) -> the files that are shipped -> parity -> golden masks -> expected
scores -> what is new against the parent's bundle -> manifest

1. The bundle appears whole or not at all; a model with NaN weights, or one that fails parity, leaves nothing behind.
2. Every model of the bundle is made from one float graph, and every int8 model from one set of ranges.
3. Golden masks and expected scores come from the shipped files, run by the session that a device uses.
4. Nothing but a bundle or an empty folder is ever replaced.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.bundle import (
    FORMAT_VERSION,
    ClassEntry,
    Manifest,
    ModelEntry,
    ParityRow,
    Precision,
    Preprocessing,
    StepEntry,
    is_bundle,
    write_manifest,
)
from edge_ilseg.calibration.collect import quantized_nodes
from edge_ilseg.calibration.ranges import write_ranges
from edge_ilseg.calibration.sample import CalibrationImages as CalibrationImages
from edge_ilseg.devices.runtime import load_session
from edge_ilseg.errors import ExportError
from edge_ilseg.export.chain import run_parity_chain
from edge_ilseg.export.delta import check_delta, encoder_sha256, last_carried_encoder_tensor, measure_delta
from edge_ilseg.export.executed import check_int8_runs, executed_convolutions
from edge_ilseg.export.float_onnx import OPSET, check_finite, write_float_onnx
from edge_ilseg.export.golden import GOLDEN_IMAGES, golden_masks_name, golden_scenes, predict_masks, write_npy
from edge_ilseg.export.graph import keep_outputs, set_metadata, write_onnx
from edge_ilseg.export.int8 import Int8, check_int8_request, make_int8
from edge_ilseg.export.openvino_ir import model_api_info, write_ir
from edge_ilseg.export.parent import ParentBundle as ParentBundle
from edge_ilseg.export.request import RUNTIME_OF, Evaluation, Subject, Target
from edge_ilseg.export.request import ExportRequest as ExportRequest
from edge_ilseg.files import disk_error, new_folder
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.int8_record import DeltaRow, Int8Record
from edge_ilseg.metrics import Metrics, confusion_matrix, score
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import ProgressCallback, no_progress

RANGES_NAME = "ranges.json"
X86 = frozenset({"x86_64", "AMD64"})
"""Where every int8 convolution must be computed in int8; elsewhere OpenVINO has none for some shapes."""
PACKAGES = ("edge-ilseg", "numpy", "onnx", "onnxruntime", "onnxscript", "pillow", "torch")


def export_bundle(
    model: SegmentationModel,
    out: Path,
    *,
    request: ExportRequest,
    step: StepEntry,
    classes: tuple[ClassEntry, ...],
    background: str | None,
    calibration: CalibrationImages | None = None,
    parent: ParentBundle | None = None,
    evaluation: Evaluation | None = None,
    evaluation_name: str | None = None,
    progress: ProgressCallback | None = None,
    replace: bool = False,
) -> Manifest:
    """Write the bundle of `model` to `out` (rules 1 to 3).

    Args:
        model: any device; left as it is.
        out: folder of the bundle; must not exist unless `replace`.
        request: which models, and how.
        step: the step that the model comes from.
        classes: one entry a channel, in channel order.
        background: name of the background class, or None.
        calibration: images for the int8 ranges; needed for int8 (unless weights alone), not looked at otherwise.
        parent: bundle of the parent step; its ranges are carried on, and its int8 models are the teachers of the guard.
        evaluation: labelled images to score the models on; without them there are no expected scores, and the parity
            chain runs on the golden images.
        evaluation_name: what the manifest calls them.
        progress: told what is done.
        replace: put the new bundle in the place of one that is there, whole or damaged, or of an empty folder.

    Raises:
        ExportError: the request cannot be met, the model holds NaN, no calibration images or no ranges of the parent
            for int8, int8 costs the old classes too much, the encoder was frozen and its int8 form changed, `out`
            exists and `replace` is not set, or `out` is neither a bundle nor an empty folder (rule 4).
        ParityError: an exported model does not compute what the torch model does.
        EdgeIlsegError: an image cannot be read, or the disk is full.
    """
    subject = Subject(model, request, step, classes, background, evaluation, progress or no_progress)
    _check_subject(subject)
    if "int8" in request.precisions:
        check_int8_request(subject, calibration, parent)
    _check_out(out, replace)
    with (
        tempfile.TemporaryDirectory(prefix="edge-ilseg-export-") as work_name,
        new_folder(out, replace=replace) as folder,
    ):
        work = Path(work_name)
        subject.progress("exporting to ONNX", 0.0)
        write_float_onnx(model, work / "float.onnx")
        subject.progress("exporting to ONNX", 1.0)
        images_NHWC = golden_scenes(
            request.golden_count, model.spec.input_height_px, model.spec.input_width_px, request.seed
        )
        write_npy(folder / GOLDEN_IMAGES, images_NHWC)
        int8 = make_int8(subject, work, calibration, parent, images_NHWC) if "int8" in request.precisions else None
        if int8 is not None and int8.ranges is not None:
            write_ranges(folder / RANGES_NAME, int8.ranges)
        entries = [_ship(subject, work, folder, *which, int8) for which in request.models()]
        rows = run_parity_chain(subject, work, images_NHWC)
        for entry in entries:
            write_npy(folder / entry.golden_masks, predict_masks(folder, entry, images_NHWC))
        entries = [msgspec.structs.replace(entry, expected=_expected(subject, folder, entry)) for entry in entries]
        record = _with_delta(subject, folder, entries, int8, parent, images_NHWC)
        return write_manifest(folder, _manifest(subject, entries, rows, record, evaluation_name))


def _check_out(out: Path, replace: bool) -> None:
    """Rule 4."""
    if not os.path.lexists(out):
        return
    if not replace:
        raise ExportError("the bundle is there already", where=out, hint="choose another folder, or replace it")
    is_folder = out.is_dir() and not out.is_symlink()
    try:
        if is_folder and (is_bundle(out) or not any(out.iterdir())):
            return
    except OSError as error:
        raise disk_error(error, out) from error
    raise ExportError(
        "only a bundle is replaced, and this is none",
        where=out,
        found="a folder without a bundle's manifest.json" if is_folder else "a file or a link",
        expected="a bundle, an empty folder, or nothing",
        hint="choose another folder for the bundle, or remove this yourself",
    )


def _check_subject(subject: Subject) -> None:
    """Refuse before anything is exported or written."""
    request = subject.request
    request.models()
    if request.golden_count < 1:
        raise ExportError(
            "a bundle needs at least one golden image", found=request.golden_count, hint="raise golden_count"
        )
    check_finite(subject.model)
    if subject.model.class_count != len(subject.classes):
        raise ExportError(
            "the class list does not fit the model",
            found=f"{len(subject.classes)} classes",
            expected=f"{subject.model.class_count}, one for each channel of the model",
            hint="restore the step from a copy, or train it again",
        )


def _ship(
    subject: Subject, work: Path, folder: Path, target: Target, precision: Precision, int8: Int8 | None
) -> ModelEntry:
    """Write one model into the bundle, and for OpenVINO its twin with logits into `work`."""
    request = subject.request
    outputs: tuple[Literal["mask", "logits"], ...] = ("mask", "logits") if request.logits else ("mask",)
    source = work / ("int8.onnx" if precision == "int8" else "float.onnx")
    ours = {
        "classes": msgspec.json.encode(subject.names).decode(),
        "step_id": subject.step.id,
        "version": metadata.version("edge-ilseg"),
    }
    subject.progress(f"writing {target} {precision}", 0.0)
    if target == "onnx":
        files: tuple[str, ...] = (f"models/onnx/model.{precision}.onnx",)
        shipped = keep_outputs(onnx.load(source), outputs)
        set_metadata(shipped, {f"edge_ilseg.{key}": value for key, value in ours.items()})
        _make_parent(folder / files[0])
        write_onnx(folder / files[0], shipped)
    else:
        files = tuple(f"models/openvino/model.{precision}.{suffix}" for suffix in ("xml", "bin"))
        info = {"model_info": model_api_info(subject.names), "edge_ilseg": ours}
        trimmed = work / f"model.{precision}.onnx"
        write_onnx(trimmed, keep_outputs(onnx.load(source), outputs))
        _make_parent(folder / files[0])
        write_ir(trimmed, folder / files[0], precision, info)
    calibration, executed = None, None
    if precision == "int8" and int8 is not None:
        ranges_file = RANGES_NAME if int8.ranges is not None else None
        calibration = msgspec.structs.replace(int8.calibration, ranges_file=ranges_file)
        executed = executed_convolutions(folder / files[0], RUNTIME_OF[target])
        if calibration.method is not None and platform.machine() in X86:
            float_graph = onnx.load(work / "float.onnx")
            quantized = quantized_nodes(float_graph, calibration.float_layers)
            convolutions = [node.name for node in float_graph.graph.node if node.op_type == "Conv"]
            check_int8_runs(executed, [name for name in convolutions if name in quantized], folder / files[0])
    subject.progress(f"writing {target} {precision}", 1.0)
    return ModelEntry(
        runtime=RUNTIME_OF[target],
        precision=precision,
        files=files,
        outputs=outputs,
        opset=OPSET,
        golden_masks=golden_masks_name(RUNTIME_OF[target], precision),
        calibration=calibration,
        convolutions=executed,
        expected=None,
        encoder_sha256=encoder_sha256(folder, files),
    )


def _make_parent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def _expected(subject: Subject, folder: Path, entry: ModelEntry) -> Metrics | None:
    """Score a shipped model on the evaluation images, as a device would (rule 3)."""
    if subject.evaluation is None:
        return None
    text = f"scoring {entry.runtime} {entry.precision}"
    subject.progress(text, 0.0)
    session = load_session(folder, entry)
    confusion = np.zeros((len(subject.names), len(subject.names)), dtype=np.int64)
    count = 0
    for image_HWC, labels_HW in subject.evaluation():
        resized_HWC = resize_image(image_HWC, session.input_height_px, session.input_width_px)
        mask_HW = resize_mask(session.mask(resized_HWC), *labels_HW.shape)
        confusion += confusion_matrix(labels_HW, mask_HW, len(subject.names))
        count += 1
    subject.progress(text, 1.0)
    return score(confusion, subject.names, old_count=subject.old_count, background=subject.background, images=count)


def _with_delta(
    subject: Subject,
    folder: Path,
    entries: Iterable[ModelEntry],
    int8: Int8 | None,
    parent: ParentBundle | None,
    golden_NHWC: NDArray[np.uint8],
) -> Int8Record | None:
    """The record of the int8 models, with what is new in them against the parent's; checked against the budget."""
    if int8 is None:
        return None
    if parent is None:
        return int8.record
    subject.progress("comparing with the parent's bundle", 0.0)
    tensor = None
    if int8.ranges is not None and int8.calibration.method is not None and parent.has_int8_ranges():
        tensor = last_carried_encoder_tensor(int8.ranges)
    rows: list[DeltaRow] = []
    for entry in entries:
        if entry.precision == "int8":
            row = measure_delta(folder, entry, parent, golden_NHWC, encoder_tensor=tensor)
            rows += [row] if row is not None else []
    check_delta(
        rows,
        encoder_is_carried=subject.step.encoder_frozen and int8.record.taken == "carry" and parent.has_int8_ranges(),
        max_changed_pct=subject.request.max_changed_pct,
    )
    subject.progress("comparing with the parent's bundle", 1.0)
    return msgspec.structs.replace(int8.record, delta=tuple(rows))


def _manifest(
    subject: Subject,
    entries: Iterable[ModelEntry],
    rows: tuple[ParityRow, ...],
    record: Int8Record | None,
    evaluation_name: str | None,
) -> Manifest:
    """The manifest before its files are listed."""
    spec = subject.model.spec
    packages = PACKAGES + (("openvino",) if "openvino" in subject.request.targets else ())
    return Manifest(
        format="edge-ilseg-bundle",
        format_version=FORMAT_VERSION,
        bundle_id="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        step=subject.step,
        classes=subject.classes,
        background=subject.background,
        preprocessing=Preprocessing(height_px=spec.input_height_px, width_px=spec.input_width_px),
        models=tuple(entries),
        golden_images=GOLDEN_IMAGES,
        expected_data=evaluation_name if subject.evaluation is not None else None,
        parity=rows,
        int8=record,
        versions={"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        files={},
        limits=subject.request.limits,
    )
