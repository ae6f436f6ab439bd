"""Under a frozen encoder a bundle has its parent's encoder, in the step and in the file: the verdict on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import onnx
import pytest
from bundles import BASE, GROWN, export_grown, write_bundle, write_family
from fakes import with_constant

from edge_ilseg.bundle import Manifest, ModelEntry, Precision, read_manifest, write_manifest
from edge_ilseg.devices.encoder_constants import encoder_sha256 as hashed_here
from edge_ilseg.devices.encoder_constants import hash_encoder
from edge_ilseg.devices.verdicts import judge_encoder
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import Check, VerifyReport
from edge_ilseg.export.delta import encoder_sha256
from edge_ilseg.int8_record import Attempted, Int8Record

SAME, OTHER = "a" * 64, "b" * 64
REST = tuple(item for item in get_args(Attempted) if item != "carry")


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """Of a bundle whose step froze the encoder, and of its parent; without hashes of files."""
    folder = tmp_path_factory.mktemp("bundles")
    models = (("onnxruntime", "fp32"), ("onnxruntime", "int8"))
    parent = write_bundle(folder / "parent", BASE, step_id="p", models=models)  # type: ignore[arg-type]
    child = write_bundle(folder / "child", GROWN, step_id="c", parent_id="p", models=models)  # type: ignore[arg-type]
    return with_step(child, encoder_frozen=True), parent


def with_step(manifest: Manifest, **changes: object) -> Manifest:
    return msgspec.structs.replace(manifest, step=msgspec.structs.replace(manifest.step, **changes))


def record(taken: Attempted) -> Int8Record:
    return Int8Record(
        asked="carry",
        taken=taken,
        max_old_drop_points=None,
        attempts=(),
        carried=0,
        merged=0,
        measured=0,
        silent_channels={},
        worst_sqnr=(),
        sqnr_db={},
        delta=(),
    )


def judge(
    child: Manifest,
    parent: Manifest,
    precision: Precision = "int8",
    *,
    here: str | None = SAME,
    before: str | None = SAME,
) -> Check:
    def entry(manifest: Manifest, sha256: str | None) -> ModelEntry:
        return msgspec.structs.replace(manifest.model("onnxruntime", precision), encoder_sha256=sha256)

    return judge_encoder(child, entry(child, here), parent, entry(parent, before))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_weights_and_the_same_constants_pass(
    precision: Precision, manifests: tuple[Manifest, Manifest]
) -> None:
    check = judge(*manifests, precision)
    assert (check.name, check.verdict, check.exit_code) == ("encoder identity", "passed", 0)
    assert SAME[:12] in check.detail


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_weights_and_other_constants_are_refused(
    precision: Precision, manifests: tuple[Manifest, Manifest]
) -> None:
    check = judge(*manifests, precision, here=OTHER)
    assert (check.verdict, check.exit_code) == ("failed", 3)
    assert "other constants in the file" in check.detail


def test_a_parent_of_weights_alone_has_another_int8_form_of_the_same_encoder(
    manifests: tuple[Manifest, Manifest],
) -> None:
    child, parent = (msgspec.structs.replace(item, int8=record("carry")) for item in manifests)
    assert judge(child, parent, here=OTHER).verdict == "failed"
    alone = msgspec.structs.replace(parent, int8=record("weights-only"))
    check = judge(child, alone, here=OTHER)
    assert (check.verdict, check.exit_code) == ("passed", 0)
    assert "weights-only" in check.detail
    assert judge(child, alone, "fp32", here=OTHER).verdict == "failed"


def test_other_weights_are_refused_whatever_the_files_say_and_both_hashes_are_told(
    manifests: tuple[Manifest, Manifest],
) -> None:
    child, parent = manifests
    check = judge(with_step(child, encoder_sha256="12" * 32), parent)
    assert (check.verdict, check.exit_code) == ("failed", 3)
    assert f"{'12' * 6} here, {parent.step.encoder_sha256[:12]} in the parent" in check.detail


def test_an_encoder_that_the_step_trained_is_not_checked(manifests: tuple[Manifest, Manifest]) -> None:
    child, parent = manifests
    check = judge(with_step(child, encoder_frozen=False, encoder_sha256=OTHER), parent, here=OTHER)
    assert (check.verdict, check.exit_code, check.detail) == ("not checked", 0, "the step trained the encoder")


@pytest.mark.parametrize(("here", "before"), [(None, SAME), (SAME, None), (None, None)])
def test_files_without_a_hash_are_told_and_the_weights_decide(
    here: str | None, before: str | None, manifests: tuple[Manifest, Manifest]
) -> None:
    check = judge(*manifests, here=here, before=before)
    assert check.verdict == "passed"
    assert "no hash to compare" in check.detail


@pytest.mark.parametrize("taken", REST)
def test_int8_ranges_that_were_not_carried_make_other_constants_and_that_is_told(
    taken: Attempted, manifests: tuple[Manifest, Manifest]
) -> None:
    child, parent = manifests
    check = judge(msgspec.structs.replace(child, int8=record(taken)), parent, here=OTHER)
    assert check.verdict == "passed"
    assert f"not carried ({taken})" in check.detail


def test_carried_ranges_are_no_excuse_for_other_constants(manifests: tuple[Manifest, Manifest]) -> None:
    child, parent = manifests
    assert judge(msgspec.structs.replace(child, int8=record("carry")), parent, here=OTHER).verdict == "failed"


def test_ranges_are_no_excuse_for_a_float_model(manifests: tuple[Manifest, Manifest]) -> None:
    child, parent = manifests
    child = msgspec.structs.replace(child, int8=record("union"))
    assert judge(child, parent, "fp32", here=OTHER).verdict == "failed"


# Bundles on the disk


def verify_here(folder: Path, against: Path | None, precision: Precision | None = None) -> VerifyReport:
    return verify_bundle(folder, VerifyRequest(precision=precision, latency_runs=1, threads=1), against=against)


def test_another_encoder_ends_a_verification_with_3_after_every_check_has_run(tmp_path: Path) -> None:
    child, parent = write_family(tmp_path)
    manifest = with_step(read_manifest(child), encoder_frozen=True)
    write_manifest(child, manifest)
    assert verify_here(child, parent).check("encoder identity").verdict == "passed"
    write_manifest(child, with_step(manifest, encoder_sha256="f" * 64))
    report = verify_here(child, parent)
    assert report.exit_code == 3
    assert [check.name for check in report.checks if check.verdict == "failed"] == ["encoder identity"]
    assert report.check("golden outputs").verdict == "passed"
    assert report.latencies_ms


def test_without_a_parent_there_is_no_encoder_to_compare_with(tmp_path: Path) -> None:
    child, _ = write_family(tmp_path)
    write_manifest(child, with_step(read_manifest(child), encoder_frozen=True))
    check = verify_here(child, None).check("encoder identity")
    assert (check.verdict, check.detail) == ("not checked", "no parent bundle to compare with")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A step that froze the encoder and carried its ranges, and its parent, exported in earnest: child, parent."""
    folder = tmp_path_factory.mktemp("exported")
    export_grown(folder / "parent", precisions=("fp32", "int8"))
    export_grown(folder / "child", 1, parent=folder / "parent", precisions=("fp32", "int8"))
    return folder / "child", folder / "parent"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_export_under_a_frozen_encoder_has_the_parents_to_the_byte(
    precision: Precision, exported: tuple[Path, Path]
) -> None:
    check = verify_here(*exported, precision).check("encoder identity")
    assert check.verdict == "passed"
    assert "the same constants in the file" in check.detail


