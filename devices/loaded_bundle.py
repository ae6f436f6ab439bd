"""A bundle on this device: its manifest, one of its models loaded, and its golden arrays.

1. Hashes have been checked before (`edge_ilseg.bundle.check_files`); here the contents are held against the manifest.
2. Golden arrays are mapped, not read whole, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import COPY_AGAIN, Manifest, ModelEntry, Precision, Runtime
from edge_ilseg.devices.evaluation import check_channels
from edge_ilseg.devices.fit import check_memory, check_opset
from edge_ilseg.devices.runtime import Hint, Session, check_fit, installed_runtimes, load_session
from edge_ilseg.devices.verify_report import BundleFacts, ModelFacts
from edge_ilseg.errors import BundleError, check_extra

PRECISION_PREFERENCE: tuple[Precision, ...] = ("int8", "fp32", "fp16")


class LoadedBundle(msgspec.Struct, frozen=True):
    """A bundle with one of its models loaded, and what that model gave when it was made."""

    folder: Path
    manifest: Manifest
    entry: ModelEntry
    session: Session
    golden_images_NHWC: NDArray[np.uint8]
    golden_masks_NHW: NDArray[np.uint8]


def choose_model(manifest: Manifest, runtime: Runtime | None, precision: Precision | None) -> tuple[Runtime, Precision]:
    """The runtime and precision to verify; what is not asked for is chosen.

    The first installed runtime that the bundle has a model for; int8 where the bundle has it, else fp32, else fp16.

    Raises:
        MissingPackageError: no runtime is installed that the bundle has a model for.
    """
    if runtime is None:
        offered = [entry.runtime for entry in manifest.models if precision in (None, entry.precision)]
        usable = [item for item in installed_runtimes() if item in offered]
        if offered and not usable:
            check_extra(offered[0], [offered[0]], "this bundle")
        runtime = usable[0] if usable else "onnxruntime"
    in_bundle = [entry.precision for entry in manifest.models if entry.runtime == runtime]
    preferred = next((item for item in PRECISION_PREFERENCE if item in in_bundle), PRECISION_PREFERENCE[0])
    return runtime, precision or preferred


def load_bundle(
    folder: Path,
    manifest: Manifest,
    runtime: Runtime,
    precision: Precision,
    threads: int | None,
    hint: Hint = "latency",
) -> LoadedBundle:
    """Load a model and its golden arrays, and check that they are what the manifest declares.

    Raises:
        BundleError: the bundle has no such model, its contents are not those that the manifest declares, or the model
            needs a newer runtime or more memory.
        MissingPackageError: the runtime is not installed.
    """
    try:
        entry = manifest.model(runtime, precision)
    except BundleError as error:
        error.where = folder
        raise
    path = folder / entry.files[0]
    check_opset(entry, where=path)
    check_memory(sum(manifest.files[name].bytes for name in entry.files), where=path)
    session = load_session(folder, entry, threads=threads, hint=hint)
    check_fit(session, manifest, where=path)
    size = (session.input_height_px, session.input_width_px)
    images = read_golden(folder / manifest.golden_images, (*size, 3))
    masks = read_golden(folder / entry.golden_masks, size)
    if len(images) != len(masks) or not len(images):
        raise BundleError(
            "the golden images and masks do not belong together",
            where=folder / entry.golden_masks,
            found=f"{len(images)} images, {len(masks)} masks",
            expected="one mask an image, and one image at least",
            hint="export the bundle again",
        )
    check_channels(masks, len(manifest.classes))
    return LoadedBundle(folder, manifest, entry, session, images, masks)


def for_throughput(loaded: LoadedBundle, threads: int | None) -> LoadedBundle:
    """The same model once more, loaded to run several images at the same time.

    Raises:
        BundleError: the runtime refuses it.
    """
    session = load_session(loaded.folder, loaded.entry, threads=threads, hint="throughput")
    return msgspec.structs.replace(loaded, session=session)


def read_golden(path: Path, item_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Map a .npy file of N items of `item_shape`, uint8, into memory; nothing is unpickled.

    Raises:
        BundleError: it is no such file.
    """
    try:
        items: NDArray[np.uint8] = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise BundleError("a golden file cannot be read", where=path, found=str(error), hint=COPY_AGAIN) from error
    if items.dtype != np.uint8 or items.shape[1:] != item_shape:
        raise BundleError(
            "a golden file is not what the manifest declares",
            where=path,
            found=f"{items.dtype} {' x '.join(map(str, items.shape))}",
            expected=f"uint8 N x {' x '.join(map(str, item_shape))}",
            hint="export the bundle again",
        )
    return items


def bundle_facts(folder: Path, manifest: Manifest) -> BundleFacts:
    """Which bundle it is, for a report."""
    return BundleFacts(
        folder=str(folder),
        bundle_id=manifest.bundle_id,
        step_name=manifest.step.name,
        step_index=manifest.step.index,
        step_id=manifest.step.id,
    )


def model_facts(loaded: LoadedBundle, threads: int | None) -> ModelFacts:
    """Which model is run, and by what, for a report."""
    session, entry = loaded.session, loaded.entry
    return ModelFacts(
        runtime=entry.runtime,
        precision=entry.precision,
        runtime_version=session.runtime_version,
        executed_precisions=session.executed_precisions,
        threads=threads,
        input_height_px=session.input_height_px,
        input_width_px=session.input_width_px,
        model_bytes=sum(loaded.manifest.files[name].bytes for name in entry.files),
    )
