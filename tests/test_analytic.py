"""A head in closed form, the sums that it is solved from, and steps that are taken with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edge_ilseg.analytic import LOGIT_SCALE, add_moments, collect_statistics, fit_head, install_head
from edge_ilseg.analytic_step import collect_again, hidden_channel
from edge_ilseg.checkpoint import StepRecord, load_model
from edge_ilseg.cli import run as run_command
from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
from edge_ilseg.data import open_data
from edge_ilseg.data.step_view import StepView
from edge_ilseg.errors import ConfigError, DataError, TrainingError, WorkspaceError
from edge_ilseg.feature_statistics import (
    STATISTICS_NAME,
    FeatureStatistics,
    merge,
    pack,
    read_header,
    read_statistics,
    statistics_bytes,
    unpack,
)
from edge_ilseg.methods import METHODS, resolve_method
from edge_ilseg.models.freezing import trunk_sha256
from edge_ilseg.models.segmentation import build_model, with_skip_classifier
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.pipeline import run_plan
from edge_ilseg.planning import plan_base, plan_step
from edge_ilseg.step_images import step_view_again
from edge_ilseg.workspace import Workspace, create_workspace
from tests.fakes import random_images, small_model

DATA = DataConfig("shapes", options={"train": 80, "val": 4, "test": 4, "height_px": 48, "width_px": 48})
BASE, NEW = ("disk", "square", "ring"), ("cross", "bar", "crescent", "star", "triangle")
SPEC = ModelSpec(backbone="tiny", decoder_channels=8, input_height_px=48, input_width_px=48)
CONFIG = Config(
    data=DATA,
    classes=ClassesConfig(BASE),
    model=SPEC,
    weights="none",
    train=TrainConfig(iterations=8, batch_size=4),
    step=StepConfig(iterations=2, batch_size=2, method="analytic"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with step 0; never written to by a test."""
    workspace = create_workspace(tmp_path_factory.mktemp("analytic") / "work", CONFIG)
    run_plan(workspace, plan_base(workspace), accelerator="cpu")
    return workspace


