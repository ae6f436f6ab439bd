"""Everything that a report is made of, read from files into frozen structs. Decides nothing about looks.

1. What is missing or damaged is a sentence in `Gathered.missing`, under the name of the section that it would have
   filled; the other sections are as they would have been. What the user named himself, and cannot be used, is an error.
2. Only reports about a step of this lineage count. One that lies in a conventional place and is about another step, or
   is damaged, is passed over and counted.
3. Nothing is computed that a stage has written down already, and no model is run here (`edge_ilseg.report.scoring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_ilseg.bundle import Manifest, check_files, read_manifest
from edge_ilseg.checkpoint import StepRecord
from edge_ilseg.devices import bench_report, verify_report
from edge_ilseg.devices.bench_report import BenchReport, parse_bench
from edge_ilseg.devices.verify_report import VerifyReport, parse_report
from edge_ilseg.errors import ACCESS_HINT, EdgeIlsegError, ReportError, WorkspaceError
from edge_ilseg.report.training_curves import TrainingCurves, read_curves
from edge_ilseg.workspace import Workspace

REPORTS_FOLDER = "reports"
PLACES = (REPORTS_FOLDER, "bundles")
"""Folders of a workspace in which reports of `verify` and `bench` are looked for: every `*.json`."""
MAX_REPORT_BYTES = 64 << 20


class StepFacts(msgspec.Struct, frozen=True):
    """One step, and its bundle where there is one."""

    record: StepRecord
    bundle_folder: Path
    bundle: Manifest | None
    bundle_problem: str | None
    """Why there is no usable bundle; None with one."""
    curves: TrainingCurves | None


class OtherStep(msgspec.Struct, frozen=True):
    """A step of the workspace that is not in the lineage."""

    name: str
    parent_name: str | None


class Verification(msgspec.Struct, frozen=True):
    """A report of `edge-ilseg verify`, and the file that it was read from."""

    name: str
    report: VerifyReport


class Benchmark(msgspec.Struct, frozen=True):
    """A report of `edge-ilseg bench`, and the file that it was read from."""

    name: str
    report: BenchReport


R = TypeVar("R", Verification, Benchmark)


class Gathered(msgspec.Struct, frozen=True):
    """What is known of one step of a workspace."""

    workspace: str
    """The folder's name."""
    split: str
    """That the scores are of; empty where none were taken."""
    lineage: tuple[StepFacts, ...]
    """Step 0 first, the step that the report is about last."""
    others: tuple[OtherStep, ...]
    verifications: tuple[Verification, ...]
    benchmarks: tuple[Benchmark, ...]
    passed_over: int
    """Reports in the conventional places that are damaged or about other steps."""
    missing: dict[str, str]

    @property
    def step(self) -> StepFacts:
        """The one that the report is about."""
        return self.lineage[-1]

    @property
    def parent(self) -> StepFacts | None:
        """The step that it was made from, where it is here."""
        return self.lineage[-2] if len(self.lineage) > 1 else None


def gather(
    workspace: Workspace,
    step_name: str | None,
    *,
    verify_files: Sequence[Path] = (),
    bench_files: Sequence[Path] = (),
) -> Gathered:
    """Read everything about a step.

    Args:
        workspace: where it is.
        step_name: name or number; None takes the latest.
        verify_files: reports of `verify`; those in the conventional places are found without.
        bench_files: reports of `bench`, the same.

    Raises:
        WorkspaceError: there is no such step, or it is damaged.
        ReportError: a report that was named cannot be read, or is about another step.
    """
    record = workspace.read_step(step_name) if step_name else workspace.latest_step()
    missing: dict[str, str] = {}
    lineage = _read_lineage(workspace, record, missing)
    ids = {facts.record.id for facts in lineage}
    found_verify, found_bench, passed_over = _search(workspace.root, lineage)
    named = [_read_named_verify(path, record) for path in verify_files]
    benches = [_read_named_bench(path, ids) for path in bench_files]
    names = {facts.record.name for facts in lineage}
    return Gathered(
        workspace=workspace.root.resolve().name,
        split=workspace.config.data.eval_split,
        lineage=lineage,
        others=_read_others(workspace, names),
        verifications=tuple(_unique([*named, *found_verify])),
        benchmarks=tuple(_unique([*benches, *found_bench])),
        passed_over=passed_over,
        missing=missing,
    )


def _read_lineage(workspace: Workspace, record: StepRecord, missing: dict[str, str]) -> tuple[StepFacts, ...]:
    """The step and all before it; where a parent is missing or another one, the lineage begins after it."""
    records = [record]
    while records[-1].parent_name is not None and len(records) <= record.index + 1:
        try:
            parent = workspace.parent_of(records[-1])
        except EdgeIlsegError as error:
            missing["lineage"] = f"The steps before {records[-1].name} are left out: {error.one_line()}."
            break
        if parent is None:
            break
        records.append(parent)
    return tuple(_read_facts(workspace, item) for item in reversed(records))


