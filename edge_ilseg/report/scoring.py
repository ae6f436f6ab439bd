"""Run the step's models and its parent's over labelled images, and count.

1. *after* is the step and *before* its parent, both in fp32: the bundles' models where there are some, run as a device
   runs them, else the checkpoints by torch. *int8* is the bundle's. Whatever cannot be run is left out and says why.
2. Everything is counted in the channels of the step: the parent cannot be right where the truth is a new class.
3. An image is read once and shown to all models, several images at the same time: a bundle's models are loaded for
   throughput. No pixel is kept; a bad image is named and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import ModelEntry
from edge_ilseg.checkpoint import load_model
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.devices.evaluation import check_channels
from edge_ilseg.devices.runtime import check_fit, installed_runtimes, load_session
from edge_ilseg.devices.verification import spread
from edge_ilseg.errors import DataError, EdgeIlsegError, check_extra
from edge_ilseg.images import SAME_SIZE_HINT, resize_image, resize_mask
from edge_ilseg.metrics import confusion_matrix
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.report.gather import Gathered, StepFacts
from edge_ilseg.scenario import evaluation_lookup
from edge_ilseg.workspace import Workspace

Role = Literal["before", "after", "int8"]
ROLES: tuple[Role, ...] = ("before", "after", "int8")
LOOKERS = 2
"""Images that are looked at at the same time, at least."""


class Eye(NamedTuple):
    """One model that is ready to look at images."""

    role: Role
    label: str
    """As `onnxruntime fp32`."""
    mask: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
    """uint8 H x W x 3 to channels, uint8, at whatever size the model gives; called from several threads."""
    concurrent_runs: int = 1
    """Images that it runs at the same time without loss."""


class Share(NamedTuple):
    """Pixels that are right, of how many."""

    right: int
    pixels: int

    @property
    def value(self) -> float | None:
        """0..1; None without a pixel."""
        return self.right / self.pixels if self.pixels else None


class ImageScore(msgspec.Struct, frozen=True):
    """One image: shares of its pixels that are right, by model; of all, of the old and of the new classes' pixels."""

    image_id: str
    all_pixels: dict[Role, Share]
    old_pixels: dict[Role, Share]
    new_pixels: dict[Role, Share]


class Scoring(msgspec.Struct, frozen=True):
    """What was counted. Matrices are int64, K x K, in the channels of the step; rows are the truth."""

    dataset: str
    split: str
    images_asked: int
    bad_images: tuple[tuple[str, str], ...]
    labels: dict[Role, str]
    confusions: dict[Role, NDArray[np.int64]]
    images: tuple[ImageScore, ...]


def load_eyes(workspace: Workspace, gathered: Gathered, *, threads: int | None = None) -> tuple[list[Eye], list[str]]:
    """The models that can be run (rule 1), and a sentence for each that cannot."""
    found: list[Eye] = []
    sentences: list[str] = []
    steps: tuple[tuple[Role, StepFacts | None], ...] = (("before", gathered.parent), ("after", gathered.step))
    for role, facts in steps:
        if facts is None:
            continue
        try:
            found.append(_float_eye(workspace, role, facts, threads))
        except EdgeIlsegError as error:
            sentences.append(f"Step {facts.record.name} could not be run: {error.one_line()}.")
    try:
        if entry := _entry(gathered.step, "int8"):
            found.append(_bundle_eye("int8", gathered.step, entry, threads))
    except EdgeIlsegError as error:
        sentences.append(f"The int8 model could not be run: {error.one_line()}.")
    return found, sentences


def _entry(facts: StepFacts, precision: str) -> ModelEntry | None:
    """The bundle's model in a precision, for the first installed runtime that it is there for."""
    entries = facts.bundle.models if facts.bundle is not None else ()
    usable = [entry for entry in entries if entry.precision == precision and entry.runtime in installed_runtimes()]
    return min(usable, key=lambda entry: installed_runtimes().index(entry.runtime)) if usable else None


def _float_eye(workspace: Workspace, role: Role, facts: StepFacts, threads: int | None) -> Eye:
    entry = _entry(facts, "fp32")
    if entry is not None and facts.record.training.geometry == "stretch":
        return _bundle_eye(role, facts, entry, threads)
    return _torch_eye(workspace, role, facts)


