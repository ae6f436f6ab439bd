"""What an export reads of the step's own images: the extremes of each tensor, and the moments of what layers read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.calibration.collect import collect_extremes
from edge_ilseg.calibration.merge import Measured
from edge_ilseg.calibration.moments import Moments, collect_moments
from edge_ilseg.calibration.sample import CalibrationImages
from edge_ilseg.errors import ExportError
from edge_ilseg.export.request import Subject
from edge_ilseg.images import resize_image


class StepImages:
    """The images of one export, read when they are needed, and what is kept of them."""

    def __init__(self, subject: Subject, float_path: Path, calibration: CalibrationImages | None) -> None:
        """
        Args:
            subject: what is exported.
            float_path: its float graph.
            calibration: images of the step; None where weights alone are wanted.
        """
        self.subject = subject
        self.float_path = float_path
        self.calibration = calibration
        self._moments: dict[str, Moments] = {}

    def read(self, image_ids: Iterable[str]) -> Iterator[NDArray[np.uint8]]:
        """Images at the input size, uint8, H x W x 3."""
        if self.calibration is not None:
            spec = self.subject.model.spec
            for image_id in image_ids:
                image_HWC = self.calibration.read(image_id)
                yield resize_image(image_HWC, spec.input_height_px, spec.input_width_px)

    def measure(self) -> Measured | None:
        """The extremes on the images to calibrate on, or None where no range is wanted.

        Raises:
            ExportError: no image shows anything, or the ranges cannot be measured.
        """
        if self.subject.request.ranges == "weights-only" or self.calibration is None:
            return None
        image_ids = self.calibration.ids
        shows_something = False

        def images_NHWC() -> Iterator[NDArray[np.uint8]]:
            nonlocal shows_something
            for image_HWC in self.read(image_ids):
                shows_something = shows_something or bool((image_HWC != image_HWC[0, 0]).any())
                yield image_HWC[np.newaxis]

        measured = collect_extremes(
            self.float_path,
            images_NHWC(),
            image_ids=image_ids,
            images_sha256=self.calibration.images_sha256,
            step=self.subject.step.name,
            progress=self.subject.progress,
        )
        if not shows_something:
            raise ExportError(
                "every calibration image is of one colour: ranges from them would clip what a photograph excites",
                found=f"{len(image_ids)} images, {image_ids[0]!r} the first of them",
                expected="images of this step",
                hint="look at the images, or export --ranges weights-only, which needs none",
            )
        return measured

    def moments(self, nodes: Collection[str]) -> dict[str, Moments]:
        """What these layers read on the images to calibrate on; collected when a layer is first asked for."""
        request = self.subject.request
        if request.rounding == "nearest" or request.ranges == "weights-only" or self.calibration is None:
            return {}
        self._moments |= collect_moments(
            self.float_path,
            (image_HWC[np.newaxis] for image_HWC in self.read(self.calibration.ids)),
            [name for name in nodes if name not in self._moments],
            count=len(self.calibration.ids),
            progress=self.subject.progress,
        )
        self.subject.progress("rounding the weights", 0.0)
        return self._moments
