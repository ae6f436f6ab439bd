"""Run a model of a bundle on images and write what it sees, so that people can look.

1. Before anything runs the bundle is hashed, the images are listed, and the places of the results are looked at. A
   result that is there already ends the run unless it may be replaced; an image is never written over.
2. Each image gives `masks/NAME.png` (a palette PNG: the value is the channel, the colours are the bundle's) and, unless
   left out, `overlays/NAME.png`. Both have the image's own size, upright; the overlay has a legend under the image.
   The mask comes to that size by nearest neighbour. NAME: `edge_ilseg.devices.sources`, rule 3.
3. Decoding, running (`edge_ilseg.devices.stream`) and writing overlap; what is under way is bounded. A file is there
   whole or not at all.
4. A bad image is named, counted, and ends nothing; the exit code then is 3.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import Manifest, Precision, Runtime, check_files, read_manifest
from edge_ilseg.devices.evaluation import check_channels
from edge_ilseg.devices.loaded_bundle import LoadedBundle, choose_model, load_bundle, model_facts
from edge_ilseg.devices.overlay import PaintedClass, class_shares, draw_overlay
from edge_ilseg.devices.runtime import Hint
from edge_ilseg.devices.sources import Source, SourceReader, find_sources, shown_path
from edge_ilseg.devices.stream import stream
from edge_ilseg.devices.verify_report import BundleFacts, ModelFacts
from edge_ilseg.devices.video import NoFrameError
from edge_ilseg.errors import EXIT_ARTEFACT, EXIT_PASSED, ConfigError, DataError, ReportError
from edge_ilseg.files import disk_error, write_bytes
from edge_ilseg.images import resize_mask, write_mask_png
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.records import parse_versioned

FORMAT = "edge-ilseg-predictions"
FORMAT_VERSION = 1
MASKS, OVERLAYS = "masks", "overlays"
DEFAULT_ALPHA = 0.5
WRITERS, WRITING = 2, 4
"""Threads that draw, compress and write, and how many images may wait for them."""
FAST_PNG = 1
"""zlib level of overlays: level 6 takes 3.6 times as long for a file that is a quarter smaller."""


class PredictedImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model saw in one image, or in one frame of a moving one."""

    file: str
    frame: int | None
    mask: str
    """Relative to the folder of the results, as `overlay` is."""
    overlay: str | None
    height_px: int
    width_px: int
    classes: dict[str, float]
    """Share of the image's pixels in 0..1, of the classes that are present, the largest first."""
    latency_ms: float
    """Wall time of the model alone, others running beside it where `side_by_side` is above 1."""


class BadSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image that could not be read, and why."""

    file: str
    frame: int | None
    reason: str


class Predictions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that one run has written."""

    format: Literal["edge-ilseg-predictions"]
    format_version: int
    created: str
    """UTC, ISO 8601."""
    exit_code: int
    """0, or 3 when an image was bad."""
    bundle: BundleFacts
    model: ModelFacts
    class_names: tuple[str, ...]
    """In channel order: what the values of the masks mean."""
    out: str
    images: tuple[PredictedImage, ...]
    bad_images: tuple[BadSource, ...]
    side_by_side: int = 1
    """Images that the model ran at the same time, at most."""


class _Kept(NamedTuple):
    """What is needed of an image after the model has seen it: the size, and the pixels where an overlay is drawn."""

    height_px: int
    width_px: int
    image_HWC: NDArray[np.uint8] | None


class _Seen(NamedTuple):
    """An image and its mask, channels, uint8, at the model's size."""

    source: Source
    kept: _Kept
    mask_HW: NDArray[np.uint8]
    latency_ms: float


def predict_images(
    folder: Path,
    arguments: Sequence[str],
    out: Path,
    *,
    runtime: Runtime | None = None,
    precision: Precision | None = None,
    threads: int | None = None,
    hint: Hint = "latency",
    alpha: float | None = DEFAULT_ALPHA,
    replace: bool = False,
    progress: ProgressCallback = no_progress,
) -> Predictions:
    """Write a mask and an overlay for each image (rules 1 to 4).

    Args:
        folder: the bundle.
        arguments: files, folders and patterns (`edge_ilseg.devices.sources`).
        out: where the results go; made when it is not there.
        runtime: `None` takes the first installed runtime that the bundle has a model for.
        precision: `None` takes int8 where the bundle has it, else fp32, else fp16.
        threads: how many threads the runtime may use; `None` leaves the choice to the runtime.
        hint: `throughput` runs several images at the same time.
        alpha: weight of the class colours in the overlays, 0..1; `None` writes no overlays.
        replace: whether results that are there already may be replaced.
        progress: told the share of the images that is done.

    Raises:
        BundleError: the bundle is not whole, has no such model, or its model cannot be run.
        ConfigError: results are in the way.
        DataError: there is no image.
        MissingPackageError: the runtime is not installed.
        EdgeIlsegError: the disk is full or refuses a write.
    """
    progress("checking files", 0.0)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    sources = find_sources(arguments, [out / MASKS, out / OVERLAYS])
    _prepare_places(out, sources, with_overlays=alpha is not None, replace=replace)
    loaded = load_bundle(folder, manifest, *choose_model(manifest, runtime, precision), threads, hint)
    images, bad_images = _run(loaded, sources, out, alpha, progress)
    return Predictions(
        format="edge-ilseg-predictions",
        format_version=FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        exit_code=EXIT_ARTEFACT if bad_images else EXIT_PASSED,
        bundle=BundleFacts(
            folder=shown_path(folder),
            bundle_id=manifest.bundle_id,
            step_name=manifest.step.name,
            step_index=manifest.step.index,
            step_id=manifest.step.id,
        ),
        model=model_facts(loaded, threads),
        class_names=manifest.class_names,
        out=shown_path(out),
        images=tuple(images),
        bad_images=tuple(bad_images),
        side_by_side=loaded.session.concurrent_runs,
    )