def _bundle_eye(role: Role, facts: StepFacts, entry: ModelEntry, threads: int | None) -> Eye:
    assert facts.bundle is not None
    session = load_session(facts.bundle_folder, entry, threads=threads, hint="throughput")
    check_fit(session, facts.bundle, where=facts.bundle_folder)

    def mask(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return session.mask(resize_image(image_HWC, session.input_height_px, session.input_width_px))

    return Eye(role, f"{entry.runtime} {entry.precision}", mask, session.concurrent_runs)


def _torch_eye(workspace: Workspace, role: Role, facts: StepFacts) -> Eye:
    check_extra("train", ["torch", "safetensors"], "a step without a bundle in fp32")
    from edge_ilseg.evaluate import predict_masks

    model = load_model(workspace.step_folder(facts.record.name), facts.record)
    geometry = facts.record.training.geometry
    return Eye(role, "torch fp32", lambda image_HWC: next(predict_masks(model, [image_HWC], geometry)))


def score_images(
    eyes: Sequence[Eye],
    gathered: Gathered,
    dataset: Dataset,
    split: str,
    most: int,
    progress: ProgressCallback = no_progress,
) -> Scoring:
    """Show at most `most` images of a split to all models (rules 2 and 3).

    Raises:
        DataError: the split is unknown or empty.
        ClassNameError: the data set's classes cannot be counted in the step's.
        BundleError: a model cannot be run.
    """
    record = gathered.step.record
    ids = spread(dataset.ids(split), most)
    lookup = evaluation_lookup(dataset.info.classes, dataset.info.background, record.class_names)
    class_count, old_count = len(record.classes), record.old_count
    confusions: dict[Role, NDArray[np.int64]] = {
        eye.role: np.zeros((class_count, class_count), dtype=np.int64) for eye in eyes
    }
    images: list[ImageScore] = []
    bad_images: list[tuple[str, str]] = []

    def look(image_id: str) -> dict[Role, NDArray[np.int64]] | DataError:
        try:
            image_HWC, labels_HW = read_pair(dataset, image_id)
        except DataError as error:
            return error
        return {eye.role: _count(eye, image_HWC, labels_HW, lookup, class_count) for eye in eyes}

    with ThreadPoolExecutor(lookers(eyes), "edge-ilseg-report") as pool:
        for done, (image_id, found) in enumerate(zip(ids, pool.map(look, ids), strict=True), start=1):
            if isinstance(found, DataError):
                bad_images.append((image_id, found.one_line()))
            else:
                for role, confusion in found.items():
                    confusions[role] += confusion
                images.append(_score_image(image_id, found, old_count))
            progress("looking at images", done / len(ids))
    labels = {eye.role: eye.label for eye in eyes}
    return Scoring(dataset.info.kind, split, len(ids), tuple(bad_images), labels, confusions, tuple(images))


def lookers(eyes: Sequence[Eye]) -> int:
    """How many images the models are shown at the same time."""
    return max(LOOKERS, *(eye.concurrent_runs for eye in eyes))


def read_pair(dataset: Dataset, image_id: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its label ids, of one size.

    Raises:
        DataError: a file is missing or damaged, or the sizes differ.
    """
    image_HWC, labels_HW = dataset.read_image(image_id), dataset.read_labels(image_id)
    if image_HWC.shape[:2] != labels_HW.shape:
        raise DataError("the mask has another size than the image", where=image_id, hint=SAME_SIZE_HINT)
    return image_HWC, labels_HW


def _count(
    eye: Eye,
    image_HWC: NDArray[np.uint8],
    labels_HW: NDArray[np.uint8],
    lookup: NDArray[np.uint8],
    class_count: int,
) -> NDArray[np.int64]:
    mask_HW = eye.mask(image_HWC)
    check_channels(mask_HW, class_count)
    return confusion_matrix(labels_HW, resize_mask(mask_HW, *labels_HW.shape), class_count, lookup)


def _score_image(image_id: str, found: dict[Role, NDArray[np.int64]], old_count: int) -> ImageScore:
    rows = (slice(None), slice(0, old_count), slice(old_count, None))
    parts = [
        {role: Share(int(np.diag(counts)[part].sum()), int(counts[part].sum())) for role, counts in found.items()}
        for part in rows
    ]
    return ImageScore(image_id, *parts)
