"""Train small steps in as many processes as torchrun starts, or in one: `python train_worker.py OUT METHOD...`.

Each method's weights are written to `OUT/METHOD.safetensors`, and its last losses to `OUT/METHOD.json`, by the first
process. `METHOD/train` has batch norm in training mode, for a few iterations: without frozen statistics this small
network is so restless that in one process another order of summing changes weights by a tenth after twenty.
`samples` trains nothing: each process writes which samples it got, `OUT/samples-RANK.json`.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from edge_ilseg.config import TrainConfig
from edge_ilseg.data.loader import training_batches
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.step_view import StepView
from edge_ilseg.methods import METHODS
from edge_ilseg.metrics import VOID
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.progress import no_progress
from edge_ilseg.pseudo_labels import entropy_thresholds
from edge_ilseg.terms import StepFacts
from edge_ilseg.train import WorkerDone, train

SPEC = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=32, input_width_px=32)
ITERATIONS, BATCH_SIZE, OLD = 20, 4, 7


def make_view() -> StepView:
    """Images of which some are mostly void: what one process sees of a batch has fewer labelled pixels."""
    dataset = Shapes(train=10, height_px=32, width_px=32)
    lookup = np.full(256, VOID, dtype=np.uint8)
    lookup[1 : OLD + 2] = range(OLD + 1)  # the background of the data set is void
    return StepView(dataset, dataset.ids("train"), lookup)


def make_networks() -> tuple[SegmentationModel, SegmentationModel]:
    """A student and its teacher."""
    networks = []
    for _ in range(2):
        torch.manual_seed(1)
        networks.append(build_model(SPEC, (OLD,)))
    networks[0].grow(1)
    return networks[0], networks[1]


def train_one(word: str, out: Path, processes: int) -> None:
    """Train one method and write what came of it."""
    name, _, mode = word.partition("/")
    view, method = make_view(), METHODS[name]
    is_training = mode == "train"
    settings = TrainConfig(
        iterations=3 if is_training else ITERATIONS,
        batch_size=BATCH_SIZE,
        learning_rate=0.01,
        batch_norm="train" if is_training else "eval",
    )
    student, teacher = make_networks()
    logs = torch.linspace(-3, 0, OLD + 1) if method.logit_adjustment else None
    run = train(
        student,
        training_batches(view, SPEC, settings, devices=processes),
        settings,
        teacher=teacher,
        method=method,
        facts=StepFacts(OLD, background=0, log_frequency_C=logs),
        find_thresholds=lambda asked: entropy_thresholds(asked, view, 0, no_progress),
        accelerator="cpu",
        devices=processes,
        progress=no_progress,
    )
    stem = word.replace("/", "-")
    save_file({key: value.contiguous() for key, value in student.state_dict().items()}, out / f"{stem}.safetensors")
    (out / f"{stem}.json").write_text(json.dumps(run.final_terms))


def note_samples(out: Path, processes: int) -> None:
    """Write the numbers of the samples that this process gets, batch by batch."""
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    numbers = list(range(ITERATIONS * BATCH_SIZE))
    loader = fabric.setup_dataloaders(DataLoader(numbers, batch_size=BATCH_SIZE // processes, shuffle=False))  # type: ignore[arg-type]
    (out / f"samples-{fabric.global_rank}.json").write_text(json.dumps([batch.tolist() for batch in loader]))


def main() -> None:
    """Do what was named."""
    torch.set_num_threads(1)
    out, processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    for word in sys.argv[2:]:
        with suppress(WorkerDone):
            if word == "samples":
                note_samples(out, processes)
            else:
                train_one(word, out, processes)


if __name__ == "__main__":
    main()
