"""The bundle: what is shipped to a device. A folder of files and one `manifest.json` that lists them by hash.

1. The manifest names every file with its SHA-256 and size; a bundle with a file more, less or different is refused.
2. `bundle_id` is the SHA-256 of the manifest without that field, so it covers every byte of the bundle.
3. A name in a manifest is relative and stays in the folder; every file that an entry refers to is listed; a bundle
   holds plain files in plain folders, and no link.
4. Classes stand in the order of their channels, those of earlier steps first; names are unique.
5. Only this version's format is read; unknown fields are refused. Format page: docs/bundle-format.md.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from edge_ilseg.devices.limits import OwnLimits, check_finite
from edge_ilseg.errors import ACCESS_HINT, BundleError
from edge_ilseg.files import sha256_bytes, sha256_file, write_bytes
from edge_ilseg.int8_record import CalibrationEntry, Int8Record
from edge_ilseg.metrics import VOID, Metrics
from edge_ilseg.records import parse_versioned

FORMAT = "edge-ilseg-bundle"
FORMAT_VERSION = 4
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
COPY_AGAIN = "copy or export the bundle again"
FORMAT_FIELD = re.compile(rb'"format"\s*:\s*"edge-ilseg-bundle"')

Runtime = Literal["onnxruntime", "openvino"]
Precision = Literal["fp32", "fp16", "int8"]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle."""

    sha256: str
    bytes: int


class ClassEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One class, in channel order."""

    name: str
    step: int
    color: tuple[int, int, int]


class StepEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The training step that the models come from."""

    index: int
    name: str
    id: str
    parent_id: str | None
    method: str
    encoder_sha256: str
    encoder_frozen: bool


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to an image before the model sees it; cast and normalisation are inside the model."""

    height_px: int
    width_px: int
    layout: Literal["NHWC"] = "NHWC"
    dtype: Literal["uint8"] = "uint8"
    color: Literal["RGB"] = "RGB"
    resizer: Literal["pillow-bilinear"] = "pillow-bilinear"
    fit: Literal["stretch"] = "stretch"


class ModelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model of the bundle. `files[0]` is what the runtime opens."""

    runtime: Runtime
    precision: Precision
    files: tuple[str, ...]
    outputs: tuple[Literal["mask", "logits"], ...]
    opset: int
    golden_masks: str
    """.npy file: uint8, N x H x W, what this model gave for the golden images when it was made."""
    calibration: CalibrationEntry | None
    convolutions: dict[str, str] | None
    """Convolution -> element type that it was computed in on the exporting machine; of int8 models alone."""
    expected: Metrics | None
    """Scores of this very model on `Manifest.expected_data`, measured at export."""
    encoder_sha256: str | None = None
    """Of the constants (weights, scales, zero points) of the encoder in this file, names and bytes."""


class ParityRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of the chain torch -> ... -> int8, compared with the first."""

    stage: str
    max_abs: float | None
    relative_rmse: float | None
    agreement: float
    miou_old: float | None
    miou_new: float | None
    model_bytes: int | None = None
    latency_ms: float | None = None
    """Median of warm runs on the exporting machine, the stages taking turns; only asked for with `--explain`."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The bundle's table of contents; see docs/bundle-format.md."""

    format: Literal["edge-ilseg-bundle"]
    format_version: int
    bundle_id: str
    created: str
    step: StepEntry
    classes: tuple[ClassEntry, ...]
    background: str | None
    preprocessing: Preprocessing
    models: tuple[ModelEntry, ...]
    golden_images: str
    """.npy file: uint8, N x H x W x 3, at the model's input size."""
    expected_data: str | None
    parity: tuple[ParityRow, ...]
    int8: Int8Record | None
    versions: dict[str, str]
    files: dict[str, FileEntry]
    limits: OwnLimits | None = None
    """What the bundle must keep to wherever it is verified; not written where there are none."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in channel order."""
        return tuple(entry.name for entry in self.classes)

    @property
    def old_count(self) -> int:
        """How many of the first channels the parent step had already; 0 at step 0."""
        return sum(entry.step < self.step.index for entry in self.classes)

    def model(self, runtime: Runtime, precision: Precision) -> ModelEntry:
        """The entry for a runtime and a precision.

        Raises:
            BundleError: the bundle has no such model; the error lists those that it has.
        """
        for entry in self.models:
            if (entry.runtime, entry.precision) == (runtime, precision):
                return entry
        raise BundleError(
            "the bundle has no such model",
            found=", ".join(f"{entry.runtime}/{entry.precision}" for entry in self.models) or "no model at all",
            expected=f"{runtime}/{precision}",
            hint=f"export it: edge-ilseg export --target {'onnx' if runtime == 'onnxruntime' else runtime} "
            f"--precision {precision}",
        )


