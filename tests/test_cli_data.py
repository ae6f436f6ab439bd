"""Data sets on the command line: `init`, `data inspect`, `verify --data`, and `--data` beside a workspace."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from bundles import write_bundle, write_color_folder, write_family
from records import make_record

from edge_ilseg.bundle import read_manifest, write_manifest
from edge_ilseg.checkpoint import ClassRecord, StepRecord, record_id
from edge_ilseg.cli import run
from edge_ilseg.cli.options import data_config, parse_data_options
from edge_ilseg.cli.verify import default_split
from edge_ilseg.config import DataConfig, read_config
from edge_ilseg.data.msrc import COLORS
from edge_ilseg.data.shapes import CLASSES
from edge_ilseg.errors import ConfigError

SMALL = ["train=40", "val=4", "test=4", "height_px=48", "width_px=48"]


def options(name: str, items: list[str]) -> list[str]:
    return [word for item in items for word in (name, item)]


def init(folder: Path, *more: str) -> int:
    later = ["--later-classes", ",".join(CLASSES[-2:])]
    return run(["init", str(folder), "--dataset", "shapes", *later, *options("--option", SMALL), *more])


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[tuple[list[str], int]]:
    """Classes and images of each step, as `data inspect` counts them."""
    capsys.readouterr()
    assert run(["data", "inspect", *arguments, "--json"]) == 0, capsys.readouterr().err
    return [(step["new"], step["images"]) for step in json.loads(capsys.readouterr().out)["steps"]]


def write_step(workspace: Path, index: int, name: str, classes: list[tuple[str, int]]) -> StepRecord:
    """The record of a step, without weights."""
    items = tuple(ClassRecord(item, step, (step, 0, 0)) for item, step in classes)
    record = make_record(index=index, name=name, classes=items)
    record = msgspec.structs.replace(record, id=record_id(record))
    (workspace / "steps" / name).mkdir(parents=True)
    (workspace / "steps" / name / "step.json").write_bytes(msgspec.json.encode(record))
    return record


def make_msrc(root: Path) -> Path:
    (root / "Images").mkdir(parents=True)
    (root / "GroundTruth").mkdir()
    (root / "train.txt").write_text("1_1_s\n")
    return root


# --- init ---


def test_options_of_the_data_set_become_values_of_their_types(tmp_path: Path) -> None:
    assert init(tmp_path / "work", "--setup", "partitioned", "--partition-seed", "3") == 0
    data = read_config(tmp_path / "work" / "edge-ilseg.toml").data
    assert data.options == {"train": 40, "val": 4, "test": 4, "height_px": 48, "width_px": 48}
    assert (data.setup, data.partition_seed) == ("partitioned", 3)


def test_a_list_of_void_classes_goes_from_init_into_the_workspace(tmp_path: Path) -> None:
    root = make_msrc(tmp_path / "msrc")
    command = ["init", str(tmp_path / "work"), "--dataset", "msrc", "--root", str(root), "--later-classes", "boat"]
    assert run([*command, "--option", "void_classes=horse,cow"]) == 0
    config = read_config(tmp_path / "work" / "edge-ilseg.toml")
    assert config.data.options == {"void_classes": ["horse", "cow"]}
    assert set(config.classes.base) == set(COLORS) - {"horse", "cow", "boat"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("seed=three", "'seed' of the data set 'shapes' has a value that cannot be used"),
        ("sead=3", "did you mean 'seed'"),
        ("seed", "KEY=VALUE"),
        ("train=41", "given twice"),
    ],
)
def test_an_option_that_cannot_be_used_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], item: str, message: str
) -> None:
    assert init(tmp_path / "work", "--option", item) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_an_unknown_backbone_is_told_with_the_nearest_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path / "work", "--backbone", "tine") == 3
    error = capsys.readouterr().err
    assert "did you mean 'tiny'" in error
    assert "resnet18" in error


def test_a_folder_that_cannot_be_made_is_an_error_for_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert init(tmp_path / "file" / "work") == 3
    assert capsys.readouterr().err.startswith("error: ")


# --- data inspect ---


def test_a_plan_is_found_as_training_finds_it(capsys: pytest.CaptureFixture[str]) -> None:
    small = options("--data-option", SMALL)
    steps = inspected(capsys, "shapes:", "--plan", "DISK, square/Star", "--setup", "overlapped", *small)
    assert [new for new, _ in steps] == [["background", "disk", "square"], ["star"]]
    assert all(images > 0 for _, images in steps)
    assert run(["data", "inspect", "shapes:", "--plan", "disk/stra", *small]) == 3
    assert "did you mean 'star'" in capsys.readouterr().err
    assert run(["data", "inspect", "shapes:", "--plan", "disk//star", *small]) == 3
    assert "a step of the plan has no class" in capsys.readouterr().err


def test_the_plan_of_a_workspace_is_its_steps_and_one_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    assert init(work) == 0
    base, later = list(CLASSES[:-2]), list(CLASSES[-2:])
    assert [new for new, _ in inspected(capsys, str(work))] == [base, later]

    known = [(name, 0) for name in base]
    write_step(work, 0, "00-base", known)
    write_step(work, 1, "01-a", [*known, (later[1], 1)])
    write_step(work, 1, "01-b", [*known, (later[0], 1)])
    (work / "steps" / "02-damaged").mkdir()
    assert [new for new, _ in inspected(capsys, str(work))] == [base, [later[1]], [later[0]]]

    write_step(work, 2, "02-c", [*known, (later[1], 1), ("seen elsewhere", 2)])
    assert [new for new, _ in inspected(capsys, str(work))] == [base, [later[1]], [], [later[0]]]


def test_another_partition_seed_moves_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path / "work", "--setup", "partitioned") == 0
    first = inspected(capsys, str(tmp_path / "work"))
    assert inspected(capsys, str(tmp_path / "work"), "--seed", "1") == first
    seeds = [inspected(capsys, str(tmp_path / "work"), "--partition-seed", str(seed)) for seed in (1, 2, 3)]
    assert any(steps != first for steps in seeds)


# --- other data beside a workspace ---


def test_another_folder_of_the_same_kind_keeps_splits_options_and_setup(tmp_path: Path) -> None:
    own = DataConfig("msrc", "/own", "train+val", "test", "disjoint", 4, {"void_classes": ["cow"]})
    changed = data_config(own, f"msrc:{tmp_path}", None, None)
    assert changed == msgspec.structs.replace(own, root=str(tmp_path))
    assert data_config(own, f"msrc:{tmp_path}", "train", None).train_split == "train"
    assert data_config(own, None, None, "val", ("void_classes=horse,cow",)) == msgspec.structs.replace(
        own, eval_split="val", options={"void_classes": ["horse", "cow"]}
    )


def test_another_kind_has_its_own_splits_and_options_and_keeps_the_setup(tmp_path: Path) -> None:
    own = DataConfig("msrc", "/own", "train+val", "test", "disjoint", 4, {"void_classes": ["cow"]})
    changed = data_config(own, f"folder:{tmp_path}", None, None)
    assert changed == DataConfig("folder", str(tmp_path), setup="disjoint", partition_seed=4)
    assert data_config(own, "shapes:", None, None, ("seed=2",)).options == {"seed": 2}


def test_options_are_read_for_the_kind_they_are_given_for() -> None:
    assert parse_data_options("voc", ["augmented=false"], "--data-option") == {"augmented": False}
    with pytest.raises(ConfigError, match="no option 'seed'"):
        parse_data_options("voc", ["seed=1"], "--data-option")


# --- verify ---


@pytest.mark.parametrize(
    ("splits", "expected_data", "split"),
    [
        (("train", "val", "test"), None, "test"),
        (("train", "val", "test"), "msrc:val", "val"),
        (("train", "val", "test"), "msrc:train+val", "train+val"),
        (("train", "val"), "msrc:test", "val"),
        (("train", "val"), "made up", "val"),
        (("held-out",), "msrc:test", "held-out"),
    ],
)
def test_the_split_is_the_one_of_the_bundle_or_else_test_val_or_the_only_one(
    splits: tuple[str, ...], expected_data: str | None, split: str
) -> None:
    assert default_split(splits, expected_data) == split


@pytest.mark.parametrize(("splits", "message"), [(("train", "site"), "splits train, site"), ((), "no split")])
def test_without_such_a_split_the_user_has_to_say_which(splits: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        default_split(splits, None)


def test_verify_takes_the_split_that_the_bundle_was_scored_on_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child, parent = write_family(tmp_path)
    images = write_color_folder(tmp_path / "colors")
    (images / "splits" / "test.txt").rename(images / "splits" / "site.txt")
    (images / "splits" / "test.txt").write_text("000\n")
    manifest = read_manifest(child)
    write_manifest(child, msgspec.structs.replace(manifest, expected_data="msrc:site", bundle_id="", files={}))
    command = ["verify", str(child), "--data", f"folder:{images}", "--against", str(parent), "--latency-runs", "1"]
    assert run([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert "split: site of folder:" in captured.err
    assert json.loads(captured.out)["scores"]["split"] == "site"
    assert run([*command, "--json", "--split", "test"]) == 4  # one image is too few to tell
    captured = capsys.readouterr()
    assert "split:" not in captured.err
    assert json.loads(captured.out)["scores"]["split"] == "test"


def test_verify_names_a_lost_image_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child, parent = write_family(tmp_path)
    images = write_color_folder(tmp_path / "colors")
    (images / "masks" / "001.png").unlink()
    (images / "images" / "002.png").unlink()
    command = ["verify", str(child), "--data", f"folder:{images}", "--against", str(parent), "--latency-runs", "1"]
    assert run([*command, "--max-bad-images", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [item["image_id"] for item in report["scores"]["bad_images"]] == ["001", "002"]


def test_verify_reports_a_damaged_bundle_whatever_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "bundle", {"background": 0, "apple": 0}, step_id="a" * 64)
    (tmp_path / "bundle" / "manifest.json").write_text("{")
    images = write_color_folder(tmp_path / "colors")
    assert run(["verify", str(tmp_path / "bundle"), "--data", f"folder:{images}", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["checks"][0]["verdict"] == "failed"


def test_verify_opens_data_as_the_other_commands_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "bundle", {"background": 0, "apple": 0}, step_id="a" * 64)
    assert run(["verify", str(tmp_path / "bundle"), "--data", "floder:x"]) == 3
    assert "did you mean 'folder'" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "bundle"), "--data-option", "seed=1"]) == 3
    assert "add --data KIND:ROOT" in capsys.readouterr().err
