"""The manifest and the files of a bundle; numbers are the rules on top of `edge_ilseg/bundle.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import BASE, GROWN, write_bundle

from edge_ilseg import bundle
from edge_ilseg.bundle import (
    MANIFEST_NAME,
    CalibrationEntry,
    ClassEntry,
    Manifest,
    check_files,
    is_bundle,
    manifest_id,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from edge_ilseg.devices.limits import OwnLimits
from edge_ilseg.errors import BundleError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", GROWN, step_id="b" * 64, parent_id="a" * 64)
    return tmp_path / "bundle"


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest after `change`, with a `bundle_id` that fits: what somebody writes who knows the format."""
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    change(content)
    content["bundle_id"] = ""
    try:
        content["bundle_id"] = manifest_id(msgspec.convert(content, Manifest))
    except msgspec.ValidationError:
        content["bundle_id"] = "0" * 64
    return json.dumps(content).encode()


def test_a_written_manifest_is_read_as_it_was(folder: Path) -> None:
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert write_manifest(folder, manifest) == manifest == read_manifest(folder)


def test_limits_are_written_where_there_are_some_and_make_another_bundle(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert b"limits" not in (folder / MANIFEST_NAME).read_bytes()
    limited = write_manifest(folder, msgspec.structs.replace(manifest, limits=OwnLimits(max_rss_mib=300.0)))
    assert limited == read_manifest(folder)
    assert limited.bundle_id != manifest.bundle_id
    assert json.loads((folder / MANIFEST_NAME).read_bytes())["limits"] == {"max_rss_mib": 300.0}


@pytest.mark.parametrize(
    "limits", [{"max_rss_mib": -1}, {"min_new_miou_pct": 101}, {"max_colour": 1}, {"min_images": 0}]
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, float], folder: Path) -> None:
    with pytest.raises(BundleError, match=r"limits"):
        parse_manifest(forge(folder, lambda content: content.update(limits=limits)))


def test_what_is_written_is_plain_json_that_names_every_file(folder: Path) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_text())
    assert set(content["files"]) == {"fp32.onnx", "golden/images.npy", "golden/onnxruntime-fp32.npy"}
    assert content["files"]["fp32.onnx"]["bytes"] == (folder / "fp32.onnx").stat().st_size


def test_the_id_does_not_depend_on_how_the_json_is_laid_out(folder: Path) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    shuffled = json.dumps(dict(sorted(content.items(), reverse=True)), indent=7).encode()
    assert parse_manifest(shuffled) == read_manifest(folder)


@pytest.mark.parametrize("name", ["fp32.onnx", "golden/images.npy", "golden/onnxruntime-fp32.npy"])
def test_one_flipped_bit_anywhere_is_found_and_the_file_named(name: str, folder: Path) -> None:
    path = folder / name
    data = path.read_bytes()
    for position in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(BundleError, match="a file of the bundle is damaged") as raised:
            check_files(folder, read_manifest(folder))
        assert raised.value.where == path
    path.write_bytes(data)
    check_files(folder, read_manifest(folder))


def test_every_flipped_bit_of_the_manifest_is_found(folder: Path) -> None:
    """Rule 2. Blanks between the parts of the JSON may change: they carry nothing."""
    data = (folder / MANIFEST_NAME).read_bytes()
    original = parse_manifest(data)
    for position in range(0, len(data), 5):
        damaged = data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
        try:
            assert parse_manifest(damaged) == original
        except BundleError:
            continue
        assert chr(data[position]).isspace()


def test_a_cut_file_is_found(folder: Path) -> None:
    path = folder / "fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="damaged"):
        check_files(folder, read_manifest(folder))


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "fp32.onnx").unlink()
    with pytest.raises(BundleError, match="missing from the bundle") as raised:
        check_files(folder, read_manifest(folder))
    assert raised.value.where == folder / "fp32.onnx"


