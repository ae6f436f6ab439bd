"""What int8 costs the classes that were there before, judged without an old image.

1. The teacher is the parent's own int8 model, in the same runtime: its masks are what the device shows today. For each
   old class, agreement is the IoU of the teacher's mask with the new one. Training moves it, too; so the fp32 model is
   compared with the teacher in the same way, and the *drop* is what int8 agrees less than fp32.
2. With labelled images the same is done with the labels in the teacher's place: old-class mIoU of fp32 less that of
   int8; of all classes at step 0, where none is old.
3. A class is judged where the teacher, or the labels, show it on `MIN_SHARE` of the pixels: the IoU of a few pixels is
   noise.
4. Golden images are compared and recorded. They are drawn, not photographed: they show what changed, and their classes
   are no measure of accuracy, so they do not count against the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.images import resize_mask
from edge_ilseg.int8_record import GuardImages, GuardRow
from edge_ilseg.metrics import class_iou, confusion_matrix
from edge_ilseg.progress import ProgressCallback, no_progress

MIN_SHARE = 0.001
AT_HAND: GuardImages = "images at hand"
GOLDEN: GuardImages = "golden images"
LABELLED: GuardImages = "labelled images"
FP32 = "fp32"

Masks = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Image, uint8, H x W x 3, at the input size -> mask, uint8, H x W."""


class GuardSet(NamedTuple):
    """A set of images to compare on."""

    kind: GuardImages
    read: Callable[[], Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]]
    """Gives each time the same images, uint8, H x W x 3, at the input size; with labels, uint8, at their own size and
    255 for void, or with None: the teacher's mask is the reference."""
    judged: tuple[int, ...]
    """Channels of the classes that count."""


class _Count(NamedTuple):
    confusion: NDArray[np.int64]
    images: int


class Guard:
    """Compares int8 models with fp32, one after another; what does not depend on them is computed once."""

    def __init__(
        self,
        sets: Sequence[GuardSet],
        fp32: Masks,
        teachers: Mapping[str, Masks],
        classes: Sequence[str],
        progress: ProgressCallback = no_progress,
    ) -> None:
        """
        Args:
            sets: what to compare on.
            fp32: the float model.
            teachers: the parent's int8 model for each runtime that it has one for.
            classes: names in channel order.
            progress: told which model is run on which images; how many there are is not known.
        """
        self._sets = sets
        self._fp32 = fp32
        self._teachers = teachers
        self._classes = classes
        self._progress = progress
        self._masks: dict[tuple[str, str], list[NDArray[np.uint8]]] = {}
        self._labelled_fp32: _Count | None = None

    @property
    def has_reference(self) -> bool:
        """Whether there is a teacher, or a set with labels."""
        return bool(self._teachers) or any(item.kind == LABELLED for item in self._sets)

    def rows(self, runtime: str, int8: Masks) -> tuple[GuardRow, ...]:
        """What the int8 model of one runtime loses on each set that has a reference for it (rules 1 and 2)."""
        found = []
        for item in self._sets:
            if item.kind == LABELLED:
                if self._labelled_fp32 is None:
                    self._labelled_fp32 = self._against_labels(item, FP32, self._fp32)
                row = self._compare(item, runtime, self._labelled_fp32, self._against_labels(item, runtime, int8))
            elif runtime in self._teachers:
                teacher = self._masks_once(item, f"the parent's int8 in {runtime}", self._teachers[runtime])
                fp32 = self._against(teacher, self._masks_once(item, FP32, self._fp32))
                row = self._compare(item, runtime, fp32, self._against(teacher, self._run(item, runtime, int8)))
            else:
                continue
            found += [row] if row is not None else []
        return tuple(found)

    def _masks_once(self, item: GuardSet, who: str, masks: Masks) -> list[NDArray[np.uint8]]:
        """A model's masks of a set, computed at the first call and kept."""
        key = (item.kind, who)
        if key not in self._masks:
            self._masks[key] = self._run(item, who, masks)
        return self._masks[key]

    def _run(self, item: GuardSet, who: str, masks: Masks) -> list[NDArray[np.uint8]]:
        self._progress(f"judging int8: {who} on {item.kind}", 0.0)
        return [masks(image_HWC) for image_HWC, _ in item.read()]

    def _against(self, references: list[NDArray[np.uint8]], masks: list[NDArray[np.uint8]]) -> _Count:
        """Confusion, int64, K x K, of masks with references of the same size, and how many there are."""
        confusion = np.zeros((len(self._classes), len(self._classes)), dtype=np.int64)
        for reference_HW, mask_HW in zip(references, masks, strict=True):
            confusion += confusion_matrix(reference_HW, mask_HW, len(self._classes))
        return _Count(confusion, len(masks))

    def _against_labels(self, item: GuardSet, who: str, masks: Masks) -> _Count:
        """The same for labels at their own size, one image at a time."""
        self._progress(f"judging int8: {who} on {item.kind}", 0.0)
        count = _Count(np.zeros((len(self._classes), len(self._classes)), dtype=np.int64), 0)
        for image_HWC, labels_HW in item.read():
            if labels_HW is not None:
                mask_HW = resize_mask(masks(image_HWC), *labels_HW.shape)
                count = _Count(
                    count.confusion + confusion_matrix(labels_HW, mask_HW, len(self._classes)), count.images + 1
                )
        return count

    def _compare(self, item: GuardSet, runtime: str, fp32: _Count, int8: _Count) -> GuardRow | None:
        """None where no judged class is shown (rule 3)."""
        shown = fp32.confusion.sum(axis=1)
        judged = [channel for channel in item.judged if shown[channel] >= max(1, MIN_SHARE * shown.sum())]
        if not judged:
            return None
        iou_fp32, iou_int8 = class_iou(fp32.confusion)[judged], class_iou(int8.confusion)[judged]
        drops = 100 * (iou_fp32 - iou_int8)
        at = int(np.argmax(drops))
        return GuardRow(
            runtime=runtime,
            images=item.kind,
            count=fp32.images,
            fp32=float(iou_fp32.mean()),
            int8=float(iou_int8.mean()),
            drop_points=float(drops.mean()),
            worst_class=self._classes[judged[at]],
            worst_class_drop_points=float(drops[at]),
            class_iou={
                self._classes[channel]: (float(one), float(other))
                for channel, one, other in zip(judged, iou_fp32, iou_int8, strict=True)
            },
        )


def counted_drop(rows: Iterable[GuardRow]) -> float | None:
    """The highest drop that counts against the limit, points (rule 4); None where there is none."""
    return max((row.drop_points for row in rows if row.images != GOLDEN), default=None)
