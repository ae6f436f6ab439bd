"""The page of one step: from what was gathered and counted to HTML under a size.

1. The sections stand in the order in which a person asks: may it go out, what was learned and forgotten, where it
   fails, what int8 and the device make of it, what an update costs, where it all comes from.
2. Whatever is missing leaves its sentence; the page is made all the same.
3. The page is smaller than its limit: pictures are made smaller, then fewer, and the page says so. Without any picture
   it is as small as it gets; a limit below that is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from edge_ilseg.data.dataset import Dataset
from edge_ilseg.devices.verify_report import Confusion
from edge_ilseg.errors import ConfigError, EdgeIlsegError
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.report import deployment, learning
from edge_ilseg.report.blocks import Banner, Block, Heading, Missing, Note, Section, Strip
from edge_ilseg.report.gather import Gathered
from edge_ilseg.report.judgement import counted, device_name, judge
from edge_ilseg.report.page import MIB, render
from edge_ilseg.report.pictures import Taken, choose_images, fit_strips, take_pictures
from edge_ilseg.report.scoring import Role, Scoring, load_eyes, score_images
from edge_ilseg.workspace import Workspace

TEMPLATE = "report.html.j2"
DEFAULT_IMAGES, DEFAULT_PICTURES, DEFAULT_MAX_MIB = 256, 12, 5.0


class Seen(NamedTuple):
    """What running the models gave: counts and pictures, or the sentences that say why not."""

    scoring: Scoring | None
    taken: tuple[Taken, ...]
    sentences: tuple[str, ...]


class Page(msgspec.Struct, frozen=True):
    """A finished page, and what `--json` says of it."""

    html: str
    banner: Banner
    left_out: dict[str, str]
    """Anchor of a section -> the sentence in the place of its content."""
    scoring: Scoring | None
    shown_images: int
    note: str
    """What was left out to keep the page small; empty: nothing."""


def look_at_images(
    workspace: Workspace,
    gathered: Gathered,
    dataset: Dataset | None,
    split: str,
    *,
    most_images: int = DEFAULT_IMAGES,
    most_pictures: int = DEFAULT_PICTURES,
    progress: ProgressCallback = no_progress,
) -> Seen:
    """Run the models over labelled images and take pictures of some; what cannot be done is a sentence (rule 2).

    The int8 model sees the chosen images alone, unless there is no other: what it costs was measured at the export.
    """
    if dataset is None or not split or most_images < 1:
        return Seen(None, (), ("There are no labelled images to look at: the workspace has no evaluation split.",))
    progress("loading models", 0.0)
    eyes, sentences = load_eyes(workspace, gathered)
    if not any(eye.role in ("after", "int8") for eye in eyes):
        return Seen(None, (), tuple(sentences) or ("No model of this step can be run here.",))
    try:
        counting = [eye for eye in eyes if eye.role != "int8"] if any(eye.role == "after" for eye in eyes) else eyes
        scoring = score_images(counting, gathered, dataset, split, most_images, progress)
        choices = choose_images(scoring.images, most_pictures)
        taken = take_pictures(choices, eyes, dataset, gathered.step.record.class_names)
    except EdgeIlsegError as error:
        return Seen(None, (), (*sentences, f"The images could not be looked at: {error.one_line()}."))
    labels = {eye.role: eye.label for eye in eyes}
    return Seen(msgspec.structs.replace(scoring, labels=labels), taken, tuple(sentences))


def make_page(gathered: Gathered, seen: Seen, *, max_mib: float = DEFAULT_MAX_MIB) -> Page:
    """The page of a step (rules 1 to 3).

    Raises:
        ConfigError: the page is larger than `max_mib` without any picture.
        MissingPackageError: the extra `report` is not installed.
    """
    record = gathered.step.record
    before_pictures, after_pictures = _sections(gathered, seen)
    banner = judge(gathered)
    limit_bytes = int(max_mib * MIB)

    def html_with(section: Section) -> str:
        sections = [*before_pictures, section, *after_pictures]
        return render(
            TEMPLATE,
            title=record.name,
            eyebrow=f"edge-ilseg report, workspace {gathered.workspace}",
            summary=_summary(gathered),
            banner=banner,
            tiles=[*learning.tiles(gathered), *deployment.tiles(gathered)],
            sections=sections,
            contents=[(item.anchor, item.title) for item in sections],
        )

    bare_bytes = len(html_with(_pictures_section((), "", seen)).encode())
    if bare_bytes > limit_bytes:
        raise ConfigError(
            "the report cannot be made that small, even without a picture",
            where="--max-mib",
            found=f"{bare_bytes / MIB:.2f} MiB",
            expected=f"at most {max_mib:g} MiB",
            hint="allow more: --max-mib",
        )
    strips, note = fit_strips(seen.taken, record.classes, record.background, limit_bytes - bare_bytes)
    pictures = _pictures_section(strips, note, seen)
    sections = [*before_pictures, pictures, *after_pictures]
    left_out = {
        section.anchor: block.text for section in sections for block in section.blocks[:1] if isinstance(block, Missing)
    }
    return Page(html_with(pictures), banner, left_out, seen.scoring, len(strips), note)


def _sections(gathered: Gathered, seen: Seen) -> tuple[list[Section], list[Section]]:
    """The sections before the pictures, and after them."""
    scoring = seen.scoring
    if scoring is not None:
        role: Role = "after" if "after" in scoring.confusions else "int8"
        source = learning.scoring_source(scoring, role)
        confusion = learning.confusion_section(gathered, scoring.confusions, source, seen.sentences)
    else:
        confusion = _confusion_of_reports(gathered, seen.sentences)
    matrix = learning.matrix_section(gathered)
    first = [
        deployment.verdicts_section(gathered),
        learning.classes_section(gathered),
        *([matrix] if matrix is not None else []),
        confusion,
    ]
    later = [
        deployment.int8_section(gathered),
        deployment.devices_section(gathered),
        deployment.updates_section(gathered),
        learning.training_section(gathered),
        learning.lineage_section(gathered),
        deployment.provenance_section(gathered),
    ]
    return first, later


def _confusion_of_reports(gathered: Gathered, sentences: Sequence[str]) -> Section:
    """From a verification report, where no model was run here."""
    import numpy as np

    for item in counted(gathered):
        scores = item.report.scores
        if scores is None or len(scores.confusion) != len(gathered.step.record.classes):
            continue
        pairs: tuple[tuple[Role, Confusion | None], ...] = (
            ("before", scores.parent_confusion),
            ("after", scores.confusion),
        )
        found = {role: np.array(counts, dtype=np.int64) for role, counts in pairs if counts is not None}
        source = f"{device_name(item.report)} on {scores.images_counted} images of {scores.dataset} {scores.split}"
        return learning.confusion_section(gathered, found, source, ())
    return learning.confusion_section(gathered, {}, "", sentences)


def _pictures_section(strips: Sequence[tuple[str, Strip]], note: str, seen: Seen) -> Section:
    title = "Images"
    if not seen.taken:
        text = " ".join(seen.sentences) or "No images were chosen."
        return Section("images", title, "", [Missing(text)])
    found: list[Block] = []
    group = ""
    for name, strip in strips:
        if name != group:
            found.append(Heading(name))
            group = name
        found.append(strip)
    if note:
        found.append(Note(note))
    found += [Note(sentence) for sentence in seen.sentences]
    scoring = seen.scoring
    if scoring is not None and scoring.bad_images:
        found.append(Note(f"{len(scoring.bad_images)} images could not be read: {scoring.bad_images[0][1]}"))
    labels = ", ".join(f"{role}: {label}" for role, label in scoring.labels.items()) if scoring else ""
    return Section("images", title, f"Chosen among {len(scoring.images) if scoring else 0} images. {labels}.", found)


def _summary(gathered: Gathered) -> str:
    record = gathered.step.record
    how = f"with {record.method.name}" if record.method else "from scratch"
    what = f"taught {', '.join(record.new_classes)}" if record.old_count else f"{len(record.classes)} classes"
    return f"Step {record.index}: {what} {how}, {record.created[:10]}."