@pytest.mark.parametrize("name", ["extra.bin", "golden/.hidden", "golden/manifest.json"])
def test_a_file_too_many_is_named(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(BundleError, match="is not in the manifest") as raised:
        check_files(folder, read_manifest(folder))
    assert raised.value.where == folder / name


def test_a_file_in_a_sub_folder_may_be_named_like_the_manifest(folder: Path) -> None:
    (folder / "golden" / MANIFEST_NAME).write_text("{}")
    manifest = write_manifest(folder, read_manifest(folder))
    assert "golden/manifest.json" in manifest.files
    check_files(folder, manifest)


def test_a_link_is_refused_even_to_the_right_bytes(folder: Path, tmp_path: Path) -> None:
    """Rule 3: what it leads to can change after the check."""
    (folder / "fp32.onnx").rename(tmp_path / "elsewhere")
    (folder / "fp32.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="a link"):
        check_files(folder, read_manifest(folder))


def test_a_linked_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "golden").rename(tmp_path / "elsewhere")
    (folder / "golden").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="a link"):
        check_files(folder, read_manifest(folder))


def test_a_pipe_is_refused_and_not_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(BundleError, match="a link or a device"):
        check_files(folder, read_manifest(folder))


NAMES_THAT_LEAVE = ["../x", "/etc/passwd", "golden/../../x", "a\\..\\b", "x\0y", "", ".", "./fp32.onnx", "a//b"]


@pytest.mark.parametrize("name", NAMES_THAT_LEAVE)
def test_a_name_that_leaves_the_folder_is_refused(name: str, folder: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"]["fp32.onnx"]

    with pytest.raises(BundleError, match="a file name in the manifest leaves the bundle"):
        parse_manifest(forge(folder, add))


@pytest.mark.parametrize("name", [*NAMES_THAT_LEAVE, "no-such-file"])
@pytest.mark.parametrize("field", ["golden_images", "golden_masks", "files", "ranges_file"])
def test_an_entry_that_refers_to_a_file_outside_the_list_is_refused(field: str, name: str, folder: Path) -> None:
    def refer(content: dict[str, Any]) -> None:
        model = content["models"][0]
        if field == "golden_images":
            content[field] = name
        elif field == "ranges_file":
            calibration = CalibrationEntry("minmax", "carry", (), "", True, "fitted", name, ())
            model["calibration"] = msgspec.to_builtins(calibration)
        else:
            model[field] = [name] if field == "files" else name

    with pytest.raises(BundleError, match="refers to a file that it does not list") as raised:
        parse_manifest(forge(folder, refer))
    assert raised.value.found == repr(name)


def test_a_model_without_a_file_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="a model in the manifest has no file"):
        parse_manifest(forge(folder, lambda content: content["models"][0].update(files=[])))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("classes", 0, "name"), "sky"),
        (("step", "parent_id"), "f" * 64),
        (("preprocessing", "width_px"), 65),
        (("models", 0, "precision"), "int8"),
        (("files", "fp32.onnx", "sha256"), "0" * 64),
        (("created",), "2027"),
        (("bundle_id",), "0" * 64),
    ],
)
def test_an_edited_manifest_is_refused(path: tuple[str | int, ...], value: object, folder: Path) -> None:
    content: Any = json.loads((folder / MANIFEST_NAME).read_bytes())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if path == ("classes", 0, "name"):
        content["background"] = value
    with pytest.raises(BundleError, match="the manifest was changed after it was written"):
        parse_manifest(json.dumps(content).encode())


@pytest.mark.parametrize(
    "change", [{"format_version": 3}, {"format_version": "4"}, {"format_version": 5}, {"format": "x"}]
)
def test_another_format_or_version_is_refused_before_anything_else_is_read(
    change: dict[str, object], folder: Path
) -> None:
    content = json.loads((folder / MANIFEST_NAME).read_bytes()) | change | {"a field of the future": 1}
    with pytest.raises(BundleError, match="a format that this version does not read") as raised:
        parse_manifest(json.dumps(content).encode())
    assert raised.value.expected == "'edge-ilseg-bundle' version 4"


def test_an_unknown_field_is_refused_and_named(folder: Path) -> None:
    with pytest.raises(BundleError, match="damaged") as raised:
        parse_manifest(forge(folder, lambda content: content["preprocessing"].update(mean=[0, 0, 0])))
    assert "`mean`" in raised.value.found


