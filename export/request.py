"""What an export is asked for, and what it is about. No torch here: the command line reads it before it loads torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import ClassEntry, Precision, Runtime, StepEntry
from edge_ilseg.devices.limits import OwnLimits
from edge_ilseg.errors import ExportError
from edge_ilseg.int8_record import RangesMethod, RangesPolicy, WeightRounding
from edge_ilseg.progress import ProgressCallback

if TYPE_CHECKING:
    from edge_ilseg.models.segmentation import SegmentationModel

Target = Literal["onnx", "openvino"]
MIN_FP16_AGREEMENT = 0.995
"""Least share of pixels on which fp16 must agree with torch: docs/adr/0006."""
MAX_OLD_DROP_POINTS = 2.0
RUNTIME_OF: dict[Target, Runtime] = {"onnx": "onnxruntime", "openvino": "openvino"}

LabelledImage = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Image, uint8, H x W x 3, and its labels, channels, uint8, H x W with 255 for void, at their own size."""
Evaluation = Callable[[], Iterable[LabelledImage]]
"""Gives the labelled images, the same ones at each call."""


class ExportRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to make. fp16 is made for OpenVINO alone: onnxruntime has no fp16 convolution on CPUs."""

    targets: tuple[Target, ...] = ("onnx", "openvino")
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    logits: bool = False
    reduce_range: bool = True
    golden_count: int = 4
    seed: int = 0
    min_fp16_agreement: float = MIN_FP16_AGREEMENT
    min_int8_agreement: float | None = None
    ranges: RangesPolicy = "carry"
    ranges_method: RangesMethod = "minmax"
    """Of the first attempt: docs/adr/0015."""
    rounding: WeightRounding = "fitted"
    """Which way int8 weights are rounded: `edge_ilseg.export.rounding`."""
    max_old_drop_points: float | None = MAX_OLD_DROP_POINTS
    """What int8 may cost the old classes against fp32 (`edge_ilseg.export.guard`); None: no limit, one attempt."""
    float_layers: tuple[str, ...] = ()
    """Layers that stay in float, as `edge_ilseg.export.quantize.find_float_layers` takes them."""
    max_changed_pct: float | None = None
    """How much of an int8 model may differ from the parent's."""
    limits: OwnLimits | None = None
    """What the bundle is to keep to wherever it is verified; they are written into it."""
    time_stages: bool = False
    """Measure the latency of every form of the model."""

    def models(self) -> tuple[tuple[Target, Precision], ...]:
        """The models that this makes, in a fixed order.

        Raises:
            ExportError: nothing to make, an unknown target or precision, or fp16 for onnxruntime alone.
        """
        for name, values, known in (
            ("target", self.targets, get_args(Target)),
            ("precision", self.precisions, get_args(Precision)),
        ):
            if not values or not set(values) <= set(known):
                raise ExportError(
                    f"no such {name}",
                    found=", ".join(values) or "none",
                    expected=", ".join(known),
                    hint=f"name one or more of those expected: --{name}",
                )
        if set(self.targets) == {"onnx"} and "fp16" in self.precisions:
            raise ExportError(
                "fp16 is made for OpenVINO only",
                found="target onnx, precision fp16",
                expected="fp32 or int8 for onnx: onnxruntime would convert every fp16 layer back to fp32 on a CPU",
                hint="leave fp16 out, or add --target openvino",
            )
        return tuple(
            (target, precision)
            for target in get_args(Target)
            for precision in get_args(Precision)
            if target in self.targets and precision in self.precisions and (target, precision) != ("onnx", "fp16")
        )


@dataclass(frozen=True)
class Subject:
    """What is exported, and what is known of it."""

    model: SegmentationModel
    request: ExportRequest
    step: StepEntry
    classes: tuple[ClassEntry, ...]
    background: str | None
    evaluation: Evaluation | None
    progress: ProgressCallback

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in channel order."""
        return tuple(entry.name for entry in self.classes)

    @property
    def old_count(self) -> int:
        """How many of the first channels the parent step had already."""
        return sum(entry.step < self.step.index for entry in self.classes)