def manifest_id(manifest: Manifest) -> str:
    """SHA-256 of the manifest's canonical JSON with an empty `bundle_id` (rule 2)."""
    blank = msgspec.structs.replace(manifest, bundle_id="")
    return sha256_bytes(msgspec.json.encode(blank, order="sorted"))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Fill in `files` and `bundle_id` from what lies in `folder` and write `manifest.json`; done last.

    Raises:
        BundleError: the manifest breaks rule 3 or 4, so that nobody could read it.
        ConfigError: a limit is no finite number.
    """
    if manifest.limits is not None:
        check_finite(manifest.limits, folder)
    entries = {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }
    manifest = msgspec.structs.replace(manifest, files=entries, bundle_id="")
    _check_names(manifest, folder)
    _check_classes(manifest, folder)
    manifest = msgspec.structs.replace(manifest, bundle_id=manifest_id(manifest))
    write_bytes(folder / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return manifest


def parse_manifest(data: bytes, *, where: object = None) -> Manifest:
    """Turn the bytes of a `manifest.json` into a `Manifest`.

    Raises:
        BundleError: not JSON, another format or version, a missing or unknown field, a name or class that breaks rule 3
            or 4, or a `bundle_id` that does not fit the rest.
    """
    manifest = parse_versioned(
        data,
        Manifest,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=BundleError,
        what="the manifest",
        where=where,
        hint=f"{COPY_AGAIN}; one of a newer version needs a newer edge-ilseg on this machine",
    )
    _check_names(manifest, where)
    _check_classes(manifest, where)
    if manifest.bundle_id != manifest_id(manifest):
        raise BundleError(
            "the manifest was changed after it was written",
            where=where,
            found=f"content {manifest_id(manifest)[:12]}",
            expected=f"bundle_id {manifest.bundle_id[:12]}",
            hint=COPY_AGAIN,
        )
    return manifest


def _check_names(manifest: Manifest, where: object) -> None:
    """Rule 3 for names."""
    for name in manifest.files:
        parts = PurePosixPath(name)
        leaves = parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name
        if leaves or not parts.parts or parts.as_posix() != name:
            raise BundleError(
                "a file name in the manifest leaves the bundle", where=where, found=repr(name), hint=COPY_AGAIN
            )
    references = [manifest.golden_images]
    for entry in manifest.models:
        if not entry.files:
            raise BundleError(
                "a model in the manifest has no file", where=where, found=f"{entry.runtime}", hint=COPY_AGAIN
            )
        references += [*entry.files, entry.golden_masks]
        if entry.calibration is not None and entry.calibration.ranges_file is not None:
            references.append(entry.calibration.ranges_file)
    for name in references:
        if name not in manifest.files:
            raise BundleError(
                "the manifest refers to a file that it does not list", where=where, found=repr(name), hint=COPY_AGAIN
            )


def _check_classes(manifest: Manifest, where: object) -> None:
    """Rule 4, and an input of some size."""
    names, steps = manifest.class_names, [entry.step for entry in manifest.classes]
    if not names or len(names) > VOID or len(set(names)) != len(names):
        raise BundleError(
            "the classes of the manifest are not a list of unique names",
            where=where,
            found=", ".join(names) or "no class",
            expected=f"1 to {VOID} classes",
            hint=COPY_AGAIN,
        )
    if steps != sorted(steps) or steps[0] < 0 or steps[-1] > manifest.step.index:
        raise BundleError(
            "the classes of the manifest are not in the order of their steps",
            where=where,
            found=", ".join(f"{entry.name}: step {entry.step}" for entry in manifest.classes),
            expected=f"steps that never fall, from 0 to {manifest.step.index}",
            hint=COPY_AGAIN,
        )
    if manifest.background is not None and manifest.background not in names:
        raise BundleError(
            "the background of the manifest is none of its classes",
            where=where,
            found=manifest.background,
            hint=COPY_AGAIN,
        )
    height_px, width_px = manifest.preprocessing.height_px, manifest.preprocessing.width_px
    if height_px < 1 or width_px < 1:
        raise BundleError(
            "the manifest's input has no size", where=where, found=f"{height_px} x {width_px} px", hint=COPY_AGAIN
        )


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`; the files it lists are checked by `check_files`.

    Raises:
        BundleError: the folder is no bundle, or its manifest is damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        size_bytes = path.stat().st_size
        data = path.read_bytes() if size_bytes <= MAX_MANIFEST_BYTES else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            "this folder is no bundle: it has no manifest.json",
            where=folder,
            hint="give the folder that edge-ilseg export has written",
        ) from error
    except OSError as error:
        raise BundleError(
            "the manifest cannot be read", where=path, found=error.strerror or str(error), hint=ACCESS_HINT
        ) from error
    if size_bytes > MAX_MANIFEST_BYTES:
        raise BundleError(
            "the manifest is too large",
            where=path,
            found=f"{size_bytes} bytes",
            expected=f"at most {MAX_MANIFEST_BYTES} bytes",
            hint=COPY_AGAIN,
        )
    return parse_manifest(data, where=path)


def is_bundle(folder: Path) -> bool:
    """Whether `folder` is a plain folder whose `manifest.json` calls itself a bundle; it may be damaged otherwise."""
    path = folder / MANIFEST_NAME
    if folder.is_symlink() or path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
        return False
    return FORMAT_FIELD.search(path.read_bytes()) is not None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check every file of the bundle against its hash (rule 1).

    Raises:
        BundleError: a file is missing, added, a link, cannot be read, or differs; the error names the first one.
    """
    try:
        _check_files(folder, manifest)
    except OSError as error:
        where = error.filename or folder
        raise BundleError(
            "a file of the bundle cannot be read", where=where, found=error.strerror, hint=ACCESS_HINT
        ) from error


def _check_files(folder: Path, manifest: Manifest) -> None:
    present = set()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleError("a bundle holds plain files, and this is a link or a device", where=path, hint=COPY_AGAIN)
        if path.is_file() and path != folder / MANIFEST_NAME:
            present.add(path.relative_to(folder).as_posix())
    for name in sorted(present ^ set(manifest.files)):
        what = "is missing from the bundle" if name in manifest.files else "is not in the manifest"
        raise BundleError(f"a file {what}", where=folder / name, hint=COPY_AGAIN)
    for name, entry in manifest.files.items():
        size_bytes, sha256 = (folder / name).stat().st_size, sha256_file(folder / name)
        if (size_bytes, sha256) != (entry.bytes, entry.sha256):
            raise BundleError(
                "a file of the bundle is damaged",
                where=folder / name,
                found=f"{size_bytes} bytes, sha256 {sha256[:12]}",
                expected=f"{entry.bytes} bytes, sha256 {entry.sha256[:12]}",
                hint=COPY_AGAIN,
            )
