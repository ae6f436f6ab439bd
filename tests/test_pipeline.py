"""From a workspace to steps and bundles, on generated images with a tiny network."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_ilseg.bundle import check_files, read_manifest
from edge_ilseg.checkpoint import StepRecord, load_model
from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
from edge_ilseg.data import open_data
from edge_ilseg.data.step_view import image_set_sha256
from edge_ilseg.errors import BundleError, ClassNameError, ConfigError, DataError, ExportError, WorkspaceError
from edge_ilseg.methods import METHODS
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.pipeline import evaluate_step, export_step, run_plan
from edge_ilseg.planning import plan_base, plan_step
from edge_ilseg.workspace import Workspace, create_workspace

if TYPE_CHECKING:
    from edge_ilseg.export.request import ExportRequest

DATA = DataConfig("shapes", options={"train": 60, "val": 6, "test": 6, "height_px": 48, "width_px": 48})
BASE = ("disk", "square", "ring", "cross", "bar", "crescent")
SPEC = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=48, input_width_px=48)
CONFIG = Config(
    data=DATA,
    classes=ClassesConfig(BASE),
    model=SPEC,
    weights="none",
    train=TrainConfig(iterations=6, batch_size=4),
    step=StepConfig(iterations=2, batch_size=2),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with step 0; never written to by a test."""
    workspace = create_workspace(tmp_path_factory.mktemp("pipeline") / "work", CONFIG)
    run_plan(workspace, plan_base(workspace), accelerator="cpu")
    return workspace


@pytest.fixture
def workspace(trained: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(trained.root, tmp_path / "work")
    return Workspace(tmp_path / "work", trained.config)


def step(workspace: Workspace, *names: str, **settings: object) -> StepRecord:
    name = settings.pop("name", None)
    parent = settings.pop("parent_name", None)
    changed = msgspec.structs.replace(CONFIG.step, **settings)
    return run_plan(workspace, plan_step(workspace, names, changed, name=name, parent_name=parent), accelerator="cpu")  # type: ignore[arg-type]


def write_folder(root: Path, name: str, count: int) -> Path:
    """`count` generated images that show a class, as a data set of kind `folder` with a split `train`."""
    shapes = open_data(DATA)
    for sub in ("images", "masks"):
        (root / sub).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(shapes.info.classes) + "\n")
    label = shapes.info.classes.index(name)
    chosen = [image_id for image_id in shapes.ids("train") if (shapes.read_labels(image_id) == label).any()][:count]
    for image_id in chosen:
        Image.fromarray(shapes.read_image(image_id)).save(root / "images" / f"{image_id}.png")
        Image.fromarray(shapes.read_labels(image_id)).save(root / "masks" / f"{image_id}.png")
    (root / "train.txt").write_text("\n".join(chosen) + "\n")
    return root


def test_step_0_knows_the_background_and_the_base_classes(trained: Workspace) -> None:
    record = trained.read_step("00-base")
    assert record.class_names == ("background", *BASE)
    assert (record.parent_id, record.method, record.background) == (None, None, "background")
    assert record.metrics["val"].images == 6
    dataset = open_data(DATA)
    assert record.data.images_sha256 == image_set_sha256(record.data.image_ids, dataset)
    assert {"torch", "numpy", "python", "edge-ilseg"} <= set(record.packages)


def test_a_step_goes_on_from_its_parent(workspace: Workspace) -> None:
    base = workspace.read_step("0")
    first = step(workspace, "star")
    second = step(workspace, "triangle")
    assert (first.name, second.name) == ("01-star", "02-triangle")
    assert (first.parent_id, second.parent_id) == (base.id, first.id)
    assert second.class_names == (*base.class_names, "star", "triangle")
    assert [item.step for item in second.classes] == [0] * 7 + [1, 2]
    assert (second.old_count, second.class_counts) == (8, (7, 1, 1))
    assert second.metrics["val"].miou_old is not None
    steps = [set(record.data.image_ids) for record in (base, first, second)]
    assert len(steps[0] | steps[1] | steps[2]) == sum(len(images) for images in steps)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_step_that_loads(workspace: Workspace, method: str) -> None:
    base = workspace.read_step("0")
    record = step(workspace, "star", method=method)
    load_model(workspace.step_folder(record.name), record)
    assert record.method is not None
    assert (record.method.name, record.method.losses) == (method, METHODS[method].losses)
    frozen = METHODS[method].freeze in ("encoder", "all_but_head")
    assert (record.encoder_sha256 == base.encoder_sha256) == frozen


