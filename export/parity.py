"""The parity chain: torch -> ONNX fp32 -> IR fp32 -> IR fp16 -> int8 simulated -> int8 real, on the same images.

1. Every stage is compared with the first, the torch model; nothing is kept but sums.
2. Agreement is the share of pixels whose `mask` is the reference's.
3. fp32 must agree on 99.99 % of the pixels; fp16 on 99.5 %, unless another limit is given: rounding the weights alone
   can cost that much (docs/adr/0006). What int8 may lose is for `verify` to decide, unless a limit is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import ParityRow
from edge_ilseg.errors import ExportError, ParityError
from edge_ilseg.export.request import MIN_FP16_AGREEMENT
from edge_ilseg.export.sessions import Outputs, Predict
from edge_ilseg.images import resize_mask
from edge_ilseg.metrics import confusion_matrix, score

TORCH = "torch"
ONNX_FP32, ONNX_INT8, ONNX_INT8_SIMULATED = "onnx fp32", "onnx int8", "onnx int8 simulated"
IR_FP32, IR_FP16, IR_INT8 = "openvino fp32", "openvino fp16", "openvino int8"
IR_INT8_SIMULATED = "openvino int8 simulated"

MIN_FP32_AGREEMENT = 0.9999

_BROKEN = "the runtime or the exporter is at fault: try another version of it, and report this model"
_COARSE = "calibrate on more images, keep reduce_range on, or ship fp32 or fp16"
HINTS = {
    ONNX_FP32: _BROKEN,
    IR_FP32: _BROKEN,
    IR_FP16: "weights rounded to half precision can move this many pixels: ship fp32, or set a lower fp16 limit",
    ONNX_INT8: _COARSE,
    IR_INT8: _COARSE,
}


class Stage(NamedTuple):
    """One form of the model."""

    name: str
    predict: Predict
    model_bytes: int | None = None
    """Size of the files it was loaded from."""


class ParityImage(NamedTuple):
    """One image at the input size, and what is true in it if that is known."""

    image_NHWC: NDArray[np.uint8]
    """uint8, 1 x H x W x 3."""
    labels_HW: NDArray[np.uint8] | None
    """Channels, uint8, at the label's own size; 255 is void."""


class _Sums:
    """What is kept of one stage."""

    def __init__(self, class_count: int) -> None:
        self.max_abs = 0.0
        self.squared_error = 0.0
        self.squared_reference = 0.0
        self.agreeing = 0
        self.pixels = 0
        self.labelled = 0
        self.confusion = np.zeros((class_count, class_count), dtype=np.int64)

    def add(self, outputs: Outputs, reference: Outputs, labels_HW: NDArray[np.uint8] | None) -> None:
        error_NCHW = outputs.logits_NCHW.astype(np.float64) - reference.logits_NCHW
        self.max_abs = float(np.maximum(self.max_abs, np.abs(error_NCHW).max()))  # keeps a NaN
        self.squared_error += float(np.square(error_NCHW).sum())
        self.squared_reference += float(np.square(reference.logits_NCHW, dtype=np.float64).sum())
        self.agreeing += int((outputs.mask_NHW == reference.mask_NHW).sum())
        self.pixels += outputs.mask_NHW.size
        if labels_HW is not None:
            mask_HW = resize_mask(outputs.mask_NHW[0], *labels_HW.shape)
            self.confusion += confusion_matrix(labels_HW, mask_HW, len(self.confusion))
            self.labelled += 1

    def row(self, stage: str, classes: Sequence[str], old_count: int, background: str | None) -> ParityRow:
        reference, error = self.squared_reference, self.squared_error
        metrics = score(self.confusion, classes, old_count=old_count, background=background, images=self.labelled)
        return ParityRow(
            stage=stage,
            max_abs=self.max_abs,
            relative_rmse=math.sqrt(error / reference) if reference > 0 else None,
            agreement=self.agreeing / self.pixels,
            miou_old=metrics.miou_old,
            miou_new=metrics.miou_new,
        )


def measure_parity(
    stages: Sequence[Stage],
    images: Iterable[ParityImage],
    classes: Sequence[str],
    *,
    old_count: int,
    background: str | None,
) -> tuple[ParityRow, ...]:
    """Run every stage on every image and compare it with the first stage.

    Args:
        stages: the first is the reference.
        images: consumed one at a time.
        classes: class names in channel order.
        old_count: the first `old_count` channels are old classes, for `miou_old`.
        background: name of the background class, or None.

    Returns:
        One row a stage. `relative_rmse` is sqrt(sum of squared errors / sum of squared reference logits); the mIoU are
        None where no image has labels.

    Raises:
        ExportError: there is no image.
    """
    sums = [_Sums(len(classes)) for _ in stages]
    count = 0
    for image_NHWC, labels_HW in images:
        reference = stages[0].predict(image_NHWC)
        for number, (stage, kept) in enumerate(zip(stages, sums, strict=True)):
            kept.add(stage.predict(image_NHWC) if number else reference, reference, labels_HW)
        count += 1
    if not count:
        raise ExportError(
            "there is no image to compare the exported models on", hint="name a split that has images: --split"
        )
    rows = [kept.row(stage.name, classes, old_count, background) for stage, kept in zip(stages, sums, strict=True)]
    return tuple(
        msgspec.structs.replace(row, model_bytes=stage.model_bytes) for stage, row in zip(stages, rows, strict=True)
    )


def time_stages(stages: Sequence[Stage], image_NHWC: NDArray[np.uint8], rounds: int) -> tuple[float, ...]:
    """Median wall time of each stage for one image, ms; the stages take turns, after one run each that is not counted.

    Args:
        stages: what to time.
        image_NHWC: uint8, 1 x H x W x 3, at the input size.
        rounds: how often each stage runs.
    """
    times_ms: list[list[float]] = [[] for _ in stages]
    for round_ in range(rounds + 1):
        for stage, kept in zip(stages, times_ms, strict=True):
            start_ns = time.perf_counter_ns()
            stage.predict(image_NHWC)
            if round_:
                kept.append((time.perf_counter_ns() - start_ns) / 1e6)
    return tuple(float(np.median(kept)) for kept in times_ms)


def check_parity(
    rows: Iterable[ParityRow],
    *,
    min_fp16_agreement: float = MIN_FP16_AGREEMENT,
    min_int8_agreement: float | None = None,
) -> None:
    """Check rule 3.

    Raises:
        ParityError: a stage gives NaN or infinity, or agrees with torch on fewer pixels than its limit.
    """
    limits: dict[str, float | None] = {
        ONNX_FP32: MIN_FP32_AGREEMENT,
        IR_FP32: MIN_FP32_AGREEMENT,
        IR_FP16: min_fp16_agreement,
        ONNX_INT8: min_int8_agreement,
        IR_INT8: min_int8_agreement,
    }
    for row in rows:
        if row.max_abs is not None and not math.isfinite(row.max_abs):
            raise ParityError(
                "an exported model gives logits that are not finite",
                where=f"stage {row.stage!r}",
                hint=HINTS.get(row.stage, _BROKEN),
            )
        limit = limits.get(row.stage)
        if limit is not None and row.agreement < limit:
            raise ParityError(
                "an exported model does not compute what the torch model does",
                where=f"stage {row.stage!r}",
                found=f"the same class on {row.agreement:.4%} of the pixels, logits off by at most {row.max_abs:.3g}",
                expected=f"at least {limit:.2%}",
                hint=HINTS[row.stage],
            )
