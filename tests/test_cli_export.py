"""`edge-ilseg export`: options, refusals, tables, and notes in plain words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from bundles import stretch_ranges

from edge_ilseg.bundle import Manifest, check_files, parse_manifest, read_manifest
from edge_ilseg.checkpoint import load_model, write_step
from edge_ilseg.cli import run
from edge_ilseg.cli.export_tables import int8_notes
from edge_ilseg.devices.limits import OwnLimits
from edge_ilseg.int8_record import AttemptRecord, Int8Record
from edge_ilseg.workspace import Workspace, open_workspace

OPTIONS = ("train=40", "val=4", "test=4", "height_px=48", "width_px=48")
INIT = ["--dataset", "shapes", "--later-classes", "star,triangle", "--backbone", "tiny", "--size", "48x48"]
INIT += [word for option in OPTIONS for word in ("--option", option)]
QUICK = ["--iterations", "1", "--batch-size", "2", "--accelerator", "cpu"]
ONE_MODEL = ["--target", "onnx", "--precision", "int8", "--calibration-images", "4"]
NO_GUARD = [*ONE_MODEL, "--no-guard"]


def spread_logits(workspace: Workspace, name: str) -> None:
    """Give a step a classifier whose classes all win somewhere: a network that was hardly trained shows one alone."""
    record = workspace.read_step(name)
    model = load_model(workspace.step_folder(name), record)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for conv in model.classifiers[0].convs:
            conv.weight.normal_()
    shutil.rmtree(workspace.step_folder(name))
    write_step(workspace.step_folder(name), record, model)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 0 and 1, and the bundle of step 0 in its usual place; tests write to places of their own."""
    root = tmp_path_factory.mktemp("cli") / "work"
    assert run(["init", str(root), *INIT]) == 0
    assert run(["train", str(root), *QUICK]) == 0
    spread_logits(open_workspace(root), "00-base")
    assert run(["step", str(root), "--add-classes", "star", "--freeze", "all_but_head", *QUICK]) == 0
    assert run(["export", str(root), "--step", "0", *NO_GUARD]) == 0
    return root


@pytest.fixture
def alone(workspace: Path, tmp_path: Path) -> Path:
    """The same workspace without any bundle."""
    shutil.copytree(workspace, tmp_path / "work", ignore=shutil.ignore_patterns("bundles"))
    return tmp_path / "work"


