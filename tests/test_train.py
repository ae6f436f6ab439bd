"""The training loop: what is frozen stays to the bit, what is not finite stops it, and a seed decides everything."""

from __future__ import annotations

import copy

import msgspec
import numpy as np
import pytest
import torch

from edge_ilseg.config import TrainConfig
from edge_ilseg.data.loader import TrainingSamples, epoch_order, training_batches
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.step_view import StepView
from edge_ilseg.errors import TrainingError
from edge_ilseg.methods import METHODS, Method, resolve_method
from edge_ilseg.models.freezing import encoder_sha256
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.progress import no_progress
from edge_ilseg.scenario import label_lookup
from edge_ilseg.schedule import Schedule, scheduled_rate
from edge_ilseg.terms import StepFacts
from edge_ilseg.train import make_optimizer, train

SPEC = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=32, input_width_px=32)
FACTS = StepFacts(old_count=8, background=0)
SETTINGS = TrainConfig(iterations=4, batch_size=2, learning_rate=0.05, batch_norm="eval")


@pytest.fixture(scope="module")
def view() -> StepView:
    dataset = Shapes(train=12, height_px=32, width_px=32)
    classes = dataset.info.classes
    lookup = label_lookup("sequential", classes, "background", old=classes[:-1], new=classes[-1:])
    return StepView(dataset, dataset.ids("train"), lookup)


def make_student(spec: ModelSpec = SPEC) -> tuple[SegmentationModel, SegmentationModel]:
    torch.manual_seed(1)
    teacher = build_model(spec, (8,))
    student = copy.deepcopy(teacher)
    student.grow(1)
    return student, teacher


def run(view: StepView, method: Method, settings: TrainConfig = SETTINGS, spec: ModelSpec = SPEC) -> SegmentationModel:
    student, teacher = make_student(spec)
    train(
        student,
        training_batches(view, spec, settings),
        settings,
        teacher=teacher,
        method=method,
        facts=FACTS,
        accelerator="cpu",
        progress=no_progress,
    )
    return student


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.freeze == "encoder"])
def test_a_frozen_encoder_is_bit_identical_after_the_step(view: StepView, name: str, batch_norm: str) -> None:
    _, teacher = make_student()
    settings = TrainConfig(iterations=4, batch_size=2, weight_decay=0.1, batch_norm=batch_norm)  # type: ignore[arg-type]
    student = run(view, METHODS[name], settings)
    for key, tensor in teacher.encoder.state_dict().items():
        assert torch.equal(tensor, student.encoder.state_dict()[key]), key
    assert encoder_sha256(student) == encoder_sha256(teacher)
    decoder = student.decoder.state_dict()
    assert any(not torch.equal(tensor, decoder[key]) for key, tensor in teacher.decoder.state_dict().items())


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_real_encoder_that_is_frozen_is_bit_identical_too(view: StepView, backbone: str, precision: str) -> None:
    spec = msgspec.structs.replace(SPEC, backbone=backbone)
    settings = TrainConfig(iterations=2, batch_size=2, weight_decay=0.1, batch_norm="train", precision=precision)  # type: ignore[arg-type]
    _, teacher = make_student(spec)
    student = run(view, METHODS["freeze+kd-output"], settings, spec)
    for key, tensor in teacher.encoder.state_dict().items():
        assert torch.equal(tensor, student.encoder.state_dict()[key]), key
    assert any("running_var" in key for key in teacher.encoder.state_dict())
    decoder = student.decoder.state_dict()
    assert any(not torch.equal(tensor, decoder[key]) for key, tensor in teacher.decoder.state_dict().items())


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.freeze == "none"])
def test_an_encoder_that_is_not_frozen_moves(view: StepView, name: str) -> None:
    _, teacher = make_student()
    assert encoder_sha256(run(view, METHODS[name])) != encoder_sha256(teacher)


