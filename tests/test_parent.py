"""The parent's bundle: the right one, whole, or none."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from bundles import BASE, export_grown, step_entry, write_bundle

from edge_ilseg.bundle import check_files, read_manifest, write_manifest
from edge_ilseg.calibration.ranges import read_ranges
from edge_ilseg.errors import BundleError, ExportError
from edge_ilseg.export.parent import load_parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 0 with int8 models for both runtimes, and fp32 besides."""
    folder = tmp_path_factory.mktemp("parent") / "00-step"
    export_grown(folder, targets=("onnx", "openvino"), precisions=("fp32", "int8"))
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "parent")
    return tmp_path / "parent"


def test_the_parents_ranges_and_int8_models_are_found(exported: Path) -> None:
    parent = load_parent(exported, step_entry(1))
    assert parent.manifest == read_manifest(exported)
    assert parent.ranges == read_ranges(exported / "ranges.json")
    for runtime in ("onnxruntime", "openvino"):
        assert parent.int8(runtime) == parent.manifest.model(runtime, "int8")


def test_the_parents_int8_weights_are_the_same_in_whichever_form_it_has_them(exported: Path) -> None:
    parent = load_parent(exported, step_entry(1))
    only_openvino = tuple(entry for entry in parent.manifest.models if entry.runtime == "openvino")
    other = msgspec.structs.replace(parent, manifest=msgspec.structs.replace(parent.manifest, models=only_openvino))
    one, two = (
        {k: v for k, v in item.int8_constants().items() if k.endswith("_quantized")} for item in (parent, other)
    )
    assert len(one) > 30
    assert one == two


def test_the_bundle_of_another_step_is_refused_and_both_are_named(exported: Path) -> None:
    with pytest.raises(ExportError, match="not the bundle of the parent of step '02-step'") as raised:
        load_parent(exported, step_entry(2))
    assert raised.value.where == exported
    assert raised.value.found == "step '00-step' (000000000000)"
    assert "111111111111" in str(raised.value.expected)
    assert "--parent" in str(raised.value.hint)


def test_step_0_has_no_parent(exported: Path) -> None:
    with pytest.raises(ExportError, match="no parent at all: this is step 0"):
        load_parent(exported, step_entry(0))


def test_the_parents_name_does_not_matter_and_its_id_does(folder: Path) -> None:
    manifest = read_manifest(folder)
    renamed = msgspec.structs.replace(manifest.step, name="00-renamed")
    write_manifest(folder, msgspec.structs.replace(manifest, step=renamed))
    assert load_parent(folder, step_entry(1)).manifest.step.name == "00-renamed"
    retrained = msgspec.structs.replace(manifest.step, id="f" * 64)
    write_manifest(folder, msgspec.structs.replace(manifest, step=retrained))
    with pytest.raises(ExportError, match=r"step '00-step' \(ffffffffffff\)"):
        load_parent(folder, step_entry(1))


@pytest.mark.parametrize("name", ["ranges.json", "models/onnx/model.int8.onnx", "models/openvino/model.int8.bin"])
def test_a_damaged_bundle_is_refused_and_the_file_named(name: str, folder: Path) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(BundleError, match="damaged") as raised:
        load_parent(folder, step_entry(1))
    assert raised.value.where == folder / name


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        load_parent(tmp_path, step_entry(1))


def test_ranges_that_are_none_are_refused_even_where_their_hash_fits(folder: Path) -> None:
    text = (folder / "ranges.json").read_text()
    (folder / "ranges.json").write_text(text.replace('"lowest": 0.0,', '"lowest": 1e9,'))
    write_manifest(folder, read_manifest(folder))
    check_files(folder, read_manifest(folder))
    with pytest.raises(ExportError, match="upside down"):
        load_parent(folder, step_entry(1))


def test_a_bundle_without_int8_has_no_ranges(tmp_path: Path) -> None:
    write_bundle(tmp_path / "fp32", BASE, step_id=step_entry(0).id)
    parent = load_parent(tmp_path / "fp32", step_entry(1))
    assert parent.ranges is None
    assert parent.int8("onnxruntime") is None


def test_a_bundle_of_weights_alone_has_int8_models_and_no_ranges(tmp_path: Path) -> None:
    manifest = export_grown(tmp_path / "small", ranges="weights-only")
    parent = load_parent(tmp_path / "small", step_entry(1))
    assert parent.ranges is None
    assert (parent.int8_constants(), parent.subgraphs()) == ({}, frozenset())
    assert parent.int8("onnxruntime") == manifest.models[0]
    assert parent.int8("openvino") is None
