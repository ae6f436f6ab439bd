"""A workspace for reports, made in a second: records by hand, real bundles of the nearest-colour network, real images,
and a real verification. Class names are the caller's, hostile ones too."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import bundles
import msgspec
from records import make_record

from edge_ilseg.bundle import ParityRow, write_manifest
from edge_ilseg.checkpoint import RECORD_NAME, ClassRecord, StepRecord, record_id
from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
from edge_ilseg.data.folder import Folder
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import VerifyReport, encode_report
from edge_ilseg.int8_record import DeltaRow, Int8Record
from edge_ilseg.metrics import Metrics
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.workspace import Workspace, create_workspace

OLD = ("background", "apple", "grass")
NEW = "boat"
HOSTILE = "<script>alert(1)</script>"
INT8 = Int8Record(
    asked="carry", taken="carry", max_old_drop_points=1.0, attempts=(), carried=3, merged=0, measured=1,
    silent_channels={}, worst_sqnr=(), sqnr_db={},
    delta=(DeltaRow("onnxruntime", 40000, 9000, 30000, 0, True),),
)  # fmt: skip


def make_metrics(iou: dict[str, float | None], old: float | None, new: float | None, all_: float) -> Metrics:
    return Metrics(
        images=6, pixels=18432, iou=iou, miou_old=old, miou_new=new, miou_all=all_, miou_old_without_background=old,
        miou_all_without_background=all_, mpa=0.9, mca=0.8, hiou=None,
    )  # fmt: skip


def write_record(workspace: Workspace, record: StepRecord) -> StepRecord:
    record = msgspec.structs.replace(record, id="")
    record = msgspec.structs.replace(record, id=record_id(record))
    folder = workspace.step_folder(record.name)
    folder.mkdir(parents=True)
    (folder / RECORD_NAME).write_bytes(msgspec.json.encode(record))
    return record


def make_workspace(
    root: Path,
    *,
    new: str = NEW,
    images: int = 6,
    steps: int = 2,
    forget: str | None = "apple",
    with_bundles: bool = True,
) -> Workspace:
    """Steps `00-base`, `01-step`, ...: step 1 adds `new` and forgets a class; the later ones add nothing."""
    colors = {**bundles.COLORS, new: bundles.COLORS["boat"]}
    with mock.patch.object(bundles, "COLORS", colors):
        data = bundles.write_color_folder(root / "data", [*OLD, new], count=images)
        model = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=48, input_width_px=64)
        config = Config(
            DataConfig(kind="folder", root=str(data), eval_split="test"),
            ClassesConfig(OLD[1:]), model, "none", TrainConfig(), StepConfig(),
        )  # fmt: skip
        workspace = create_workspace(root / "work", config)
        parent: StepRecord | None = None
        for index in range(steps):
            parent = _write_step(workspace, index, parent, new, forget if index else None, with_bundles and index < 2)
    return workspace


def _write_step(
    workspace: Workspace, index: int, parent: StepRecord | None, new: str, forget: str | None, with_bundle: bool
) -> StepRecord:
    known = {name: 0 for name in OLD} | ({new: 1} if index else {})
    iou = {name: 0.9 - 0.01 * index for name in OLD} | ({new: 0.5} if index else {})
    before = dict(iou)
    if forget:
        iou[forget] = 0.3
    scores = make_metrics(iou, 0.7 if index else None, 0.5 if index == 1 else None, 0.7)
    record = write_record(
        workspace,
        make_record(
            index=index,
            name="00-base" if index == 0 else f"{index:02}-step",
            parent_id=parent.id if parent else None,
            parent_name=parent.name if parent else None,
            classes=tuple(ClassRecord(name, step, bundles.COLORS[name]) for name, step in known.items()),
            background="background",
            method=make_record().method if index else None,
            metrics={"test": scores},
            parent_metrics={"test": make_metrics(before, None, None, 0.9)} if index else {},
        ),
    )
    if with_bundle:
        folder = workspace.bundle_folder(record.name)
        models = (("onnxruntime", "fp32"), ("onnxruntime", "int8"))
        parent_id = parent.id if parent else None
        manifest = bundles.write_bundle(
            folder, known, step_id=record.id, parent_id=parent_id, models=models, forget=forget
        )
        parity = tuple(
            ParityRow(stage, 0.0, 0.0, 1.0, 0.7, 0.5, 1000, 2.0)
            for stage in ("torch fp32", "onnxruntime fp32", "onnxruntime int8 simulated", "onnxruntime int8")
        )
        step = msgspec.structs.replace(manifest.step, name=record.name)
        changed = msgspec.structs.replace(manifest, step=step, parity=parity, int8=INT8 if index else None)
        write_manifest(folder, changed)
    return record


def verify(workspace: Workspace, name: str = "01-step") -> VerifyReport:
    """A real verification of a step's bundle against step 0's, written where the report looks for it."""
    report = verify_bundle(
        workspace.bundle_folder(name),
        VerifyRequest(split="test", latency_runs=3, limits=Limits(min_images=2)),
        dataset=Folder(Path(str(workspace.config.data.root))),
        against=workspace.bundle_folder("00-base") if name != "00-base" else None,
    )
    folder = workspace.root / "reports"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.verify.json").write_bytes(encode_report(report))
    return report
