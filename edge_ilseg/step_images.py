"""The images that a step has learned from, found again: for calibration, and for statistics. Needs no torch."""

from __future__ import annotations

from edge_ilseg.checkpoint import StepRecord
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.step_view import StepView, image_set_sha256
from edge_ilseg.errors import DataError
from edge_ilseg.scenario import label_lookup


def check_step_images(record: StepRecord, dataset: Dataset) -> None:
    """Check that a data set has the images of a step, as they were.

    Raises:
        DataError: one is gone, or shows something else.
    """
    known = set(dataset.ids(record.data.train_split))
    gone = [image_id for image_id in record.data.image_ids if image_id not in known]
    if gone:
        raise DataError(
            f"{len(gone)} of the {len(record.data.image_ids)} images that step {record.name} learned from are gone",
            where=f"data set of kind {dataset.info.kind}, split {record.data.train_split}",
            found=f"no image {gone[0]!r}",
            hint="say where they are: --data KIND:ROOT",
        )
    if image_set_sha256(record.data.image_ids, dataset) != record.data.images_sha256:
        raise DataError(
            f"the images are not those that step {record.name} learned from",
            where=f"data set of kind {dataset.info.kind}, split {record.data.train_split}",
            found="other pixels under the same ids",
            expected=f"images with the hash {record.data.images_sha256[:12]}",
            hint="say where they are: --data KIND:ROOT",
        )


def step_view_again(record: StepRecord, dataset: Dataset) -> StepView:
    """The images of a step with the labels that it saw in them.

    Raises:
        DataError: as of `check_step_images`.
    """
    check_step_images(record, dataset)
    old, new = record.class_names[: record.old_count], record.class_names[record.old_count :]
    setup, classes = record.data.setup, dataset.info.classes
    lookup = label_lookup(setup, classes, record.background, old=old, new=new)  # type: ignore[arg-type]
    return StepView(dataset, record.data.image_ids, lookup)
