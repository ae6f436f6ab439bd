"""Four real bundles of one family, trained on generated images: a base, two distilled steps, and a fine-tuned one.

The distilled steps keep the old classes; the fine-tuned one, made in the place of the second, has forgotten them. Small
and quick, but no fakes: trained, exported and calibrated by the same code as a user's.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, override
from edge_ilseg.data import open_data
from edge_ilseg.demo import METHODS, MODEL, TRAIN
from edge_ilseg.export.request import ExportRequest
from edge_ilseg.pipeline import export_step, run_plan
from edge_ilseg.planning import plan_base, plan_step
from edge_ilseg.workspace import create_workspace

NEW_CLASSES = ("star", "ring")
BASE_ITERATIONS, STEP_ITERATIONS = 500, 80
TEST_IMAGES = 150
DATA = DataConfig(kind="shapes", options={"test": TEST_IMAGES}, eval_split="test", setup="disjoint")
DATA_TEXT = "shapes:"


class Lineage(NamedTuple):
    """Folders of bundles."""

    base: Path
    first: Path
    second: Path
    forgetful: Path
    """As `second`, fine-tuned."""


def train_lineage(folder: Path) -> Lineage:
    """Train and export all four, for onnxruntime in int8."""
    names = tuple(name for name in open_data(DATA).info.classes if name not in NEW_CLASSES)
    distilled, fine_tuned = METHODS["distilled"], METHODS["fine-tuned"]
    train = msgspec.structs.replace(TRAIN, iterations=BASE_ITERATIONS)
    workspace = create_workspace(folder / "work", Config(DATA, ClassesConfig(names), MODEL, "none", train, distilled))
    request = ExportRequest(targets=("onnx",), precisions=("int8",), max_old_drop_points=None, golden_count=2)

    def export(record):  # type: ignore[no-untyped-def]
        out = workspace.bundle_folder(record.name)
        export_step(workspace, record, request, out)
        return out

    def teach(parent, new: str, method: StepConfig, iterations: int, name: str):  # type: ignore[no-untyped-def]
        settings = override(method, iterations=iterations)
        return run_plan(workspace, plan_step(workspace, [new], settings, parent_name=parent.name, name=name))

    base = run_plan(workspace, plan_base(workspace))
    first = teach(base, NEW_CLASSES[0], distilled, STEP_ITERATIONS, "first")
    second = teach(first, NEW_CLASSES[1], distilled, STEP_ITERATIONS, "second")
    forgetful = teach(first, NEW_CLASSES[1], fine_tuned, 3 * STEP_ITERATIONS, "forgetful")
    return Lineage(*(export(record) for record in (base, first, second, forgetful)))