def test_features_computed_once_give_the_same_weights_as_two_networks(view: StepView) -> None:
    shared = run(view, METHODS["freeze+kd-output"])
    twice = run(view, resolve_method("kd-output", freeze=f"stages:{len(shared.encoder.stages)}"))
    for key, tensor in shared.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[key]), key


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(view: StepView) -> None:
    first, again = run(view, METHODS["kd-output"]), run(view, METHODS["kd-output"])
    other = run(view, METHODS["kd-output"], TrainConfig(iterations=4, batch_size=2, batch_norm="eval", seed=1))
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert not torch.equal(first.decoder.projection.conv.weight, other.decoder.projection.conv.weight)


def test_distillation_holds_the_students_old_logits_nearer_to_the_teachers(view: StepView) -> None:
    settings = TrainConfig(iterations=25, batch_size=4, learning_rate=0.05, batch_norm="eval")
    _, teacher = make_student()
    image_HWC, _ = view.read(view.image_ids[0])
    images_NCHW = normalize(torch.from_numpy(image_HWC)[None], SPEC)
    strong = resolve_method("kd-output", losses={"kd_output": 20.0})
    distance = {}
    for method in (METHODS["finetune"], strong):
        student = run(view, method, settings)
        with torch.no_grad():
            before = teacher.eval()(images_NCHW).logits_NCHW.softmax(1)
            after = student.eval()(images_NCHW).logits_NCHW.softmax(1)[:, :8]
        distance[method.name] = (after - before).abs().mean().item()
    assert distance["kd-output"] < 0.5 * distance["finetune"]


def test_a_loss_that_is_not_finite_stops_before_the_optimiser_step(view: StepView) -> None:
    student, teacher = make_student()
    with torch.no_grad():
        student.classifiers[0].convs[0].weight.fill_(float("nan"))
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(TrainingError, match="iteration 0"):
        train(
            student,
            training_batches(view, SPEC, SETTINGS),
            SETTINGS,
            teacher=teacher,
            method=METHODS["finetune"],
            facts=FACTS,
            accelerator="cpu",
            progress=no_progress,
        )
    for key, tensor in student.state_dict().items():
        assert torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(before[key])), key


def test_weight_decay_is_on_convolution_weights_alone() -> None:
    student, _ = make_student()
    optimizer = make_optimizer(student, TrainConfig(weight_decay=0.1, decoder_rate_factor=10.0, learning_rate=0.01))
    for group in optimizer.param_groups:
        assert {parameter.ndim == 4 for parameter in group["params"]} == {group["weight_decay"] == 0.1}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.1}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(student.parameters()))


def test_the_schedule_starts_at_the_peak_and_ends_near_the_end() -> None:
    settings = TrainConfig(iterations=100, learning_rate=0.1, learning_rate_end=0.01)
    rates = [scheduled_rate(0.1, settings, Schedule(100).share(i)) for i in range(100)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[50] == pytest.approx(0.01 + 0.09 * 0.5**0.9)
    assert 0.01 < rates[-1] < 0.012


def test_every_image_is_seen_once_before_any_is_seen_twice() -> None:
    assert sorted(epoch_order(12, 0, 0)) == sorted(epoch_order(12, 0, 1)) == list(range(12))
    assert not np.array_equal(epoch_order(12, 0, 0), epoch_order(12, 0, 1))


def test_samples_do_not_depend_on_the_number_of_workers(view: StepView) -> None:
    for (images, labels), (images_2, labels_2) in zip(
        training_batches(view, SPEC, SETTINGS), training_batches(view, SPEC, SETTINGS, workers=2), strict=True
    ):
        assert torch.equal(images, images_2)
        assert torch.equal(labels, labels_2)


def test_the_cache_of_decoded_images_changes_nothing(view: StepView, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = TrainingSamples(view, SPEC, SETTINGS)
    monkeypatch.setattr("edge_ilseg.data.loader.DECODED_CACHE_BYTES", 0)
    uncached = TrainingSamples(view, SPEC, SETTINGS)
    for k in (0, 3, 0):
        assert torch.equal(cached[k][0], uncached[k][0])


def test_normalisation_is_that_of_the_backbone() -> None:
    image_NHWC = torch.tensor([[[[127, 255, 0]]]], dtype=torch.uint8)
    assert normalize(image_NHWC, SPEC).flatten().tolist() == pytest.approx([0.0, 1.0, -127 / 128])