@pytest.fixture
def workspace(trained: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(trained.root, tmp_path / "work")
    return Workspace(tmp_path / "work", trained.config)


def step(workspace: Workspace, *names: str, name: str | None = None, **settings: object) -> StepRecord:
    changed = msgspec.structs.replace(CONFIG.step, **settings)
    return run_plan(workspace, plan_step(workspace, names, changed, name=name), accelerator="cpu")


def samples(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features of pixels, P x d, of very different scales, and their classes, unevenly many."""
    rng = np.random.default_rng(seed)
    labels_P = rng.choice(3, size=400, p=[0.7, 0.25, 0.05])
    x_Pd = rng.normal(size=(400, 5)) + 0.8 * np.eye(3, 5)[labels_P]
    return x_Pd * [1.0, 100.0, 0.01, 1.0, 1.0] + [0.0, 3.0, 1.0, -2.0, 0.0], labels_P


def sums(x_Pd: NDArray[np.float64], labels_P: NDArray[np.int64], count: int = 3) -> FeatureStatistics:
    side = x_Pd.shape[1] + 1
    sums_CDD = torch.zeros(count, side, side, dtype=torch.float64)
    features_Dhw = torch.from_numpy(x_Pd.T.reshape(side - 1, 20, -1).copy())
    add_moments(sums_CDD, features_Dhw, torch.from_numpy(labels_P.astype(np.uint8).reshape(20, -1)))
    return FeatureStatistics(tuple("abcdefgh"[:count]), "trunk", 1, pack(sums_CDD.numpy()))


def weights_of(workspace: Workspace, record: StepRecord) -> NDArray[np.float32]:
    """All rows of both classifiers, in channel order, with the bias."""
    model = load_model(workspace.step_folder(record.name), record)
    rows = [torch.cat([conv.weight.flatten(1) for conv in item.convs]) for item in model.classifiers]
    bias = torch.cat([conv.bias for conv in model.classifiers[0].convs if conv.bias is not None])
    return torch.cat([*rows, bias[:, None]], dim=1).detach().numpy()


@pytest.mark.parametrize("balance", [0.0, 0.4, 1.0])
def test_the_closed_form_is_weighted_ridge_regression_on_standardised_features(balance: float) -> None:
    x_Pd, labels_P = samples()
    weight_Cd, bias_C = fit_head(sums(x_Pd, labels_P), ridge=0.05, balance=balance)
    w_P = np.bincount(labels_P)[labels_P] ** -balance
    w_P /= w_P.sum()
    mean_d = w_P @ x_Pd
    deviation_d = np.sqrt(w_P @ (x_Pd - mean_d) ** 2)
    rows = np.sqrt(w_P)[:, None] * np.hstack([(x_Pd - mean_d) / deviation_d, np.ones((len(x_Pd), 1))])
    penalty = np.sqrt(0.05) * np.eye(5, 6)  # none on the intercept
    target = np.vstack([np.sqrt(w_P)[:, None] * np.eye(3)[labels_P], np.zeros((5, 3))])
    solution = np.linalg.lstsq(np.vstack([rows, penalty]), target)[0]
    np.testing.assert_allclose(weight_Cd, (solution[:5] / deviation_d[:, None]).T, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(bias_C, solution[5] - weight_Cd @ mean_d, rtol=1e-8, atol=1e-12)


def test_the_scale_of_a_feature_does_not_count() -> None:
    x_Pd, labels_P = samples()
    scale_d = np.array([1.0, 1e-4, 1e3, 7.0, 1.0])
    weight_Cd, bias_C = fit_head(sums(x_Pd, labels_P), 0.01, 0.4)
    scaled_Cd, scaled_bias_C = fit_head(sums(x_Pd * scale_d, labels_P), 0.01, 0.4)
    np.testing.assert_allclose(scaled_Cd * scale_d, weight_Cd, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(scaled_bias_C, bias_C, rtol=1e-7)


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    x_Pd, labels_P = samples()
    x_Pd[:, 2] = 3.1
    weight_Cd, bias_C = fit_head(sums(x_Pd, labels_P), 0.01, 0.4)
    assert not weight_Cd[:, 2].any()
    assert np.isfinite(bias_C).all()


def test_a_class_without_a_pixel_and_sums_that_are_not_finite_are_refused() -> None:
    x_Pd, labels_P = samples()
    with pytest.raises(TrainingError, match=r"no pixel(.|\n)*found: +d:"):
        fit_head(sums(x_Pd, labels_P, count=4), 0.01, 0.4)
    with pytest.raises(TrainingError, match="do not vary"):
        fit_head(sums(np.ones_like(x_Pd), labels_P), 0.01, 0.4)
    x_Pd[0, 0] = np.inf
    with pytest.raises(TrainingError, match="not finite"):
        fit_head(sums(x_Pd, labels_P), 0.01, 0.4)


def test_sums_of_two_halves_are_those_of_the_whole_whatever_the_second_half_adds() -> None:
    x_Pd, labels_P = samples()
    order = np.concatenate([np.flatnonzero(labels_P < 2), np.flatnonzero(labels_P == 2)])
    x_Pd, labels_P = x_Pd[order], labels_P[order]
    first, second = sums(x_Pd[:200], labels_P[:200], count=2), sums(x_Pd[200:], labels_P[200:])
    both, whole = merge(first, second), sums(x_Pd, labels_P)
    np.testing.assert_allclose(both.moments_CP, whole.moments_CP, rtol=1e-12, atol=1e-9)
    assert (both.classes, both.images, both.pixels_C.tolist()) == (whole.classes, 2, np.bincount(labels_P).tolist())
    np.testing.assert_allclose(whole.sums_Cd[1], x_Pd[labels_P == 1].sum(axis=0))
    np.testing.assert_allclose(unpack(whole.moments_CP[2])[:-1, :-1], x_Pd[labels_P == 2].T @ x_Pd[labels_P == 2])


def test_sums_over_other_features_or_of_other_classes_are_not_added_up() -> None:
    first = sums(*samples())
    with pytest.raises(WorkspaceError, match="features of another network"):
        merge(msgspec.structs.replace(first, trunk_sha256="another"), first)
    with pytest.raises(WorkspaceError, match=r"of other classes(.|\n)*edge-ilseg statistics"):
        merge(msgspec.structs.replace(first, classes=("a", "c", "b")), first)


def test_the_file_of_statistics_comes_back_as_it_was_and_a_changed_byte_is_found(tmp_path: Path) -> None:
    written = sums(*samples())
    path = tmp_path / STATISTICS_NAME
    assert read_statistics(tmp_path) is None
    path.write_bytes(statistics_bytes(written))
    read = read_statistics(tmp_path)
    assert read is not None
    assert np.array_equal(read.moments_CP, written.moments_CP)
    assert (read.classes, read.trunk_sha256, read.images, read.features) == (("a", "b", "c"), "trunk", 1, 5)
    data = path.read_bytes()
    for damaged in (b"", data[:6], data[:100], data[:-1], data[:-1] + b"\x41"):
        path.write_bytes(damaged)
        with pytest.raises(WorkspaceError, match=r"statistics of the step are damaged(.|\n)*edge-ilseg statistics"):
            read_statistics(tmp_path)


def test_statistics_of_another_version_are_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / STATISTICS_NAME
    path.write_bytes(statistics_bytes(sums(*samples())))
    header = read_header(tmp_path)
    assert header is not None
    text = msgspec.json.encode(msgspec.structs.replace(header, format_version=2)).decode()
    save_file(load_file(path), path, metadata={"statistics": text})
    with pytest.raises(WorkspaceError, match=r"does not read(.|\n)*version 2(.|\n)*version 1"):
        read_header(tmp_path)


def test_the_sums_are_over_what_the_classifiers_read_and_mirrored_images_count() -> None:
    """The network's own logits on the grid, and a fitted head put in, agree with the sums."""
    model = with_skip_classifier(small_model((4,)))
    dataset = open_data(DATA)
    ids = dataset.ids("train")[:6]
    lookup = np.full(256, 255, dtype=np.uint8)
    lookup[:4] = range(4)
    view = StepView(dataset, tuple(ids), lookup)
    once = collect_statistics(model, view, tuple("abcd"), flip=False)
    both = collect_statistics(model, view, tuple("abcd"), flip=True)
    assert both.pixels_C.sum() > 1.9 * once.pixels_C.sum()
    assert once.features == model.encoder.out_channels + 16
    without = collect_statistics(model, view, tuple("abcd"), flip=False, hidden_channel=0)
    assert without.pixels_C[0] == 0
    assert np.array_equal(without.moments_CP[1:], once.moments_CP[1:])
    weight_Cd, bias_C = fit_head(once, 0.01, 0.4)
    install_head(model, weight_Cd, bias_C)
    trunk = model.trunk(torch.zeros(1, 3, 48, 64), 3, with_body=True)
    assert trunk.body is not None
    features_d = torch.cat([trunk.x_NCHW, trunk.body.merged_NCHW], dim=1)[0, :, 1, 1].double().detach().numpy()
    logits_C = model.decoder.classify(trunk.body)[0][0, :, 1, 1].detach().numpy()
    np.testing.assert_allclose(logits_C, LOGIT_SCALE * (weight_Cd @ features_d + bias_C), rtol=1e-4, atol=1e-4)


def test_a_chain_of_five_steps_gives_the_head_of_one_step_and_the_trunk_stays(workspace: Workspace) -> None:
    base = workspace.read_step("0")
    images = [set(base.data.image_ids)]
    for name in NEW:
        last = step(workspace, name)
        images.append(set(last.data.image_ids))
    other = Workspace(workspace.root.with_name("once"), workspace.config)
    shutil.copytree(workspace.step_folder("00-base"), other.step_folder("00-base"))
    once = step(other, *NEW)
    # Both have seen the same images: those of the base and all that show a new class.
    assert set().union(*images[1:]) == set(once.data.image_ids)
    chained, whole = weights_of(workspace, last), weights_of(other, once)
    assert np.abs(chained - whole).max() < 1e-6 * np.abs(whole).max()
    assert (last.training.iterations, last.encoder_sha256) == (0, base.encoder_sha256)
    models = [load_model(w.step_folder(r.name), r) for w, r in ((workspace, base), (workspace, last))]
    assert trunk_sha256(models[0]) == trunk_sha256(models[1])
    assert (last.model.skip_classifier, base.model.skip_classifier) == (True, False)
    assert not (workspace.step_folder(last.name) / "training.csv").exists()
    header = read_header(workspace.step_folder(last.name))
    assert header is not None
    assert (header.classes, header.images) == (last.class_names, sum(len(ids) for ids in images))


def test_a_step_that_moves_the_trunk_leaves_no_statistics_and_one_that_does_not_leaves_its_own(
    workspace: Workspace,
) -> None:
    step(workspace, "cross", method="freeze", freeze="all_but_head")
    assert read_header(workspace.step_folder("01-cross")) is not None
    analytic = step(workspace, "bar")
    after = step(workspace, "star", method="kd-output")
    assert after.model.skip_classifier
    assert len(weights_of(workspace, after)) == len(weights_of(workspace, analytic)) + 1
    assert read_header(workspace.step_folder(after.name)) is None
    with pytest.raises(WorkspaceError, match=r"no statistics to go on from(.|\n)*analytic(.|\n)*edge-ilseg statistics"):
        plan_step(workspace, ["triangle"], CONFIG.step)
    with pytest.raises(WorkspaceError, match="features of another network"):
        collect_again(workspace, after)


def test_statistics_may_be_left_out_deleted_and_collected_again_from_the_same_images(workspace: Workspace) -> None:
    path = workspace.step_folder("00-base") / STATISTICS_NAME
    before, identity = path.read_bytes(), workspace.read_step("0").id
    with pytest.raises(WorkspaceError, match="has statistics already"):
        collect_again(workspace, workspace.read_step("0"))
    path.unlink()
    other = msgspec.structs.replace(DATA, options={**DATA.options, "seed": 9})
    with pytest.raises(DataError, match="not those that step 00-base learned from"):
        collect_again(workspace, workspace.read_step("0"), data=other)
    assert run_command(["statistics", str(workspace.root), "--step", "0", "--accelerator", "cpu"]) == 0
    assert path.read_bytes() == before
    assert workspace.read_step("0").id == identity
    record = step(workspace, "star", statistics=False)
    assert read_header(workspace.step_folder(record.name)) is None
    with pytest.raises(WorkspaceError, match="statistics = false"):
        plan_step(workspace, ["bar"], CONFIG.step)


def test_statistics_of_another_network_are_found_before_a_head_is_fitted(workspace: Workspace) -> None:
    folder = workspace.step_folder("00-base")
    found = read_statistics(folder)
    assert found is not None
    (folder / STATISTICS_NAME).write_bytes(statistics_bytes(msgspec.structs.replace(found, trunk_sha256="other")))
    plan = plan_step(workspace, ["star"], CONFIG.step)
    with pytest.raises(WorkspaceError, match="features of another network"):
        run_plan(workspace, plan, accelerator="cpu")
    assert workspace.step_names() == ("00-base",)
    (folder / STATISTICS_NAME).write_bytes(statistics_bytes(msgspec.structs.replace(found, classes=tuple("abcd"))))
    with pytest.raises(WorkspaceError, match="of other classes"):
        plan_step(workspace, ["star"], CONFIG.step)


def test_background_that_may_hide_old_classes_is_left_out(workspace: Workspace) -> None:
    assert hidden_channel("sequential", 4, 0) is None
    assert hidden_channel("overlapped", 0, 0) is None
    assert hidden_channel("overlapped", 4, 0) == 0
    assert hidden_channel("disjoint", 4, None) is None
    data = msgspec.structs.replace(DATA, setup="disjoint")
    hidden = Workspace(workspace.root, msgspec.structs.replace(workspace.config, data=data))
    base = read_statistics(workspace.step_folder("00-base"))
    record = step(hidden, "star")
    after = read_statistics(workspace.step_folder(record.name))
    assert base is not None
    assert after is not None
    assert np.array_equal(after.moments_CP[:4], base.moments_CP)
    assert after.pixels_C[4] > 0


def test_a_branch_head_is_refused_before_anything_is_read_of_it(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, head="deeplab_v2")
    workspace = create_workspace(tmp_path / "work", msgspec.structs.replace(CONFIG, model=spec))
    record = run_plan(workspace, plan_base(workspace), accelerator="cpu")
    assert read_header(workspace.step_folder("00-base")) is None
    with pytest.raises(ConfigError, match="no closed form"):
        plan_step(workspace, ["star"], CONFIG.step)
    with pytest.raises(ConfigError, match="no closed form"):
        collect_again(workspace, record)
    with pytest.raises(ConfigError, match="no second classifier"):
        build_model(msgspec.structs.replace(spec, skip_classifier=True), (3,))


@pytest.mark.parametrize(
    "change",
    [
        {"freeze": "encoder"},
        {"losses": {"kd_output": 1.0}},
        {"logit_adjustment": 0.5},
        {"head_init": "scaled"},
        {"new_share": 0.7},
    ],
)
def test_what_only_training_could_use_is_refused_beside_a_closed_form(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="closed form"):
        resolve_method("analytic", **change)  # type: ignore[arg-type]
    assert resolve_method("analytic", ridge=0.1, balance=0.0).ridge == 0.1
    by_hand = resolve_method("freeze", freeze="all_but_head", head_fit="closed-form")
    assert (by_hand.is_closed_form, METHODS["freeze"].is_closed_form) == (True, False)


def test_cached_views_and_several_devices_are_refused(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match="augment_views"):
        plan_step(workspace, ["star"], msgspec.structs.replace(CONFIG.step, augment_views=2))
    with pytest.raises(TrainingError, match=r"one process(.|\n)*--devices"):
        run_plan(workspace, plan_step(workspace, ["star"], CONFIG.step), accelerator="cpu", devices=2)


def test_a_second_classifier_of_weight_0_changes_no_logit_and_grows_with_the_first() -> None:
    model = small_model((3,))
    images_NCHW = torch.from_numpy(random_images(2)).permute(0, 3, 1, 2) / 128 - 1
    changed = with_skip_classifier(model)
    assert torch.equal(changed(images_NCHW).logits_NCHW, model(images_NCHW).logits_NCHW)
    assert changed.spec.skip_classifier
    assert with_skip_classifier(changed) is changed
    for conv in changed.classifiers[1].convs:
        torch.nn.init.normal_(conv.weight)
    before = changed.decoder(changed.encode(images_NCHW)[-1])[0]
    changed.grow(2)
    after = changed.decoder(changed.encode(images_NCHW)[-1])[0]
    assert torch.equal(after[:, :3], before)
    assert [item.class_counts for item in changed.classifiers] == [(3, 2), (3, 2)]
    whole, tail = changed(images_NCHW), changed.tail(changed.trunk(images_NCHW, 3, with_body=True))
    assert torch.equal(whole.logits_NCHW, tail.logits_NCHW)


def test_the_command_line_learns_an_analytic_step(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["step", str(workspace.root), "--add-classes", "star", "--method", "analytic", "--set", "ridge=0.1"]
    assert run_command([*command, "--accelerator", "cpu", "--max-minutes", "1"]) == 0
    told = capsys.readouterr()
    assert "one pass and a closed form, method analytic" in told.err
    assert "fewer" not in told.out
    record = workspace.read_step("1")
    assert record.method == msgspec.structs.replace(METHODS["analytic"], ridge=0.1)
    assert record.training_seconds > 0


def test_scenarios_compare_the_method_like_any_other(tmp_path: Path) -> None:
    from edge_ilseg.scenario_plan import plan_scenario
    from edge_ilseg.scenario_run import run_scenario

    plan = plan_scenario(CONFIG, "6+1x2", class_order="listed")
    for _ in range(2):  # the second time everything is there
        run_scenario(tmp_path, plan, ["analytic"], [0], joint=False, accelerator="cpu")
    record = Workspace(tmp_path / "seed-0", CONFIG).read_step("02-analytic")
    assert record.training.iterations == 0


def test_a_step_finds_its_own_view_again(workspace: Workspace) -> None:
    plan = plan_step(workspace, ["star"], CONFIG.step)
    view = step_view_again(run_plan(workspace, plan, accelerator="cpu"), open_data(DATA))
    assert view.image_ids == plan.view.image_ids
    assert np.array_equal(view.lookup, plan.view.lookup)


def test_a_second_classifier_is_exported_and_computes_the_same(tmp_path: Path) -> None:
    import onnxruntime

    from edge_ilseg.export.float_onnx import deployed_model, write_float_onnx

    model = with_skip_classifier(small_model((3,)))
    model.grow(2)
    for conv in model.classifiers[1].convs:
        torch.nn.init.normal_(conv.weight)
    write_float_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    image_NHWC = random_images(1)
    logits_NCHW = session.run(["logits"], {"image": image_NHWC})[0]
    expected_NCHW = deployed_model(model)(torch.from_numpy(image_NHWC))[0].numpy()
    np.testing.assert_allclose(logits_NCHW, expected_NCHW, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_analytic_step_after_a_plain_parent_becomes_an_int8_bundle_with_the_parents_encoder(
    workspace: Workspace,
) -> None:
    from edge_ilseg.export.request import ExportRequest
    from edge_ilseg.pipeline import export_step

    how = {"targets": ("onnx",), "precisions": ("fp32", "int8"), "golden_count": 1}
    request = ExportRequest(**how, max_old_drop_points=None)  # type: ignore[arg-type]
    for record in (workspace.read_step("0"), step(workspace, "star"), step(workspace, "bar")):
        manifest = export_step(workspace, record, request, workspace.bundle_folder(record.name), calibration_count=8)
    assert manifest.step.encoder_frozen
    assert manifest.int8 is not None
    assert [row.encoder_changed_bytes for row in manifest.int8.delta] == [0]
    assert all(row.agreement > 0.8 for row in manifest.parity)