def test_two_steps_from_one_parent_have_names_of_their_own(workspace: Workspace) -> None:
    step(workspace, "star", name="a")
    step(workspace, "star", name="b", parent_name="00-base")
    assert workspace.step_names() == ("00-base", "01-a", "01-b")
    with pytest.raises(WorkspaceError, match="name already"):
        step(workspace, "star", name="b", parent_name="00-base")


def test_several_classes_are_added_in_the_order_asked_for(workspace: Workspace) -> None:
    assert step(workspace, "triangle", "star").new_classes == ("triangle", "star")


def test_a_class_that_is_known_misspelt_or_given_twice_is_refused(workspace: Workspace) -> None:
    with pytest.raises(ClassNameError, match=r"known already(.|\n)*disk since step 0"):
        step(workspace, "disk")
    with pytest.raises(ClassNameError, match="did you mean 'star'"):
        step(workspace, "stra")
    with pytest.raises(ClassNameError):
        step(workspace, "star", "star")
    assert workspace.step_names() == ("00-base",)


def test_a_class_without_a_single_image_is_refused_by_name(workspace: Workspace) -> None:
    data = msgspec.structs.replace(DATA, options={**DATA.options, "train": 1})
    with pytest.raises(ClassNameError, match="without a single image: star"):
        plan_step(workspace, ["star"], data=data)


def test_an_empty_split_is_refused(workspace: Workspace) -> None:
    data = msgspec.structs.replace(DATA, options={**DATA.options, "train": 0})
    with pytest.raises(DataError, match="train"):
        plan_step(workspace, ["star"], data=data)


def test_a_combination_that_cannot_work_is_refused_before_training(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="same features"):
        step(workspace, "star", method="freeze", losses={"kd_feature": 1.0})


def test_a_step_learns_from_images_of_another_place(workspace: Workspace, tmp_path: Path) -> None:
    new = write_folder(tmp_path / "new", "star", 8)
    data = DataConfig("folder", str(new), eval_split="", setup="overlapped")
    plan = plan_step(workspace, ["star"], data=data)
    record = run_plan(workspace, plan, accelerator="cpu")
    assert len(record.data.image_ids) == 8
    assert (record.data.kind, record.data.from_workspace, record.metrics) == ("folder", False, {})


def test_a_data_set_with_another_background_is_refused(workspace: Workspace, msrc_root: Path) -> None:
    with pytest.raises(DataError, match="background is not the model's"):
        plan_step(workspace, ["boat"], data=DataConfig("msrc", str(msrc_root)))


def test_a_step_is_scored_beside_its_parent_on_the_same_images(workspace: Workspace) -> None:
    base = workspace.read_step("0")
    record = step(workspace, "star")
    assert record.parent_metrics == base.metrics
    assert set(record.parent_metrics["val"].iou) == set(base.class_names)


def test_a_parent_that_was_scored_on_the_same_images_is_not_scored_again(workspace: Workspace) -> None:
    plan = plan_step(workspace, ["star"], CONFIG.step)
    assert plan.parent is not None
    marked = msgspec.structs.replace(plan.parent.metrics["val"], miou_all=0.123)
    plan = replace(plan, parent=msgspec.structs.replace(plan.parent, metrics={"val": marked}))
    record = run_plan(workspace, plan, accelerator="cpu", parent_is_scored=True)
    assert record.parent_metrics == {"val": marked}
    assert record.metrics["val"].images == 6


def test_an_evaluation_split_that_is_not_there_is_found_before_training(workspace: Workspace) -> None:
    data = msgspec.structs.replace(DATA, eval_split="tset")
    with pytest.raises(DataError, match="did you mean 'test'"):
        plan_step(workspace, ["star"], data=data)