def encode_predictions(predictions: Predictions) -> bytes:
    """The predictions as JSON."""
    return msgspec.json.format(msgspec.json.encode(predictions), indent=2)


def parse_predictions(data: bytes, *, where: object = None) -> Predictions:
    """Turn JSON from `encode_predictions` into predictions again.

    Raises:
        ReportError: not such a record, or one of another version.
    """
    return parse_versioned(
        data,
        Predictions,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=ReportError,
        what="the list of predictions",
        where=where,
        hint="predict again and keep what --json prints",
    )


def _prepare_places(out: Path, sources: Sequence[Source], *, with_overlays: bool, replace: bool) -> None:
    """Rule 1: make the folders, and look whether a result is there already."""
    kinds = (MASKS, OVERLAYS) if with_overlays else (MASKS,)
    places = [out / kind / f"{source.name}.png" for kind in kinds for source in sources]
    there = [] if replace else [place for place in places if os.path.lexists(place)]
    if there:
        raise ConfigError(
            "results of an earlier run are in the way",
            where=shown_path(there[0]),
            found=f"{len(there)} of {len(places)} files are there already",
            hint="choose another folder with --out, or replace them with --replace",
        )
    for parent in dict.fromkeys(place.parent for place in places):
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, parent) from error


def _run(
    loaded: LoadedBundle, sources: Sequence[Source], out: Path, alpha: float | None, progress: ProgressCallback
) -> tuple[list[PredictedImage], list[BadSource]]:
    """Rules 2 to 4."""
    by_name = {source.name: source for source in sources}
    images: list[PredictedImage] = []
    bad_images: list[BadSource] = []
    absent = 0
    writing: deque[Future[PredictedImage]] = deque()
    with SourceReader(sources) as reader, ThreadPoolExecutor(WRITERS, "edge-ilseg-write") as writers:

        def read(name: str) -> tuple[NDArray[np.uint8], _Kept]:
            image_HWC = reader.read(by_name[name])
            height_px, width_px = image_HWC.shape[:2]
            return image_HWC, _Kept(height_px, width_px, None if alpha is None else image_HWC)

        try:
            for item in stream(loaded.session, by_name, read):
                source = by_name[item.image_id]
                if isinstance(item.error, NoFrameError):  # a video has fewer frames than it could have
                    absent += 1
                elif item.mask_HW is None or item.extra is None:
                    bad_images.append(_bad(source, item.error))
                else:
                    check_channels(item.mask_HW, len(loaded.manifest.classes))
                    seen = _Seen(source, item.extra, item.mask_HW, item.latency_ms)
                    writing.append(writers.submit(_write, seen, loaded.manifest, out, alpha))
                while len(writing) > WRITING:
                    images.append(writing.popleft().result())
                done = len(images) + len(bad_images) + absent
                progress(f"images, {done} of {len(sources)}", done / len(sources))
            images += [waiting.result() for waiting in writing]
        finally:
            writers.shutdown(wait=False, cancel_futures=True)
    return images, bad_images


def _write(seen: _Seen, manifest: Manifest, out: Path, alpha: float | None) -> PredictedImage:
    """Write the results of one image (rule 2)."""
    source, kept = seen.source, seen.kept
    full_HW = resize_mask(seen.mask_HW, kept.height_px, kept.width_px)
    shares = class_shares(full_HW, len(manifest.classes))
    mask_name = f"{MASKS}/{source.name}.png"
    write_mask_png(out / mask_name, full_HW, [entry.color for entry in manifest.classes])
    overlay_name = None
    if alpha is not None and kept.image_HWC is not None:
        painted = [
            PaintedClass(entry.name, None if entry.name == manifest.background else entry.color)
            for entry in manifest.classes
        ]
        overlay_name = f"{OVERLAYS}/{source.name}.png"
        buffer = io.BytesIO()
        overlay = draw_overlay(kept.image_HWC, full_HW, painted, shares, alpha)
        overlay.save(buffer, format="PNG", compress_level=FAST_PNG)
        write_bytes(out / overlay_name, buffer.getvalue())
    return PredictedImage(
        file=shown_path(source.path),
        frame=source.frame,
        mask=shown_path(Path(mask_name)),
        overlay=None if overlay_name is None else shown_path(Path(overlay_name)),
        height_px=kept.height_px,
        width_px=kept.width_px,
        classes={manifest.class_names[channel]: share for channel, share in shares.items()},
        latency_ms=seen.latency_ms,
    )


def _bad(source: Source, error: DataError | None) -> BadSource:
    reason = "no reason known" if error is None else error.one_line()
    return BadSource(shown_path(source.path), source.frame, reason.encode("utf-8", "replace").decode())