@pytest.mark.slow
def test_the_device_hashes_the_encoder_as_the_export_does(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """ONNX without onnx, and an IR without an XML parser; a hash that a manifest makes up is found out."""
    for folder in exported:
        for item in read_manifest(folder).models:
            assert hash_encoder(folder, item) == item.encoder_sha256 == encoder_sha256(folder, item.files)
    child, parent = exported
    lying = tmp_path / "lying"
    shutil.copytree(child, lying)
    manifest = read_manifest(lying)
    entries = tuple(msgspec.structs.replace(item, encoder_sha256="ab" * 32) for item in manifest.models)
    write_manifest(lying, msgspec.structs.replace(manifest, models=entries))
    check = verify_here(lying, parent, "fp32").check("encoder identity")
    assert (check.verdict, check.exit_code) == ("failed", 3)
    assert "not the one that the manifest speaks of" in check.detail


KINDS = [np.float32, np.float16, np.uint8, np.int8, np.int32, np.int64, np.bool_]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [True, False])
def test_numbers_of_every_kind_are_read_from_onnx_as_onnx_reads_them(kind: type, raw: bool, tmp_path: Path) -> None:
    values = np.array([0, 1, 3, -2 if np.dtype(kind).kind in "if" else 2]).astype(kind)
    if raw:
        tensor = onnx.numpy_helper.from_array(values, "encoder.a")
    else:
        data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = onnx.helper.make_tensor("encoder.a", data_type, values.shape, values)
    nothing = onnx.numpy_helper.from_array(np.zeros(0, np.float32), "encoder.none")
    other = onnx.numpy_helper.from_array(np.ones(2, np.float32), "decoder.a")
    graph = onnx.helper.make_graph([], "g", [], [], [other, tensor, nothing])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    assert hashed_here(tmp_path, ["model.onnx"]) == encoder_sha256(tmp_path, ["model.onnx"])


@pytest.mark.parametrize("cut", [0, 1, 7, 40])
def test_a_file_that_is_no_model_has_no_hash(cut: int, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(bytes(range(200, 256))[:cut])
    assert hashed_here(tmp_path, ["model.onnx"]) is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_encoder_that_was_changed_in_the_file_is_refused(
    precision: Precision, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    child, parent = exported
    changed = tmp_path / "changed"
    shutil.copytree(child, changed)
    manifest = read_manifest(changed)
    (entry,) = (item for item in manifest.models if item.precision == precision)
    path = changed / entry.files[0]
    model = onnx.load(path)
    names = [item.name for item in model.graph.initializer if item.name.startswith("encoder")]
    floats = [name for name in names if constant(model, name).dtype == np.float32 and constant(model, name).size]
    onnx.save(with_constant(model, floats[0], lambda value: value * np.float32(1.001)), path)
    entries = tuple(
        msgspec.structs.replace(item, encoder_sha256=encoder_sha256(changed, item.files)) for item in manifest.models
    )
    write_manifest(changed, msgspec.structs.replace(manifest, models=entries))
    report = verify_here(changed, parent, precision)
    assert report.check("integrity").verdict == "passed"
    assert report.check("encoder identity").verdict == "failed"
    assert "other constants in the file" in report.check("encoder identity").detail
    assert report.exit_code == 3


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return onnx.numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name))


@pytest.mark.slow
def test_ranges_of_both_steps_make_another_int8_encoder_of_the_same_weights(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    _, parent = exported
    export_grown(tmp_path / "union", 1, parent=parent, ranges="union", max_old_drop_points=None)
    check = verify_here(tmp_path / "union", parent).check("encoder identity")
    assert check.verdict == "passed"
    assert "its int8 ranges were not carried (union)" in check.detail