def test_a_trained_step_is_kept_when_its_evaluation_images_are_damaged(workspace: Workspace, tmp_path: Path) -> None:
    new = write_folder(tmp_path / "new", "star", 8)
    ids = (new / "train.txt").read_text().split()
    (new / "val.txt").write_text(ids[0] + "\n")
    (new / "train.txt").write_text("\n".join(ids[1:]) + "\n")
    damaged = new / "images" / f"{ids[0]}.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    plan = plan_step(workspace, ["star"], data=DataConfig("folder", str(new), setup="overlapped"))
    with pytest.raises(DataError, match=r"was trained and written, and could not be scored(.|\n)*edge-ilseg evaluate"):
        run_plan(workspace, plan, accelerator="cpu")
    record = workspace.read_step("01-star")
    assert record.metrics == {}
    load_model(workspace.step_folder("01-star"), record)


def test_new_images_where_only_the_new_class_is_labelled_score_that_class_alone(
    workspace: Workspace, tmp_path: Path
) -> None:
    new = write_folder(tmp_path / "new", "star", 8)
    labels = {name: number for number, name in enumerate((new / "classes.txt").read_text().split())}
    (new / "classes.txt").write_text("background\nstar\n")
    for path in (new / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray((mask == labels["star"]).astype(np.uint8)).save(path)
    ids = (new / "train.txt").read_text().split()
    (new / "val.txt").write_text("\n".join(ids[:2]) + "\n")
    (new / "train.txt").write_text("\n".join(ids[2:]) + "\n")
    record = run_plan(
        workspace,
        plan_step(workspace, ["star"], data=DataConfig("folder", str(new), setup="overlapped")),
        accelerator="cpu",
    )
    assert record.parent_metrics == {}
    assert record.metrics["val"].images == 2
    assert record.metrics["val"].iou["star"] is not None


def test_a_partitioned_step_learns_from_no_image_of_another_whatever_the_training_seed(tmp_path: Path) -> None:
    data = msgspec.structs.replace(DATA, setup="partitioned")
    workspace = create_workspace(tmp_path / "work", msgspec.structs.replace(CONFIG, data=data))
    base = run_plan(workspace, plan_base(workspace), accelerator="cpu")
    plan = plan_step(workspace, ["star", "triangle"], msgspec.structs.replace(CONFIG.step, seed=5))
    assert not set(plan.view.image_ids) & set(base.data.image_ids)
    moved = msgspec.structs.replace(data, partition_seed=1)
    with pytest.raises(DataError, match="would be learned from again"):
        plan_step(workspace, ["star", "triangle"], data=moved)


def test_where_old_pixels_are_void_distillation_covers_them(msrc_root: Path, tmp_path: Path) -> None:
    data = DataConfig("msrc", str(msrc_root), setup="disjoint")
    info = open_data(data).info
    config = Config(data, ClassesConfig(tuple(n for n in info.classes if n != "boat")), SPEC, "none", CONFIG.train)
    workspace = create_workspace(tmp_path / "work", config)
    run_plan(workspace, plan_base(workspace), accelerator="cpu")
    plan = plan_step(workspace, ["boat"], CONFIG.step)
    assert plan.method is not None
    assert plan.method.kd_mask == "not_new"
    assert plan.notes == ("distillation on every pixel that is not new: pixels of old classes are void",)
    record = run_plan(workspace, plan, accelerator="cpu")
    assert record.method == plan.method


@pytest.mark.parametrize("name", ["mib", "plop", "kd-similarity-pooled"])
def test_a_later_method_learns_a_step_in_which_old_classes_are_hidden(workspace: Workspace, name: str) -> None:
    hidden = Workspace(
        workspace.root,
        msgspec.structs.replace(workspace.config, data=msgspec.structs.replace(DATA, setup="disjoint")),
    )
    plan = plan_step(hidden, ["star"], msgspec.structs.replace(CONFIG.step, method=name))
    assert plan.notes == ()
    record = run_plan(hidden, plan, accelerator="cpu")
    assert record.method == METHODS[name]
    assert record.metrics["val"].miou_all is not None


def test_a_preallocated_head_has_room_for_so_many_classes_and_no_more(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, preallocated_classes=1)
    workspace = create_workspace(tmp_path / "work", msgspec.structs.replace(CONFIG, model=spec))
    run_plan(workspace, plan_base(workspace), accelerator="cpu")
    record = step(workspace, "star")
    assert load_model(workspace.step_folder(record.name), record).class_count == 8
    with pytest.raises(ConfigError, match="no room for the new classes"):
        step(workspace, "triangle")


def test_similarity_of_a_single_image_is_refused_before_training(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="compares the images of a batch"):
        step(workspace, "star", method="kd-similarity", batch_size=1)


def test_a_feature_term_beside_all_stages_frozen_is_refused(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="same features"):
        step(workspace, "star", method="kd-feature", freeze="stages:3")
    assert step(workspace, "star", method="kd-feature", freeze="stages:2").name == "01-star"


def test_a_known_class_under_another_spelling_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    new = write_folder(tmp_path / "new", "star", 2)
    classes = (new / "classes.txt").read_text()
    (new / "classes.txt").write_text(classes.replace("disk", "Disk"))
    with pytest.raises(ClassNameError, match="Disk"):
        plan_step(workspace, ["star"], data=DataConfig("folder", str(new), eval_split="", setup="overlapped"))


def test_evaluation_scores_what_training_recorded(trained: Workspace) -> None:
    record = trained.read_step("0")
    assert evaluate_step(trained, record) == record.metrics["val"]
    assert evaluate_step(trained, record, split="test").images == 6


@pytest.mark.slow
def test_a_step_becomes_a_bundle_that_is_whole(workspace: Workspace, tmp_path: Path) -> None:
    from edge_ilseg.export.request import ExportRequest

    base, record = workspace.read_step("0"), step(workspace, "star")
    request = ExportRequest(precisions=("fp32", "int8"))
    export_step(workspace, base, request, workspace.bundle_folder(base.name), calibration_count=4)
    out = tmp_path / "star.bundle"
    export_step(workspace, record, request, out, calibration_count=4)
    manifest = read_manifest(out)
    check_files(out, manifest)
    assert (manifest.step.id, manifest.step.parent_id) == (record.id, record.parent_id)
    assert manifest.step.encoder_frozen
    assert manifest.class_names == record.class_names
    assert manifest.old_count == 7
    calibration = manifest.model("onnxruntime", "int8").calibration
    assert calibration is not None
    assert set(calibration.image_ids) <= set(record.data.image_ids)
    assert len(calibration.image_ids) == 4
    expected = manifest.model("onnxruntime", "fp32").expected
    assert expected is not None
    assert expected.miou_all == pytest.approx(record.metrics["val"].miou_all, abs=1e-3)
    assert manifest.int8 is not None
    at_hand, _, scored = manifest.int8.attempts[-1].rows[:3]
    assert (at_hand.images, at_hand.count) == ("images at hand", len(record.data.image_ids))
    assert (scored.images, scored.count) == ("labelled images", 6)
    assert encoder_origins(out) == {"carried"}
    assert [row.encoder_changed_bytes for row in manifest.int8.delta] == [0, 0]


def encoder_origins(bundle: Path) -> set[str]:
    """Where the ranges of the encoder's tensors come from."""
    from edge_ilseg.calibration.ranges import read_ranges

    tensors = read_ranges(bundle / "ranges.json").tensors
    return {item.origin for name, item in tensors.items() if name.startswith("encoder.")}


def fast(**changes: object) -> ExportRequest:
    from edge_ilseg.export.request import ExportRequest

    settings: dict[str, object] = {"targets": ("onnx",), "precisions": ("int8",), "golden_count": 1}
    return ExportRequest(**{**settings, **changes})  # type: ignore[arg-type]


def test_int8_of_a_later_step_is_refused_until_its_parent_was_exported(workspace: Workspace, tmp_path: Path) -> None:
    record = step(workspace, "star")
    out = workspace.bundle_folder(record.name)
    with pytest.raises(
        ExportError, match=r"'01-star' needs the int8 ranges of its parent(.|\n)*export the parent step"
    ):
        export_step(workspace, record, fast(), out, calibration_count=4)
    assert not out.parent.exists()
    elsewhere = tmp_path / "elsewhere"
    export_step(workspace, workspace.read_step("0"), fast(), elsewhere, calibration_count=4)
    with pytest.raises(ExportError, match="no bundle of the parent step"):
        export_step(workspace, record, fast(), out, calibration_count=4)
    manifest = export_step(
        workspace, record, fast(max_old_drop_points=None), out, calibration_count=4, parent=elsewhere
    )
    assert manifest.int8 is not None
    assert encoder_origins(elsewhere) == {"measured"}
    assert encoder_origins(out) == {"carried"}


def test_the_parents_bundle_must_be_whole_and_the_parents(workspace: Workspace, tmp_path: Path) -> None:
    record, other = step(workspace, "star"), step(workspace, "star", name="other", parent_name="00-base")
    request = fast(precisions=("fp32",))
    for name in ("00-base", "01-other"):
        export_step(workspace, workspace.read_step(name), request, workspace.bundle_folder(name))
    with pytest.raises(ExportError, match=rf"not the bundle of the parent of step '01-star'(.|\n)*{other.id[:12]}"):
        export_step(workspace, record, fast(), tmp_path / "out", parent=workspace.bundle_folder("01-other"))
    with pytest.raises(ExportError, match="no ranges in"):
        export_step(workspace, record, fast(), tmp_path / "out")
    model = workspace.bundle_folder("00-base") / "models/onnx/model.fp32.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(BundleError, match="damaged"):
        export_step(workspace, record, fast(), tmp_path / "out")
    with pytest.raises(BundleError, match="no bundle"):
        export_step(workspace, record, fast(), tmp_path / "out", parent=tmp_path)
    assert not (tmp_path / "out").exists()


def test_weights_alone_need_neither_the_parents_bundle_nor_the_steps_images(
    workspace: Workspace, tmp_path: Path
) -> None:
    record = step(workspace, "star")
    gone = msgspec.structs.replace(DATA, options={**DATA.options, "train": 5})
    request = fast(ranges="weights-only", max_old_drop_points=None)
    manifest = export_step(workspace, record, request, tmp_path / "out", data=gone)
    assert "ranges.json" not in manifest.files
    assert manifest.int8 is not None
    assert [row.images for row in manifest.int8.attempts[0].rows] == ["labelled images"]


def test_a_damaged_bundle_of_the_parent_is_in_nobodys_way_without_int8(workspace: Workspace, tmp_path: Path) -> None:
    from edge_ilseg.export.request import ExportRequest

    record = step(workspace, "star")
    usual = workspace.bundle_folder("00-base")
    usual.mkdir(parents=True)
    (usual / "manifest.json").write_text("{")
    request = ExportRequest(targets=("onnx",), precisions=("fp32",), golden_count=1)
    assert export_step(workspace, record, request, tmp_path / "b").int8 is None
    with pytest.raises(BundleError):
        export_step(workspace, record, ExportRequest(precisions=("int8",)), tmp_path / "c", calibration_count=2)


def test_export_says_where_to_look_when_the_steps_images_are_gone(workspace: Workspace, tmp_path: Path) -> None:
    from edge_ilseg.export.request import ExportRequest

    record = workspace.read_step("0")
    data = msgspec.structs.replace(DATA, options={**DATA.options, "train": 5})
    with pytest.raises(DataError, match=r"learned from are gone(.|\n)*--data"):
        export_step(workspace, record, ExportRequest(precisions=("int8",)), tmp_path / "b", data=data)
    assert not (tmp_path / "b").exists()


def test_export_does_not_calibrate_on_other_images_of_the_same_name(workspace: Workspace, tmp_path: Path) -> None:
    from edge_ilseg.export.request import ExportRequest

    record = workspace.read_step("0")
    data = msgspec.structs.replace(DATA, options={**DATA.options, "seed": 9})
    with pytest.raises(DataError, match=r"not those that step 00-base learned from(.|\n)*--data"):
        export_step(workspace, record, ExportRequest(precisions=("int8",)), tmp_path / "b", data=data)
    assert not (tmp_path / "b").exists()


def test_labels_are_checked_against_the_image(tmp_path: Path) -> None:
    for sub in ("images", "masks"):
        (tmp_path / sub).mkdir()
    (tmp_path / "classes.txt").write_text("background\nstar\n")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "masks" / "a.png")
    (tmp_path / "train.txt").write_text("a\n")
    config = Config(DataConfig("folder", str(tmp_path)), ClassesConfig(("star",)), SPEC, "none")
    with pytest.raises(DataError, match="7"):
        plan_base(create_workspace(tmp_path / "work", config))
