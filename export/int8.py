"""From a float ONNX to an int8 one that is safe to ship: attempt after attempt, until one keeps the old classes.

1. Attempts, in order: the ranges that were asked for (`carry` by default), then `union` (the parent's ranges still
   hold, and nothing of the new images is clipped), then `mixed` (the ranges that lost least, with the layers of the
   worst signal in float, a tenth of them and then three tenths), then `weights-only`. The first whose drop
   (`edge_ilseg.export.guard`) is within the limit is taken. `union` is left out where it is what was tried already:
   `carry` is the envelope where nothing is frozen.
2. Without a limit the first attempt is taken, and its drop recorded. Where nothing could be compared it is taken, too,
   and the record says so.
3. The drop is that of the real kernels of this machine; where weights use all 8 bits and this machine has no integer
   dot products, that of the simulated model: the kernels here would show an error that the device does not have.
4. Every attempt, its figures and the reason are recorded.
5. Ranges that were found are kept beside weights alone, too: the next step carries them on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.bundle import Runtime
from edge_ilseg.calibration.collect import quantized_nodes
from edge_ilseg.calibration.merge import find_silent_channels, make_ranges
from edge_ilseg.calibration.ranges import Ranges
from edge_ilseg.calibration.sample import CalibrationImages
from edge_ilseg.devices.device_profile import DOT_PRODUCT_FLAGS
from edge_ilseg.devices.facts import read_device_facts
from edge_ilseg.devices.runtime import load_session
from edge_ilseg.devices.verification import spread
from edge_ilseg.errors import ExportError, MissingPackageError
from edge_ilseg.export.delta import ENCODER
from edge_ilseg.export.guard import AT_HAND, GOLDEN, LABELLED, Guard, GuardSet, Masks, counted_drop
from edge_ilseg.export.openvino_ir import write_ir
from edge_ilseg.export.parent import ParentBundle
from edge_ilseg.export.quantize import find_float_layers, write_int8_onnx, write_weights_only
from edge_ilseg.export.request import RUNTIME_OF, Subject
from edge_ilseg.export.rounding import Rounding
from edge_ilseg.export.sessions import Predict, load_onnx, load_openvino
from edge_ilseg.export.sqnr import layers_of_worst_signal, measure_sqnr, worst
from edge_ilseg.export.step_images import StepImages
from edge_ilseg.images import resize_image
from edge_ilseg.int8_record import (
    Attempted,
    AttemptRecord,
    CalibrationEntry,
    GuardRow,
    Int8Record,
    RangesMethod,
    RangesPolicy,
    SqnrRow,
)

MIXED_SHARES = (0.1, 0.3)
WORST_NAMED = 10
SQNR_IMAGES = 8
GUARD_IMAGES = 200
"""So many of the images at hand are compared, at most."""


class Int8(NamedTuple):
    """What `make_int8` has made; the graph itself is the file `int8.onnx`."""

    calibration: CalibrationEntry
    ranges: Ranges | None
    record: Int8Record


class _Attempt(NamedTuple):
    name: Attempted
    policy: RangesPolicy
    float_layers: tuple[str, ...]
    ranges: Ranges | None


class _Judged(NamedTuple):
    attempt: _Attempt
    path: Path
    rows: tuple[GuardRow, ...]
    drop: float | None


def check_int8_request(subject: Subject, calibration: CalibrationImages | None, parent: ParentBundle | None) -> None:
    """Refuse what cannot work before anything is computed.

    Raises:
        ExportError: no images, or no ranges of the parent where they are needed.
    """
    policy = subject.request.ranges
    if policy != "weights-only" and (calibration is None or not calibration.ids):
        raise ExportError(
            "int8 needs images to calibrate on",
            found="no calibration image",
            hint="give the images of this step, or export --ranges weights-only, or --precision fp32 (and fp16 for "
            "OpenVINO)",
        )
    if subject.step.index and policy in ("carry", "union") and (parent is None or parent.ranges is None):
        raise ExportError(
            f"step {subject.step.name!r} needs the int8 ranges of its parent: ranges from its own images alone would "
            "clip what the old classes need",
            found="no bundle of the parent step" if parent is None else f"no ranges in {parent.folder}",
            expected="a bundle of the parent step with int8 models",
            hint="export the parent step first, or give its bundle (--parent); without one: --ranges weights-only",
        )
    if policy == "carry" and subject.step.encoder_frozen and parent is not None:
        _check_weight_bits(subject, parent)


def _check_weight_bits(subject: Subject, parent: ParentBundle) -> None:
    """Refuse another width of weights than the parent's: the frozen encoder would be another one in int8."""
    for entry in parent.manifest.models:
        if entry.calibration is None or entry.calibration.method is None:
            continue
        if entry.calibration.reduce_range != subject.request.reduce_range:
            bits = {True: "7-bit", False: "8-bit"}
            raise ExportError(
                "the encoder was frozen, and its int8 weights would not be the parent's",
                where=parent.folder,
                found=f"{bits[entry.calibration.reduce_range]} weights in the parent's bundle",
                expected=f"{bits[subject.request.reduce_range]} weights, as asked for",
                hint="take the device profile of the parent's export (--profile), or --ranges union",
            )


