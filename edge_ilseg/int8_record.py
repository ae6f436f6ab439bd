"""What a bundle says of its int8 models: which ranges, what they cost, what was tried, and how much of the file is new.

Plain data without a rule of its own: a device reads it, and an export fills it in. Format page: docs/bundle-format.md.
"""

from __future__ import annotations

from typing import Literal

import msgspec

RangesPolicy = Literal["carry", "union", "new-only", "weights-only"]
"""Whose ranges the activations get: `edge_ilseg.calibration.merge`."""
RangesMethod = Literal["minmax", "mean-minmax"]
"""What a measured range is: the extremes over all images, or the extremes of each image, averaged over the images."""
WeightRounding = Literal["fitted", "nearest"]
"""Which way weights are rounded: fitted to what their layer reads (`edge_ilseg.export.rounding`), or to the nearest."""
Attempted = Literal["carry", "union", "new-only", "mixed", "weights-only"]
"""A policy, or `mixed`: the ranges of the attempt that lost least, and the layers of the worst signal in float."""
GuardImages = Literal["images at hand", "golden images", "labelled images"]


class CalibrationEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the int8 ranges were found."""

    method: RangesMethod | None
    """None: weights alone are in int8, and no activation has a range."""
    policy: RangesPolicy
    """`weights-only`: ranges that were found are in the bundle for the next step, and not in this model."""
    image_ids: tuple[str, ...]
    images_sha256: str
    reduce_range: bool
    rounding: WeightRounding
    ranges_file: str | None
    float_layers: tuple[str, ...]
    """Nodes that stay in float."""


class GuardRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What int8 loses against fp32 on one set of images, in one runtime; mean over the classes that are judged.

    On labelled images `fp32` and `int8` are mIoU against the labels, else against the masks of the parent's int8 model.
    """

    runtime: str
    images: GuardImages
    count: int
    fp32: float
    int8: float
    drop_points: float
    worst_class: str
    worst_class_drop_points: float
    class_iou: dict[str, tuple[float, float]]
    """Of each class that is judged: fp32, int8."""


class AttemptRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to int8 that was tried."""

    attempt: Attempted
    float_layers: tuple[str, ...]
    rows: tuple[GuardRow, ...]
    max_drop_points: float | None
    """The highest drop that counts against the limit; None where nothing could be compared."""
    verdict: Literal["taken", "refused"]
    reason: str


class SqnrRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Signal to quantization noise of one activation tensor of the simulated int8 model, against the float model."""

    tensor: str
    sqnr_db: float | None
    """None: no noise at all."""


class DeltaRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of an int8 model differs from the parent's, constant by constant and line by line."""

    runtime: str
    total_bytes: int
    changed_bytes: int
    encoder_bytes: int
    """Constants (weights, scales, zero points) of the encoder."""
    encoder_changed_bytes: int
    encoder_output_identical: bool | None
    """The last encoder tensor on the golden images, on the exporting machine; None: not compared."""


class Int8Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The int8 part of an export."""

    asked: RangesPolicy
    taken: Attempted
    max_old_drop_points: float | None
    attempts: tuple[AttemptRecord, ...]
    carried: int
    """Tensors with the parent's range, verbatim; then those with an envelope of both, and with their own."""
    merged: int
    measured: int
    silent_channels: dict[str, int]
    """Tensors with channels that were alive on the parent's images and are silent on these: how many."""
    worst_sqnr: tuple[SqnrRow, ...]
    sqnr_db: dict[str, float | None]
    """Of every quantized activation, those of `worst_sqnr` among them."""
    delta: tuple[DeltaRow, ...]