def _read_facts(workspace: Workspace, record: StepRecord) -> StepFacts:
    folder = workspace.bundle_folder(record.name)
    bundle, problem = _read_bundle(folder, record)
    return StepFacts(record, folder, bundle, problem, read_curves(workspace.step_folder(record.name)))


def _read_bundle(folder: Path, record: StepRecord) -> tuple[Manifest | None, str | None]:
    if not folder.is_dir():
        return None, f"There is no bundle of step {record.name} yet: edge-ilseg export makes one."
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    except EdgeIlsegError as error:
        return None, f"The bundle of step {record.name} cannot be used: {error.one_line()}."
    if manifest.step.id != record.id:
        return None, f"The bundle of step {record.name} was made of another step of that name: export it again."
    return manifest, None


def _read_others(workspace: Workspace, names: set[str]) -> tuple[OtherStep, ...]:
    others = []
    for name in workspace.step_names():
        if name in names:
            continue
        try:
            others.append(OtherStep(name, workspace.read_step(name).parent_name))
        except EdgeIlsegError:  # a damaged step never hides the others
            others.append(OtherStep(name, None))
    return tuple(others)


def _search(root: Path, lineage: Sequence[StepFacts]) -> tuple[list[Verification], list[Benchmark], int]:
    """Reports in the conventional places, by rule 2."""
    ids = {facts.record.id for facts in lineage}
    verifications, benchmarks, passed_over = [], [], 0
    for path in sorted(path for place in PLACES for path in (root / place).glob("*.json")):
        try:
            data = _read(path)
            kind = _format_of(data)
            if kind == verify_report.REPORT_FORMAT:
                report = parse_report(data, where=path)
                if report.bundle.step_id == lineage[-1].record.id:
                    verifications.append(Verification(path.name, report))
                    continue
            elif kind == bench_report.FORMAT:
                bench = parse_bench(data, where=path)
                if any(model.bundle.step_id in ids for model in bench.models):
                    benchmarks.append(Benchmark(path.name, bench))
                    continue
            else:
                continue
        except EdgeIlsegError:
            pass
        passed_over += 1
    return verifications, benchmarks, passed_over


def _read_named_verify(path: Path, record: StepRecord) -> Verification:
    report = read_verify_report(path)
    if report.bundle.step_id is not None and report.bundle.step_id != record.id:
        raise ReportError(
            "the verification report is about another step",
            where=path,
            found=f"step {report.bundle.step_name} ({report.bundle.step_id[:12]})",
            expected=f"step {record.name} ({record.id[:12]})",
            hint="name the step with --step, or verify the bundle of this one",
        )
    return Verification(path.name, report)


def _read_named_bench(path: Path, ids: set[str]) -> Benchmark:
    report = parse_bench(_read(path), where=path)
    if not any(model.bundle.step_id in ids for model in report.models):
        raise ReportError(
            "the benchmark is about none of the steps of this lineage",
            where=path,
            found=", ".join(sorted({str(model.bundle.step_name) for model in report.models})),
            hint="name the step with --step, or measure the bundle of this one",
        )
    return Benchmark(path.name, report)


def read_verify_report(path: Path) -> VerifyReport:
    """A verification report from a file.

    Raises:
        ReportError: it cannot be read, or is none.
    """
    return parse_report(_read(path), where=path)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ReportError(
                "the report is too large",
                where=path,
                found=f"{path.stat().st_size} bytes",
                expected=f"at most {MAX_REPORT_BYTES} bytes",
                hint="give a file that edge-ilseg verify --json or edge-ilseg bench --out has written",
            )
        return path.read_bytes()
    except OSError as error:
        raise ReportError(
            "the report cannot be read", where=path, found=error.strerror or str(error), hint=ACCESS_HINT
        ) from error


def _format_of(data: bytes) -> str | None:
    """What a JSON object calls itself; None for anything else."""
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).get("format")
        return None if found is None else msgspec.json.decode(found, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _unique(items: Sequence[R]) -> list[R]:
    """Each report once: one that was named and lies in a conventional place is the same report."""
    kept: list[R] = []
    for item in items:
        if all(item.report != other.report for other in kept):
            kept.append(item)
    return kept


def step_of_folder(folder: Path) -> tuple[Path, str]:
    """Workspace and name of a step's folder, `work/steps/01-boat`.

    Raises:
        WorkspaceError: the folder is none.
    """
    folder = folder.resolve()
    if folder.parent.name != "steps" or not (folder / "step.json").is_file():
        raise WorkspaceError(
            "this is neither a workspace, nor a step's folder, nor a verification report",
            where=folder,
            hint="give a workspace, WORKSPACE/steps/NAME, or a file that verify --json has printed",
        )
    return folder.parent.parent, folder.name