def test_a_missing_field_is_refused_and_named(folder: Path) -> None:
    with pytest.raises(BundleError, match="damaged") as raised:
        parse_manifest(forge(folder, lambda content: content.pop("background")))
    assert "`background`" in raised.value.found


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": "\xff"}', b"[" * 200_000, b'{"a":' * 200_000]
)
def test_bytes_that_are_no_json_object_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="the manifest is not JSON"):
        parse_manifest(data)


def with_classes(*classes: tuple[str, int]) -> Callable[[dict[str, Any]], object]:
    entries = [msgspec.to_builtins(ClassEntry(name, step, (0, 0, 0))) for name, step in classes]
    return lambda content: content.update(classes=entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_classes(), "not a list of unique names"),
        (with_classes(("background", 0), ("a", 0), ("a", 1)), "not a list of unique names"),
        (with_classes(("background", 0), *((f"c{n}", 1) for n in range(255))), "not a list of unique names"),
        (with_classes(("a", 1), ("background", 0)), "not in the order of their steps"),
        (with_classes(("background", 0), ("a", 2)), "not in the order of their steps"),
        (with_classes(("background", -1), ("a", 1)), "not in the order of their steps"),
        (with_classes(("a", 0), ("b", 1)), "the background of the manifest is none of its classes"),
        (lambda content: content["preprocessing"].update(height_px=0), "has no size"),
    ],
)
def test_classes_and_sizes_that_make_no_sense_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, folder: Path
) -> None:
    """Rule 4: `old_count`, and with it every verdict on retention, rests on the order of the classes."""
    with pytest.raises(BundleError, match=message):
        parse_manifest(forge(folder, change))


def test_a_manifest_that_nobody_could_read_is_not_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    before = (folder / MANIFEST_NAME).read_bytes()
    with pytest.raises(BundleError, match="order of their steps"):
        write_manifest(folder, msgspec.structs.replace(manifest, classes=manifest.classes[::-1]))
    with pytest.raises(BundleError, match="does not list"):
        write_manifest(folder, msgspec.structs.replace(manifest, golden_images="golden/other.npy"))
    assert (folder / MANIFEST_NAME).read_bytes() == before


def test_old_classes_are_those_of_earlier_steps(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.class_names == tuple(GROWN)
    assert manifest.old_count == 3
    assert write_bundle(tmp_path / "base", BASE, step_id="a").old_count == 0


def test_a_model_that_the_bundle_lacks_is_an_error_that_lists_those_it_has(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.model("onnxruntime", "fp32") == manifest.models[0]
    with pytest.raises(BundleError) as raised:
        manifest.model("openvino", "int8")
    assert (raised.value.found, raised.value.expected) == ("onnxruntime/fp32", "openvino/int8")
    assert "--target openvino --precision int8" in raised.value.hint


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(BundleError, match="no bundle") as raised:
            read_manifest(path)
        assert raised.value.where == path


def test_a_manifest_that_cannot_be_read_is_an_error_of_the_bundle(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        read_manifest(folder)


def test_a_damaged_bundle_is_still_one_and_other_folders_are_not(folder: Path, tmp_path: Path) -> None:
    assert is_bundle(folder)
    (folder / "fp32.onnx").unlink()
    path = folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-20] + b"\xff")
    assert is_bundle(folder)
    (tmp_path / "link").symlink_to(folder)
    assert not is_bundle(tmp_path / "link")
    for data in (b"", b"{}", b'{"format": "edge-ilseg-step"}', b'{"name": "edge-ilseg-bundle"}'):
        path.write_bytes(data)
        assert not is_bundle(folder)
    path.unlink()
    path.mkdir()
    assert not is_bundle(folder)
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "nowhere")


def test_a_manifest_of_absurd_size_is_refused_before_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_MANIFEST_BYTES", 100)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    with pytest.raises(BundleError, match="too large"):
        read_manifest(folder)


def test_a_file_that_the_disk_cannot_read_is_an_error_of_the_bundle(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worn flash answers with EIO."""

    def fails(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(bundle, "sha256_file", fails)
    with pytest.raises(BundleError, match="cannot be read") as raised:
        check_files(folder, read_manifest(folder))
    assert raised.value.found == "Input/output error"
