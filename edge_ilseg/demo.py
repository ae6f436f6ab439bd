"""The whole way on generated images: base model, two increments, bundles, and a verdict on each.

One increment is fine-tuned and one is distilled, from the same base and with the same images, iterations and learning
rate, so that the difference between them is the method's. The setup is `disjoint`: objects of the old classes in the
new images are labelled background, as they are when somebody labels the new class alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from edge_ilseg.config import (
    CONFIG_NAME,
    ClassesConfig,
    Config,
    DataConfig,
    StepConfig,
    TrainConfig,
    override,
    read_config,
)
from edge_ilseg.data import open_data
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import VerifyReport
from edge_ilseg.errors import EXIT_UNDECIDED, WorkspaceError, check_extra
from edge_ilseg.metrics import Metrics
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.pipeline import EXPORT_MODULES, TRAINING_MODULES, export_step, run_plan
from edge_ilseg.planning import plan_base, plan_step
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.workspace import create_workspace

NEW_CLASS = "star"
DISTILLED = "distilled"
FINE_TUNED = "fine-tuned"
DATA = DataConfig(kind="shapes", options={"test": 600}, eval_split="test", setup="disjoint")
"""With the 200 test images of the data set's default the verdict on the distilled model would be "too few images"."""
MODEL = ModelSpec(backbone="tiny", output_stride=8, decoder_channels=64, input_height_px=96, input_width_px=96)
TRAIN = TrainConfig(iterations=1600, learning_rate=0.1, decoder_rate_factor=1.0, scale_min=0.8, scale_max=1.2)
STEP = StepConfig(iterations=300, learning_rate=0.003, decoder_rate_factor=1.0, scale_min=0.8, scale_max=1.2)
METHODS = {
    FINE_TUNED: override(STEP, method="finetune"),
    DISTILLED: override(STEP, method="kd-output", losses={"kd_output": 20.0}, kd_softmax="old"),
}
"""Chosen on the validation split; the demo scores on the test split."""


class DemoRow(msgspec.Struct, frozen=True):
    """One model of the demo: scores on the test split, and the verdict of `verify` on its bundle against the base's."""

    model: str
    precision: str
    metrics: Metrics
    verdict: str | None


class DemoResult(msgspec.Struct, frozen=True):
    """What the demo ends with."""

    rows: tuple[DemoRow, ...]
    bundle: str


def run_demo(
    folder: Path,
    *,
    base_iterations: int = TRAIN.iterations,
    step_iterations: int = STEP.iterations,
    replace: bool = False,
    progress: ProgressCallback = no_progress,
) -> DemoResult:
    """Run the whole pipeline in a new workspace at `folder`.

    Args:
        folder: of the workspace.
        base_iterations: of step 0.
        step_iterations: of each increment.
        replace: delete the workspace of an earlier demo at `folder` first.
        progress: told what is done.

    Raises:
        WorkspaceError: there is something at `folder` already.
        EdgeIlsegError: an extra is missing, or the disk is full.
    """
    check_extra("all", sorted({*TRAINING_MODULES, *EXPORT_MODULES}), "the demo")
    from edge_ilseg.export.request import ExportRequest

    if replace:
        _delete_demo(folder)
    base_classes = tuple(name for name in open_data(DATA).info.classes if name != NEW_CLASS)
    train = msgspec.structs.replace(TRAIN, iterations=base_iterations)
    config = Config(DATA, ClassesConfig(base_classes), MODEL, "none", train, METHODS[DISTILLED])
    workspace = create_workspace(folder, config)

    base = run_plan(workspace, plan_base(workspace, progress=progress), progress=_named("base", progress))
    records = {"before": base}
    for name, method in METHODS.items():
        settings = msgspec.structs.replace(method, iterations=step_iterations)
        plan = plan_step(workspace, [NEW_CLASS], settings, parent_name=base.name, name=name, progress=progress)
        records[name] = run_plan(workspace, plan, progress=_named(name, progress))

    rows: list[DemoRow] = []
    bundles = {name: workspace.bundle_folder(record.name) for name, record in records.items()}
    for name, record in records.items():
        request = ExportRequest(precisions=("fp32", "int8"))
        manifest = export_step(workspace, record, request, bundles[name], progress=_named(name, progress))
        rows.append(DemoRow(name, "torch fp32", record.metrics[DATA.eval_split], None))
        for entry in manifest.models:
            if entry.expected is None or entry.precision != "int8":
                continue
            verdict = None
            if name != "before":
                report = verify_bundle(
                    bundles[name],
                    VerifyRequest(runtime=entry.runtime, precision=entry.precision, split=DATA.eval_split),
                    dataset=open_data(DATA),
                    against=bundles["before"],
                    progress=_named(f"verify {name}", progress),
                )
                verdict = _verdict(report)
            rows.append(DemoRow(name, f"{entry.runtime} {entry.precision}", entry.expected, verdict))
    return DemoResult(tuple(rows), str(bundles[DISTILLED]))


def _verdict(report: VerifyReport) -> str:
    """In a few words; the checks that are in the way are named."""
    grave = [check.name for check in report.checks if check.exit_code == report.exit_code and report.exit_code]
    if not grave:
        return "passed"
    return ("too few images: " if report.exit_code == EXIT_UNDECIDED else "refused: ") + ", ".join(grave)


def _named(name: str, progress: ProgressCallback) -> ProgressCallback:
    return lambda text, share: progress(f"{name}: {text}", share)


def _delete_demo(folder: Path) -> None:
    """Delete an earlier demo's workspace, and nothing that is anything else.

    Raises:
        WorkspaceError: the folder is not the workspace of a demo.
    """
    if not folder.exists():
        return
    config = read_config(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else None
    if config is None or (config.data, config.model, config.weights) != (DATA, MODEL, "none"):
        raise WorkspaceError("the folder is not the workspace of a demo", where=folder, hint="choose another folder")
    shutil.rmtree(folder)
