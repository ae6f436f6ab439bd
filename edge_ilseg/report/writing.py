"""Make a report and write it: the acting half of `edge-ilseg report`.

1. The page appears whole or not at all. It takes the place of an earlier page of this program; any other file is left.
2. Nothing is run before the place of the page was looked at.
3. A data set that the workspace names and is not here leaves a sentence; one that the user named is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from edge_ilseg.config import CONFIG_NAME, DataConfig
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.errors import ConfigError, EdgeIlsegError
from edge_ilseg.files import write_bytes
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.report.comparison import Named, report_sections, step_sections, step_tiles
from edge_ilseg.report.gather import (
    REPORTS_FOLDER,
    Gathered,
    Verification,
    gather,
    read_verify_report,
    step_of_folder,
)
from edge_ilseg.report.page import MIB, render
from edge_ilseg.report.step_page import (
    DEFAULT_IMAGES,
    DEFAULT_MAX_MIB,
    DEFAULT_PICTURES,
    TEMPLATE,
    Seen,
    look_at_images,
    make_page,
)
from edge_ilseg.workspace import Workspace, open_workspace

FORMAT: Final = "edge-ilseg-report"
FORMAT_VERSION = 1
MARK = b'<meta name="generator" content="edge-ilseg '
HEAD_BYTES = 4096


class Request(msgspec.Struct, frozen=True):
    """What is asked of a report."""

    out: Path | None = None
    verify_files: tuple[Path, ...] = ()
    bench_files: tuple[Path, ...] = ()
    images: int = DEFAULT_IMAGES
    pictures: int = DEFAULT_PICTURES
    max_mib: float = DEFAULT_MAX_MIB
    data: DataConfig | None = None
    """Another data set than the workspace's, or another split; None: the workspace's."""


class Outcome(msgspec.Struct, frozen=True):
    """What was written."""

    format: Literal["edge-ilseg-report"]
    format_version: int
    out: str
    bytes: int
    verdict: str
    """As on the page; empty for a comparison."""
    reasons: tuple[str, ...]
    images_scored: int
    images_shown: int
    left_out: dict[str, str]
    """Sections without content, and why."""
    note: str


def write_report(
    workspace: Workspace, step_name: str | None, request: Request, progress: ProgressCallback = no_progress
) -> Outcome:
    """Write the page of a step.

    Raises:
        WorkspaceError: there is no such step, or it is damaged.
        ReportError: a report that was named cannot be read, or is about another step.
        ConfigError: the place is taken, or the page cannot be as small as asked.
        DataError: the data set that was named is not there.
    """
    gathered = gather(workspace, step_name, verify_files=request.verify_files, bench_files=request.bench_files)
    out = request.out or workspace.root / REPORTS_FOLDER / f"{gathered.step.record.name}.html"
    check_place(out)
    data = request.data or workspace.config.data
    dataset, problem = _open(data, is_asked=request.data is not None)
    seen = (
        look_at_images(
            workspace, gathered, dataset, data.eval_split,
            most_images=request.images, most_pictures=request.pictures, progress=progress,
        )
        if problem is None
        else Seen(None, (), (problem,))
    )  # fmt: skip
    progress("drawing", 0.0)
    page = make_page(gathered, seen, max_mib=request.max_mib)
    _write(out, page.html)
    return Outcome(
        FORMAT, FORMAT_VERSION, str(out), len(page.html.encode()), page.banner.text, tuple(page.banner.reasons),
        len(page.scoring.images) if page.scoring else 0, page.shown_images, page.left_out, page.note,
    )  # fmt: skip


def write_comparison(
    root: Path, two: tuple[str, str], request: Request, progress: ProgressCallback = no_progress
) -> Outcome:
    """Write the page of two side by side.

    Args:
        root: the workspace that step names are of; it need not be one when neither of the two is a step's name.
        two: each the name of a step, a workspace, a step's folder or a verification report.
        request: `out` and `max_mib` count.
        progress: told what is done.

    Raises:
        ConfigError: the two are not of one kind, or the place is taken.
        EdgeIlsegError: one of them cannot be read.
    """
    values = [read_subject(root, text) for text in two]
    names = _names(values, two)
    one, other = (Named(name, value) for name, value in zip(names, values, strict=True))
    if isinstance(one.value, Gathered) != isinstance(other.value, Gathered):
        raise ConfigError(
            "a step cannot be compared with a verification report",
            where="--compare",
            found=" and ".join(two),
            expected="two steps, two workspaces, or two verification reports",
            hint="give two of one kind",
        )
    out = request.out or _place_of_comparison(root, names)
    check_place(out)
    progress("drawing", 0.0)
    is_steps = isinstance(one.value, Gathered)
    sections = step_sections(one, other) if is_steps else report_sections(one, other)
    html = render(
        TEMPLATE,
        title=f"{names[0]} and {names[1]}",
        eyebrow="Two steps side by side" if is_steps else "Two verifications side by side",
        summary="",
        banner=None,
        tiles=step_tiles(one, other),
        sections=sections,
        contents=[(section.anchor, section.title) for section in sections],
    )
    size_bytes = len(html.encode())
    if size_bytes > request.max_mib * MIB:
        raise ConfigError(
            "the comparison cannot be made that small",
            where="--max-mib",
            found=f"{size_bytes / MIB:.2f} MiB",
            expected=f"at most {request.max_mib:g} MiB",
            hint="allow more: --max-mib",
        )
    _write(out, html)
    return Outcome(FORMAT, FORMAT_VERSION, str(out), size_bytes, "", (), 0, 0, {}, "")


def read_subject(root: Path, text: str) -> Gathered | Verification:
    """One side of a comparison.

    Raises:
        EdgeIlsegError: it is nothing that can be compared.
    """
    path = Path(text)
    if path.is_file():
        return Verification(path.name, read_verify_report(path))
    if (path / CONFIG_NAME).is_file():
        return gather(open_workspace(path), None)
    if path.is_dir() and len(path.parts) > 1:
        place, name = step_of_folder(path)
        return gather(open_workspace(place), name)
    return gather(open_workspace(root), text)


def _names(values: Sequence[Gathered | Verification], texts: Sequence[str]) -> tuple[str, str]:
    """What the page calls the two: as short as tells them apart."""
    steps = [value.step.record.name if isinstance(value, Gathered) else Path(value.name).stem for value in values]
    if steps[0] == steps[1]:
        longer = [
            f"{step} of {value.workspace}" if isinstance(value, Gathered) else text
            for step, value, text in zip(steps, values, texts, strict=True)
        ]
        steps = (
            longer if longer[0] != longer[1] else [f"{name} ({place})" for place, name in enumerate(longer, start=1)]
        )
    return steps[0], steps[1]


def _place_of_comparison(root: Path, names: tuple[str, str]) -> Path:
    if not (root / CONFIG_NAME).is_file():
        raise ConfigError(
            "a comparison outside of a workspace needs a place for the page", where="--out", hint="add --out FILE.html"
        )
    return root / REPORTS_FOLDER / f"{names[0]}-and-{names[1]}.html".replace("/", "-").replace(" ", "-")


def check_place(path: Path) -> None:
    """Rule 1.

    Raises:
        ConfigError: something else is there, or the folder for the page is missing.
    """
    if path.is_dir() or path.is_symlink():
        raise ConfigError(
            "the page cannot be written there",
            where="--out",
            found=path,
            expected="a file's name",
            hint="name a file: --out FILE.html",
        )
    if path.is_file():
        with path.open("rb") as file:
            if MARK not in file.read(HEAD_BYTES):
                raise ConfigError(
                    "the file is there already, and is no report of this program",
                    where="--out",
                    found=path,
                    hint="choose another name, or remove it yourself",
                )
    elif not path.parent.is_dir() and path.parent.name != REPORTS_FOLDER:
        raise ConfigError("the folder for the page is missing", where="--out", found=path.parent, hint="make it")


def _open(data: DataConfig, *, is_asked: bool) -> tuple[Dataset | None, str | None]:
    """The data set, or the sentence that says why there is none (rule 3)."""
    try:
        return open_data(data), None
    except EdgeIlsegError as error:
        if is_asked:
            raise
        return None, f"The labelled images could not be read: {error.one_line()}."


def _write(path: Path, html: str) -> None:
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, html.encode())