def inherited_float_layers(subject: Subject, parent: ParentBundle | None) -> tuple[str, ...]:
    """The encoder's layers that the parent keeps in float, where the encoder is to stay what it is."""
    if parent is None or subject.request.ranges != "carry" or not subject.step.encoder_frozen:
        return ()
    layers = {
        name
        for entry in parent.manifest.models
        if entry.calibration is not None and entry.calibration.method is not None
        for name in entry.calibration.float_layers
    }
    return tuple(sorted(name for name in layers if name.startswith(ENCODER)))


def make_int8(
    subject: Subject,
    work: Path,
    calibration: CalibrationImages | None,
    parent: ParentBundle | None,
    golden_NHWC: NDArray[np.uint8],
) -> Int8:
    """Write `work/int8.onnx` from `work/float.onnx` (rules 1 to 4).

    Args:
        subject: what is exported.
        work: folder of intermediate files.
        calibration: images of this step; None for weights alone.
        parent: bundle of the parent step.
        golden_NHWC: uint8 images at the input size.

    Raises:
        ExportError: the images or the parent's ranges cannot be used, or no attempt is within the limit.
    """
    return _Int8Maker(subject, work, calibration, parent, golden_NHWC).make()


class _Int8Maker:
    """One call of `make_int8`: what it was given, and what it has tried so far."""

    def __init__(
        self,
        subject: Subject,
        work: Path,
        calibration: CalibrationImages | None,
        parent: ParentBundle | None,
        golden_NHWC: NDArray[np.uint8],
    ) -> None:
        self.subject = subject
        self.request = subject.request
        self.float_path = work / "float.onnx"
        self.work = work
        self.calibration = calibration
        self.parent = parent
        self.model = onnx.load(self.float_path)
        inherited = inherited_float_layers(subject, parent)
        self.float_layers = find_float_layers(self.model, (*self.request.float_layers, *inherited))
        self.images = StepImages(subject, self.float_path, calibration)
        self.measured = self.images.measure()
        known = (parent.int8_constants(), parent.subgraphs()) if parent is not None else ({}, frozenset())
        self.rounding = Rounding(self.images.moments, *known)
        self.guard = self._make_guard(golden_NHWC)
        self.judged: list[_Judged] = []
        self.cannot_simulate = False

    def make(self) -> Int8:
        records = []
        for attempt in self._attempts():
            result = self._judge(attempt)
            self.judged.append(result)
            records.append(self._record(result))
            if records[-1].verdict == "taken":
                shutil.copyfile(result.path, self.work / "int8.onnx")
                return self._result(result, tuple(records))
        raise ExportError(
            "int8 costs the old classes more than is allowed, whatever was tried",
            found="; ".join(f"{record.attempt}: {record.reason}" for record in records),
            expected=f"at most {self.request.max_old_drop_points} points less than fp32",
            hint="ship fp32 or fp16 (--precision), or allow more: --max-old-drop",
        )

    def _make_guard(self, golden_NHWC: NDArray[np.uint8]) -> Guard:
        subject = self.subject
        old = tuple(range(subject.old_count))
        at_hand = spread(self.calibration.at_hand, GUARD_IMAGES) if self.calibration else ()
        sets = [
            GuardSet(AT_HAND, lambda: ((image_HWC, None) for image_HWC in self.images.read(at_hand)), old),
            GuardSet(GOLDEN, lambda: ((image_HWC, None) for image_HWC in golden_NHWC), old),
        ]
        if subject.evaluation is not None:
            sets.append(GuardSet(LABELLED, self._labelled, old or tuple(range(len(subject.classes)))))
        teachers: dict[str, Masks] = {}
        for target in subject.request.targets:
            runtime = RUNTIME_OF[target]
            entry = self.parent.int8(runtime) if self.parent is not None else None
            if self.parent is not None and entry is not None:
                teachers[runtime] = load_session(self.parent.folder, entry).mask
        return Guard(sets, _mask_of(load_onnx(self.float_path)), teachers, subject.names, subject.progress)

    def _labelled(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        spec = self.subject.model.spec
        assert self.subject.evaluation is not None
        for image_HWC, labels_HW in self.subject.evaluation():
            yield resize_image(image_HWC, spec.input_height_px, spec.input_width_px), labels_HW

    def _attempts(self) -> Iterator[_Attempt]:
        """What to try next (rule 1); the mixed attempts depend on what came before."""
        asked = self.request.ranges
        if asked != "weights-only":
            first = self._with_ranges(asked, self.request.ranges_method)
            yield first
            if self._parent_ranges() is not None:
                union = self._with_ranges("union", "minmax")
                if asked == "new-only" or _limits(union.ranges) != _limits(first.ranges):
                    yield union
            best = min(reversed(self.judged), key=lambda item: item.drop or 0.0)  # of equals, what clips less
            sqnr = self._sqnr(best.path)
            for share in MIXED_SHARES:
                layers = layers_of_worst_signal(self.model, sqnr, share)
                kept = tuple(name for name in quantized_nodes(self.model) if name in {*layers, *self.float_layers})
                if len(kept) < len(quantized_nodes(self.model)):
                    yield _Attempt("mixed", best.attempt.policy, kept, best.attempt.ranges)
        yield _Attempt("weights-only", "weights-only", self.float_layers, None)

    def _parent_ranges(self) -> Ranges | None:
        return self.parent.ranges if self.parent is not None else None

    def _with_ranges(self, policy: RangesPolicy, method: RangesMethod) -> _Attempt:
        assert self.measured is not None
        ranges = make_ranges(self.measured, policy, self._parent_ranges(), method=method)
        return _Attempt(policy, policy, self.float_layers, ranges)

    def _judge(self, attempt: _Attempt) -> _Judged:
        """Make the graph of an attempt and compare it with fp32."""
        number = len(self.judged)
        path = self.work / f"int8.{number}.onnx"
        self.subject.progress(f"quantizing ({attempt.name})", 0.0)
        if attempt.ranges is None:
            write_weights_only(self.float_path, path, float_layers=attempt.float_layers)
        else:
            write_int8_onnx(
                self.float_path,
                path,
                attempt.ranges,
                reduce_range=self.request.reduce_range,
                float_layers=attempt.float_layers,
                rounding=self.rounding,
            )
        rows: list[GuardRow] = []
        for target in self.request.targets:
            runtime = RUNTIME_OF[target]
            rows += self.guard.rows(runtime, _mask_of(self._load(path, runtime)))
        return _Judged(attempt, path, tuple(rows), counted_drop(rows))

    def _load(self, path: Path, runtime: Runtime) -> Predict:
        """The int8 graph as the device will compute it (rule 3)."""
        flags = read_device_facts().int8_flags or ()
        simulated = not self.request.reduce_range and DOT_PRODUCT_FLAGS.isdisjoint(flags)
        if runtime == "onnxruntime":
            return load_onnx(path, simulated=simulated)
        xml_path = path.with_suffix(".xml")
        write_ir(path, xml_path, "int8", {})
        try:
            return load_openvino(xml_path, simulated=simulated)
        except MissingPackageError:
            self.cannot_simulate = True
            return load_openvino(xml_path)

    def _record(self, result: _Judged) -> AttemptRecord:
        limit, drop = self.request.max_old_drop_points, result.drop
        taken = limit is None or drop is None or drop <= limit
        if drop is None:
            reason = self._why_nothing_counted()
        else:
            worst_row = max((row for row in result.rows if row.images != GOLDEN), key=lambda row: row.drop_points)
            reason = f"{drop:+.2f} points against fp32 on {worst_row.images}, {worst_row.runtime}"
        reason += "; the OpenVINO here cannot simulate int8" if self.cannot_simulate else ""
        return AttemptRecord(
            attempt=result.attempt.name,
            float_layers=result.attempt.float_layers,
            rows=result.rows,
            max_drop_points=drop,
            verdict="taken" if taken else "refused",
            reason=reason,
        )

    def _why_nothing_counted(self) -> str:
        if not self.guard.has_reference:
            return "nothing to compare with: no int8 model of the parent in this runtime, and no labelled images"
        if not (self.calibration and self.calibration.at_hand) and self.subject.evaluation is None:
            return "no image at hand to compare on, and no labelled images"
        return "no old class is on the images in a measurable share"

    def _sqnr(self, int8_path: Path) -> tuple[SqnrRow, ...]:
        self.subject.progress("measuring the quantization noise", 0.0)
        ids = self.calibration.ids[:SQNR_IMAGES] if self.calibration else ()
        rows = measure_sqnr(self.float_path, int8_path, (image[np.newaxis] for image in self.images.read(ids)))
        self.subject.progress("measuring the quantization noise", 1.0)
        return rows

    def _result(self, taken: _Judged, records: tuple[AttemptRecord, ...]) -> Int8:
        attempt, before = taken.attempt, self._parent_ranges()
        silent: dict[str, tuple[int, ...]] = {}
        if self.measured is not None and before is not None and self.request.ranges != "new-only":
            silent = find_silent_channels(self.measured, before)
        ranges = attempt.ranges or next((item.attempt.ranges for item in self.judged if item.attempt.ranges), None)
        sqnr = self._sqnr(taken.path) if attempt.ranges else ()
        images = self.calibration if attempt.ranges is not None else None
        return Int8(
            calibration=CalibrationEntry(
                method=None if attempt.ranges is None else attempt.ranges.method,
                policy=attempt.policy,
                image_ids=images.ids if images else (),
                images_sha256=images.images_sha256 if images else "",
                reduce_range=self.request.reduce_range and attempt.ranges is not None,
                rounding="nearest" if attempt.ranges is None else self.request.rounding,
                ranges_file=None,
                float_layers=attempt.float_layers,
            ),
            ranges=ranges,
            record=Int8Record(
                asked=self.request.ranges,
                taken=attempt.name,
                max_old_drop_points=self.request.max_old_drop_points,
                attempts=records,
                carried=attempt.ranges.count("carried") if attempt.ranges else 0,
                merged=attempt.ranges.count("merged") if attempt.ranges else 0,
                measured=attempt.ranges.count("measured") if attempt.ranges else 0,
                silent_channels={name: len(channels) for name, channels in silent.items()},
                worst_sqnr=worst(sqnr, WORST_NAMED),
                sqnr_db={row.tensor: row.sqnr_db for row in sqnr},
                delta=(),
            ),
        )


def _limits(ranges: Ranges | None) -> dict[str, tuple[float, float]]:
    return {name: (item.lowest, item.highest) for name, item in ranges.tensors.items()} if ranges else {}


def _mask_of(predict: Predict) -> Masks:
    return lambda image_HWC: predict(image_HWC[np.newaxis]).mask_NHW[0]