def output(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed to standard output, each run of white space as one blank."""
    return " ".join(capsys.readouterr().out.split())


def record_of(folder: Path) -> Int8Record:
    record = read_manifest(folder).int8
    assert record is not None
    return record


def test_a_step_is_explained_in_tables_and_plain_words(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--bundle-limit", "max_old_miou_drop_pct=1", "--bundle-limit", "min_images=50"]
    assert run(["export", str(workspace), "--explain", "--out", str(tmp_path / "star"), *limits, *ONE_MODEL]) == 0
    assert read_manifest(tmp_path / "star").limits == OwnLimits(max_old_miou_drop_pct=1.0, min_images=50)
    text = output(capsys)
    manifest, record = read_manifest(tmp_path / "star"), record_of(tmp_path / "star")
    check_files(tmp_path / "star", manifest)
    assert (record.taken, record.max_old_drop_points) == ("carry", 2.0)
    assert "01-star: from torch to the shipped models" in text
    assert "┃ MiB ┃ ms ┃" in text
    for row in manifest.parity:
        assert row.latency_ms is not None
        size = "-" if row.model_bytes is None else f"{row.model_bytes / 2**20:.2f}"
        assert f"│ {size} │ {row.latency_ms:.1f} │" in text
    assert "what int8 costs the old classes (at most 2 points)" in text
    for compared in record.attempts[0].rows:
        cells = f"{100 * compared.fp32:.1f} │ {100 * compared.int8:.1f} │ {compared.drop_points:.2f}"
        images = f"{compared.count} {compared.images} │ {len(compared.class_iou)}"
        assert f"│ carry │ onnxruntime │ {images} │ {cells}" in text
    assert "most quantization noise" in text
    for worst in record.worst_sqnr:
        assert f"│ {worst.tensor} │ {worst.sqnr_db:.1f} │" in text
    (delta,) = record.delta
    share = f"{100 * delta.changed_bytes / delta.total_bytes:.2f}"
    assert f"│ {delta.total_bytes:,} │ {delta.changed_bytes:,} │ {share} │" in text
    assert f"│ {delta.encoder_bytes:,} │ 0 │ yes │" in text
    assert f"int8 ranges: {record.carried} tensors keep the parent's, {record.merged} have the envelope" in text
    assert f"{sum(record.silent_channels.values())} channels in {len(record.silent_channels)} tensors were" in text
    assert "warning" not in text
    assert f"written: {tmp_path / 'star'}" in text


def test_what_was_tried_is_shown_when_the_first_way_was_not_taken(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parent's ranges of the frozen encoder are made far too narrow; nothing else is said about it."""
    parent = stretch_ranges(workspace / "bundles/00-base", tmp_path / "parent", 0.05, ("encoder.",))
    out = ["--out", str(tmp_path / "out"), "--max-old-drop", "20"]
    assert run(["export", str(workspace), "--step", "1", "--parent", str(parent), *out, *ONE_MODEL]) == 0
    text, record = output(capsys), record_of(tmp_path / "out")
    assert [(item.attempt, item.verdict) for item in record.attempts] == [("carry", "refused"), ("union", "taken")]
    assert record.max_old_drop_points == 20.0
    assert "what int8 costs the old classes (at most 20 points)" in text
    assert text.count("│ refused │") == text.count("│ taken │") == 3
    assert "┃ ms ┃" not in text
    assert "most quantization noise" not in text
    reason = f"carry: {record.attempts[0].reason}"
    assert f"warning: carry costs the old classes too much ({reason}), so union was taken" in text


def test_json_is_the_manifest_with_the_record_of_int8(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["--keep-float", "last", "--max-changed", "50", "--range-method", "mean-minmax", "--rounding", "nearest"]
    out = tmp_path / "json"
    assert run(["export", str(workspace), *NO_GUARD, *keep, "--out", str(out), "--json"]) == 0
    text = capsys.readouterr().out
    manifest = parse_manifest(text.encode())
    assert manifest == read_manifest(out)
    assert json.loads(text)["int8"]["attempts"][0]["verdict"] == "taken"
    record = record_of(out)
    assert (record.max_old_drop_points, len(record.attempts)) == (None, 1)
    classifiers = ("decoder.classifiers.0.steps.0/Conv", "decoder.classifiers.0.steps.1/Conv")
    entry = manifest.model("onnxruntime", "int8")
    assert entry.calibration is not None
    assert entry.calibration.float_layers == record.attempts[0].float_layers == classifiers
    assert (entry.calibration.method, entry.calibration.rounding) == ("mean-minmax", "nearest")
    assert entry.convolutions is not None
    assert [entry.convolutions[name] for name in classifiers] == ["f32", "f32"]
    assert "u8" in entry.convolutions.values()


def test_a_step_without_its_parents_bundle_is_refused_with_what_to_do(
    alone: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(alone), *NO_GUARD]) == 3
    error = capsys.readouterr().err
    assert "'01-star' needs the int8 ranges of its parent" in error
    assert "export the parent step first, or give its bundle (--parent)" in error
    assert not (alone / "bundles").exists()
    assert run(["export", str(alone), *NO_GUARD, "--parent", str(tmp_path / "nowhere")]) == 3
    assert "no bundle" in capsys.readouterr().err
    assert run(["export", str(alone), *NO_GUARD, "--parent", str(workspace / "bundles/00-base")]) == 0
    assert [path.name for path in (alone / "bundles").iterdir()] == ["01-star"]
    assert run(["export", str(alone), "--step", "0", *NO_GUARD, "--parent", str(alone / "bundles/01-star")]) == 3
    error = capsys.readouterr().err
    assert "this is not the bundle of the parent of step '00-base'" in error
    assert "no parent at all: this is step 0" in error


def test_ranges_of_the_new_images_alone_come_with_a_warning(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert run(["export", str(alone), "--ranges", "new-only", *out, *NO_GUARD]) == 0
    assert "warning: ranges from the new images alone clip what old classes need" in output(capsys)
    record = record_of(tmp_path / "out")
    assert (record.asked, record.taken, record.carried, record.merged) == ("new-only", "new-only", 0, 0)


def test_weights_alone_are_called_what_they_are(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(alone), "--ranges", "weights-only", "--out", str(tmp_path / "out"), *NO_GUARD]) == 0
    text = output(capsys)
    assert "int8: weights alone; the models are small, and compute in float" in text
    assert "int8 ranges:" not in text
    assert not (tmp_path / "out" / "ranges.json").exists()


def reduce_range(folder: Path) -> bool:
    calibration = read_manifest(folder).model("onnxruntime", "int8").calibration
    assert calibration is not None
    return calibration.reduce_range


def test_a_profile_with_integer_dot_products_gets_8_bit_weights(workspace: Path, tmp_path: Path) -> None:
    base = ["export", str(workspace), "--step", "0", *NO_GUARD]
    assert reduce_range(workspace / "bundles/00-base")
    assert run([*base, "--profile", "x86-vnni", "--out", str(tmp_path / "vnni")]) == 0
    assert not reduce_range(tmp_path / "vnni")
    own = tmp_path / "own.toml"
    own.write_text('description = "none"\nmachine = "x86_64"\nint8_flags = ["avx2"]\n')
    assert run([*base, "--profile", str(own), "--out", str(tmp_path / "avx2")]) == 0
    assert reduce_range(tmp_path / "avx2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "x86-vni"], "did you mean 'x86-vnni'"),
        (["--profile", "nowhere.toml"], "there is no such device profile"),
        (["--no-guard", "--max-old-drop", "3"], "--no-guard and --max-old-drop exclude each other"),
        (["--max-old-drop", "-1"], "--max-old-drop"),
        (["--ranges", "old-only"], "carry"),
        (["--range-method", "median"], "mean-minmax"),
        (["--bundle-limit", "max_old_miou_drop=1"], "did you mean 'max_old_miou_drop_pct'"),
        (["--bundle-limit", "max_old_miou_drop_pct"], "KEY=VALUE"),
        (["--bundle-limit", "min_images=2", "--bundle-limit", "min_images=3"], "given twice"),
        (["--bundle-limit", "min_new_miou_pct=120"], "<= 100"),
        (["--bundle-limit", "min_new_miou_pct=much"], "min_new_miou_pct=much"),
        (["--bundle-limit", "max_old_miou_drop_pct=nan"], "not a finite number"),
        (["--bundle-limit", "max_rss_mib=null"], "max_rss_mib=null"),
        (["--bundle-limit", "brightness=2"], "min_golden_agreement, max_old"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(
    options: list[str], message: str, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(alone), "--step", "0", *ONE_MODEL, *options]) == 3
    assert message in capsys.readouterr().err
    assert not (alone / "bundles").exists()


def test_a_layer_that_is_not_there_and_a_budget_that_is_exceeded_leave_nothing_behind(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    star = ["export", str(workspace), *NO_GUARD, "--out", str(tmp_path / "out")]
    assert run([*star, "--keep-float", "encoder.stages.7"]) == 3
    assert "there is no such layer to keep in float" in capsys.readouterr().err
    assert run([*star, "--max-changed", "0.01"]) == 3
    assert "more of the int8 model is new than the delta budget allows" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def exported(workspace: Path) -> tuple[Manifest, Int8Record]:
    return read_manifest(workspace / "bundles/00-base"), record_of(workspace / "bundles/00-base")


def test_at_step_0_there_is_nothing_to_note(exported: tuple[Manifest, Int8Record]) -> None:
    manifest, record = exported
    assert int8_notes(manifest, record) == []
    new_only = msgspec.structs.replace(record, asked="new-only", taken="new-only")
    assert int8_notes(manifest, new_only) == []


def test_each_way_that_was_refused_is_named_with_its_reason(exported: tuple[Manifest, Int8Record]) -> None:
    manifest, record = exported
    attempts = tuple(
        AttemptRecord(name, (), (), None, verdict, reason)  # type: ignore[arg-type]
        for name, verdict, reason in (
            ("carry", "refused", "+5.00 points"),
            ("mixed", "refused", "+4.00 points"),
            ("weights-only", "taken", "+0.10 points"),
        )
    )
    changed = msgspec.structs.replace(record, taken="weights-only", attempts=attempts, silent_channels={"a": 2, "b": 5})
    notes = int8_notes(manifest, changed)
    assert len(notes) == 3
    assert notes[0].startswith("int8: weights alone")
    assert notes[1] == (
        "warning: carry costs the old classes too much (carry: +5.00 points; mixed: +4.00 points), "
        "so weights-only was taken"
    )
    assert notes[2].startswith("7 channels in 2 tensors were alive on the parent's images")
