"""A step on the disk: `model.safetensors`, `step.json`, the training's log and statistics; nothing pickled.

1. The id of a step is the SHA-256 of its record, which holds the SHA-256 of its weights and its parent's id: a step
   names its whole lineage, and a changed byte anywhere in those two is found. The log (`edge_ilseg.training_log`) is
   something to look at, the statistics (`edge_ilseg.feature_statistics`) something to go on from: neither is a part of
   the step's identity, and both may be deleted.
2. A step appears under its name whole or not at all (`edge_ilseg.files.new_folder`).
3. Reading a record needs no torch; loading a model does. Format page: docs/workspace-format.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from edge_ilseg.config import DataOptions, TrainConfig
from edge_ilseg.errors import WorkspaceError
from edge_ilseg.feature_statistics import STATISTICS_NAME
from edge_ilseg.files import new_folder, sha256_bytes, sha256_file
from edge_ilseg.methods import Method
from edge_ilseg.metrics import Metrics
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.records import parse_versioned
from edge_ilseg.training_log import LOG_NAME

if TYPE_CHECKING:
    from edge_ilseg.models.segmentation import SegmentationModel

FORMAT: Final = "edge-ilseg-step"
FORMAT_VERSION = 2
RECORD_NAME = "step.json"
WEIGHTS_NAME = "model.safetensors"
RESTORE_STEP = "restore the folder from a copy, or delete it and train the step again"


class ClassRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One class, in channel order: its name, the step that added it, its colour."""

    name: str
    step: int
    color: tuple[int, int, int]


class DataRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The images of a step: which, and a hash over their pixels. Not where they are."""

    kind: str
    options: DataOptions
    from_workspace: bool
    """Whether they are of the workspace's own data set; `step --data` brings others."""
    train_split: str
    setup: str
    partition_seed: int
    image_ids: tuple[str, ...]
    images_sha256: str


class StepRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything about a step but its weights; enough to run it again. See docs/workspace-format.md."""

    format: Literal["edge-ilseg-step"]
    format_version: int
    id: str
    index: int
    name: str
    created: str
    parent_id: str | None
    parent_name: str | None
    classes: tuple[ClassRecord, ...]
    background: str | None
    method: Method | None
    model: ModelSpec
    initial_weights: str
    initial_weights_sha256: str | None
    training: TrainConfig
    data: DataRecord
    packages: dict[str, str]
    accelerator: str
    training_seconds: float
    weights_sha256: str
    weights_bytes: int
    encoder_sha256: str
    metrics: dict[str, Metrics]
    """Scores by split, of the data set that the step learned from."""
    parent_metrics: dict[str, Metrics]
    """The parent's on the same images, where pixels of the new classes count as background, or as void."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in channel order."""
        return tuple(item.name for item in self.classes)

    @property
    def new_classes(self) -> tuple[str, ...]:
        """The classes that this step added."""
        return tuple(item.name for item in self.classes if item.step == self.index)

    @property
    def old_count(self) -> int:
        """How many of the first channels the parent had already; 0 at step 0."""
        return len(self.classes) - len(self.new_classes)

    @property
    def class_counts(self) -> tuple[int, ...]:
        """How many classes each step added, step 0 first."""
        return tuple(sum(item.step == step for item in self.classes) for step in range(self.index + 1))


def record_id(record: StepRecord) -> str:
    """SHA-256 of the record's canonical JSON with an empty `id` (rule 1)."""
    return _content_id(msgspec.to_builtins(record))


def _content_id(content: dict[str, object]) -> str:
    return sha256_bytes(msgspec.json.encode({**content, "id": ""}, order="sorted"))


def parse_record(data: bytes, *, where: object = None) -> StepRecord:
    """Turn the bytes of a `step.json` into a `StepRecord`.

    Raises:
        WorkspaceError: not JSON, another format or version, or changed after it was written.
    """
    record = parse_versioned(
        data,
        StepRecord,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=WorkspaceError,
        what="the step's record",
        where=where,
        hint=RESTORE_STEP,
    )
    found_id = _content_id(msgspec.json.decode(data))  # of what was written: a field that is newer than it has no part
    if record.id != found_id:
        raise WorkspaceError(
            "the step's record was changed after it was written",
            where=where,
            found=f"content {found_id[:12]}",
            expected=f"id {record.id[:12]}",
            hint=RESTORE_STEP,
        )
    return record


def read_record(folder: Path) -> StepRecord:
    """Read a step's record.

    Raises:
        WorkspaceError: the folder is no step, or is damaged.
    """
    path = folder / RECORD_NAME
    try:
        return parse_record(path.read_bytes(), where=path)
    except FileNotFoundError as error:
        raise WorkspaceError(
            "this folder is no step: it has no step.json", where=folder, hint="delete it, or restore it from a copy"
        ) from error


def check_weights(folder: Path, record: StepRecord) -> None:
    """Check the step's weights against the hash in its record.

    Raises:
        WorkspaceError: the file is missing or differs; the error names the step.
    """
    path = folder / WEIGHTS_NAME
    found = sha256_file(path) if path.is_file() else "no file"
    if found != record.weights_sha256:
        raise WorkspaceError(
            f"the weights of step {record.name} are damaged",
            where=path,
            found=found[:12],
            expected=f"sha256 {record.weights_sha256[:12]}, {record.weights_bytes} bytes",
            hint="restore the file from a copy, or delete the step's folder and train it again",
        )


def write_step(
    folder: Path, record: StepRecord, model: SegmentationModel, *, log: str = "", statistics: bytes = b""
) -> StepRecord:
    """Write a step whole or not at all (rule 2) and return its record with the hashes filled in.

    Args:
        folder: of the step.
        record: all but the hashes and the id.
        model: its network.
        log: what `training.csv` holds; no file is written where it is empty.
        statistics: what `statistics.safetensors` holds; the same.

    Raises:
        WorkspaceError: there is a step of that name already.
        EdgeIlsegError: the disk is full; earlier steps are untouched.
    """
    from safetensors.torch import save

    from edge_ilseg.models.freezing import encoder_sha256

    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    record = msgspec.structs.replace(
        record,
        id="",
        weights_sha256=sha256_bytes(weights),
        weights_bytes=len(weights),
        encoder_sha256=encoder_sha256(model),
    )
    record = msgspec.structs.replace(record, id=record_id(record))
    try:
        with new_folder(folder) as part:
            (part / WEIGHTS_NAME).write_bytes(weights)
            (part / RECORD_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
            if log:
                (part / LOG_NAME).write_text(log, encoding="utf-8")
            if statistics:
                (part / STATISTICS_NAME).write_bytes(statistics)
    except FileExistsError as error:
        raise WorkspaceError(
            "there is a step of that name already", where=folder, hint="give the new one another --name, or delete it"
        ) from error
    return record


def load_model(folder: Path, record: StepRecord) -> SegmentationModel:
    """Build the step's network and load its weights, after checking them.

    Raises:
        WorkspaceError: the weights are damaged or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from edge_ilseg.models.segmentation import build_model

    check_weights(folder, record)
    model = build_model(record.model, record.class_counts)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except (SafetensorError, RuntimeError) as error:
        raise WorkspaceError(
            f"the weights of step {record.name} do not fit its record",
            where=folder / WEIGHTS_NAME,
            found=str(error),
            hint=RESTORE_STEP,
        ) from error
    return model.eval()
