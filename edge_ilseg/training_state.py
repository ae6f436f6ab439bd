"""What a step in training leaves on the disk, so that the same command goes on after a kill or a power cut.

1. A checkpoint is one file, `state.safetensors`, in a hidden folder beside the step (`.01-boat.training`): whole or not
   there, nothing pickled. It holds all that the rest of the run depends on: the weights and statistics that are not
   frozen, momentum, the thresholds of pseudo-labels, and in its header, as JSON, the iterations done, the schedule, the
   loss scale of mixed precision, the memory format, the threads and the log. No random state: sample k is a function of
   (seed, k), and nothing else in the loop is drawn.
2. On a CPU the weights at the end are those of a run that was never killed, to the bit.
3. A checkpoint belongs to its plan: a hash over the step's record as it is before training (settings, method, images,
   parent, network, package versions) and over how it is run. With another one under the same name, with a damaged one,
   or with one of another version, training starts anew and says so.
4. It is written every `seconds` of training, 30 unless told otherwise, between two iterations: no more work than that
   and one iteration is lost. Scores are computed anew.
5. A full disk stops the run with an error, and the checkpoint before stays: the step could not be written in the end
   either, and after freeing some space the same command goes on.
6. Of several processes the first one writes, and all go on from the same iteration, or none.
7. The folder goes when the step is written, and when its loss is not finite: it would not be finite again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edge_ilseg.errors import EdgeIlsegError, WorkspaceError
from edge_ilseg.files import disk_error, sha256_bytes, write_bytes
from edge_ilseg.models.freezing import frozen_modules
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.records import parse_versioned
from edge_ilseg.schedule import CHECKPOINT_SECONDS, Schedule
from edge_ilseg.tuning import Tuning

FORMAT: Final = "edge-ilseg-training-state"
FORMAT_VERSION = 1
STATE_NAME = "state.safetensors"
THRESHOLDS = "thresholds"


class StateHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a checkpoint but its tensors."""

    format: Literal["edge-ilseg-training-state"]
    format_version: int
    plan: str
    iteration: Annotated[int, Meta(ge=1)]
    """Iterations done: the next one to run."""
    schedule: Schedule
    seconds: Annotated[float, Meta(ge=0)]
    """Of training so far, in all processes that took their turn."""
    precision: dict[str, float | int]
    """State of the loss scale, empty but for `16-mixed`."""
    tuning: Tuning
    """The memory format and the threads, which the last bits depend on."""
    log: str


@dataclass(frozen=True)
class TrainingState:
    """A checkpoint in memory; the tensors are `model.<name>`, `momentum.<name>` and `thresholds`."""

    header: StateHeader
    tensors: dict[str, Tensor]

    @property
    def thresholds_K(self) -> Tensor | None:
        """How sure the teacher must be, of a method with pseudo-labels."""
        return self.tensors.get(THRESHOLDS)


def training_folder(step_folder: Path) -> Path:
    """Where the checkpoint of a step in training is."""
    return step_folder.with_name(f".{step_folder.name}.training")


def plan_key(record: msgspec.Struct, **run: object) -> str:
    """The hash that ties a checkpoint to its plan (rule 3).

    Args:
        record: of the step as far as it is known before training.
        run: what else the weights depend on.
    """
    device_run = {**run, "cuda": torch.cuda.is_available()}  # what the accelerator "auto" becomes
    return sha256_bytes(msgspec.json.encode([FORMAT_VERSION, record, device_run], order="sorted"))


class StateKeeper:
    """Reads the checkpoint of one step in training at the start, and writes it from time to time.

    Args:
        folder: of the checkpoint, see `training_folder`.
        key: of the plan.
        seconds: between two checkpoints.
        say: told in a sentence when training goes on from a checkpoint or cannot.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        *,
        seconds: float = CHECKPOINT_SECONDS,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.key = key
        self.seconds = seconds
        self._written = time.monotonic()
        self.found = self._read(say)

    def _read(self, say: Callable[[str], None]) -> TrainingState | None:
        """The checkpoint of this plan, if there is one (rule 3)."""
        path = self.folder / STATE_NAME
        if not path.is_file():
            return None
        try:
            state = read_state(path)
        except EdgeIlsegError as error:
            say(f"training starts anew, the checkpoint cannot be used: {error.one_line()}")
            return None
        if state.header.plan != self.key:
            say(f"training starts anew: the checkpoint in {self.folder} is of other settings, data or packages")
            return None
        say(f"training goes on from iteration {state.header.iteration}")
        return state

    @property
    def first_iteration(self) -> int:
        """The iteration to go on from; 0 without a checkpoint."""
        return self.found.header.iteration if self.found else 0

    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= self.seconds

    def write(self, state: TrainingState) -> None:
        """Put a checkpoint in the place of the one before.

        Raises:
            EdgeIlsegError: the disk is full, or refuses the write; the checkpoint before is as it was (rule 5).
        """
        header = msgspec.structs.replace(state.header, plan=self.key)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        data = save(tensors, metadata={"state": msgspec.json.encode(header).decode()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        write_bytes(self.folder / STATE_NAME, data)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Take the folder away, with whatever a kill has left half-written in it (rule 7)."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read_state(path: Path) -> TrainingState:
    """Read a checkpoint.

    Raises:
        WorkspaceError: it is damaged, or of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("state", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise WorkspaceError("the checkpoint is damaged", where=path, found=str(error), hint="delete it") from error
    header = parse_versioned(
        text.encode(),
        StateHeader,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=WorkspaceError,
        what="the checkpoint",
        where=path,
        hint="delete it",
    )
    return TrainingState(header, tensors)


def _trained_names(model: SegmentationModel) -> list[str]:
    """The names of all parameters and buffers that are not frozen."""
    frozen = {id(tensor) for module in frozen_modules(model, model.freeze) for tensor in _tensors(module)}
    return [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in frozen]


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def capture_tensors(
    model: SegmentationModel, optimizer: torch.optim.Optimizer, thresholds_K: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint (rule 1), copied."""
    state = model.state_dict()
    tensors = {f"model.{name}": state[name].clone() for name in _trained_names(model)}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum.clone()
    if thresholds_K is not None:
        tensors[THRESHOLDS] = thresholds_K
    return tensors


@torch.no_grad()
def restore_tensors(
    model: SegmentationModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], where: object = None
) -> None:
    """Bring the model and the optimiser, on whatever device, back to what `capture_tensors` saw.

    Raises:
        WorkspaceError: the tensors are another network's.
    """
    state, expected = model.state_dict(), {f"model.{name}" for name in _trained_names(model)}
    found = {name for name in tensors if name.startswith("model.")}
    if found != expected or any(tensors[f"model.{n}"].shape != state[n].shape for n in _trained_names(model)):
        raise WorkspaceError("the checkpoint is of another network", where=where, hint="delete it")
    for name in _trained_names(model):
        state[name].copy_(tensors[f"model.{name}"])
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if (momentum := tensors.get(f"momentum.{name}")) is not None:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def new_header(
    iteration: int, schedule: Schedule, seconds: float, precision: dict[str, Any], log: str, tuning: Tuning
) -> StateHeader:
    """The header of a state; the keeper puts the plan in."""
    return StateHeader(FORMAT, FORMAT_VERSION, "", iteration, schedule, seconds, precision, tuning, log)
