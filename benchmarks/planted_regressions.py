"""Does the verdict see what it is there to see? Bundles with planted faults, judged on many images and on few.

    python benchmarks/planted_regressions.py RUN --good freeze+kd-output --bad finetune --data msrc:MSRC

RUN is a folder that `edge-ilseg scenario run` made with both methods. Judged against the bundle of step 0, in int8:

- the same step again: a copy of the parent's own network with the new classes' rows added, which cannot have forgotten;
- the good method's step as it is;
- the good step with one old class spoilt in its classifier;
- the step of the bad method.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from edge_ilseg.bundle import ClassEntry, StepEntry
from edge_ilseg.checkpoint import StepRecord, load_model
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import Check
from edge_ilseg.export.package import CalibrationImages, ExportRequest, export_bundle
from edge_ilseg.export.parent import load_parent
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.scenario_plan import read_plan
from edge_ilseg.scenario_run import seed_folder
from edge_ilseg.workspace import open_workspace

NEVER = -50.0


def main() -> None:
    """Export, judge, and print one row a bundle and number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--good", default="freeze+kd-output")
    parser.add_argument("--bad", default="finetune")
    parser.add_argument("--spoil", default="cow")
    parser.add_argument("--images", default="256,10")
    parser.add_argument("--max-old-drop", type=float, default=2.0)
    parser.add_argument("--max-class-drop", type=float, default=30.0)
    options = parser.parse_args()
    plan = read_plan(options.run)
    dataset = open_data(plan.data)
    workspace = open_workspace(seed_folder(options.run, options.seed))
    base, good, bad = (workspace.read_step(name) for name in ("00-base", f"01-{options.good}", f"01-{options.bad}"))
    model = {record.name: load_model(workspace.step_folder(record.name), record) for record in (base, good, bad)}
    unchanged = load_model(workspace.step_folder(base.name), base)
    unchanged.grow(len(good.classes) - len(base.classes), "default")
    lower(unchanged, range(len(base.classes), len(good.classes)))
    spoilt = load_model(workspace.step_folder(good.name), good)
    lower(spoilt, [good.class_names.index(options.spoil)])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        _export(model[base.name], base, dataset, out / "base", None)
        bundles = {
            "nothing changed": (unchanged, good),
            options.good: (model[good.name], good),
            f"{options.good}, {options.spoil} spoilt": (spoilt, good),
            options.bad: (model[bad.name], bad),
        }
        limits = Limits(max_old_miou_drop_pct=options.max_old_drop, max_class_drop_pct=options.max_class_drop)
        print(f"{'bundle':<30}{'images':>7}{'drop':>7}{'95 % interval':>17}  {'mIoU':<16}{'class':<16}gravest class")
        for number, (name, (network, record)) in enumerate(bundles.items()):
            _export(network, record, dataset, out / str(number), out / "base")
            for count in map(int, options.images.split(",")):
                request = VerifyRequest(
                    split=str(plan.data.eval_split), max_images=count, latency_runs=1, limits=limits
                )
                judged = judge(out / str(number), out / "base", dataset, request)
                print(f"{name:<30}{count:>7}{judged.row()}", flush=True)


class Judged(NamedTuple):
    """What the verdict on a bundle says of its old classes."""

    mean: Check
    """The drop of their mIoU."""
    worst: Check
    """That of the class that lost most, which it names."""

    def row(self) -> str:
        """Drop, interval, both verdicts, and the class."""
        mean, worst = self
        value = "-" if mean.value is None else f"{mean.value:.2f}"
        interval = "-" if mean.low is None or mean.high is None else f"{mean.low:.2f} to {mean.high:.2f}"
        return f"{value:>7}{interval:>17}  {mean.verdict:<16}{worst.verdict:<16}{worst.detail}"


def judge(bundle: Path, parent: Path, dataset: Dataset, request: VerifyRequest) -> Judged:
    """Judge a bundle against its parent's as `verify` does."""
    report = verify_bundle(bundle, request, against=parent, dataset=dataset)
    return Judged(report.check("old mIoU drop"), report.check("old class drop"))


def lower(model: SegmentationModel, channels: Iterable[int]) -> None:
    """Take all pixels from some classes: their logits fall by a constant."""
    wanted = set(channels)
    first = 0
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.classifiers.") and name.endswith(".bias"):
            for row in range(len(parameter)):
                if first + row in wanted:
                    parameter.data[row] += NEVER
            first += len(parameter)


def _export(model: SegmentationModel, record: StepRecord, dataset: Dataset, out: Path, parent: Path | None) -> None:
    step = StepEntry(
        index=record.index,
        name=record.name,
        id=record.id,
        parent_id=record.parent_id,
        method=record.method.name if record.method else "base",
        encoder_sha256=record.encoder_sha256,
        encoder_frozen=False,
    )
    ids = record.data.image_ids[:96]
    export_bundle(
        model,
        out,
        request=ExportRequest(targets=("onnx",), precisions=("int8",), max_old_drop_points=None),
        step=step,
        classes=tuple(ClassEntry(item.name, item.step, item.color) for item in record.classes),
        background=record.background,
        calibration=CalibrationImages(ids, "", dataset.read_image, at_hand=ids),
        parent=load_parent(parent, step) if parent else None,
    )


if __name__ == "__main__":
    main()
