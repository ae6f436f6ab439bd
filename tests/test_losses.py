"""Loss terms against golden numbers (float64), plain-loop versions, gradients and hand cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_ilseg.errors import TrainingError
from edge_ilseg.losses import (
    DISTILLATION_TERMS,
    LossInputs,
    check_finite,
    cross_entropy,
    distillation_loss,
    kd_feature,
    kd_feature_plain,
    kd_output,
)
from edge_ilseg.methods import TERM_NAMES

RELATIVE = 1e-9


def wave(function: object, factor: float, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * function(factor * k).reshape(shape)  # type: ignore[operator]


@pytest.fixture
def new_logits() -> Tensor:
    return wave(torch.sin, 0.1, (2, 7, 16, 16), 2.0)


@pytest.fixture
def old_logits() -> Tensor:
    return wave(torch.cos, 0.07, (2, 5, 16, 16), 2.0)


@pytest.fixture
def labels() -> Tensor:
    k = torch.arange(2 * 16 * 16)
    labels = (3 * k) % 7
    labels[k % 11 == 0] = 255
    return labels.reshape(2, 16, 16)


def test_cross_entropy_equals_the_golden_number(new_logits: Tensor, labels: Tensor) -> None:
    assert cross_entropy(new_logits, labels).item() == pytest.approx(2.4890897523, rel=RELATIVE)


def test_output_distillation_equals_the_golden_numbers(new_logits: Tensor, old_logits: Tensor, labels: Tensor) -> None:
    as_coded = kd_output(new_logits, old_logits, labels)
    renormalised = kd_output(new_logits, old_logits, labels, softmax="old")
    all_512_pixels = kd_output(new_logits, old_logits, torch.zeros_like(labels), mask="all")
    assert as_coded.item() == pytest.approx(2.3914253364, rel=RELATIVE)
    assert renormalised.item() == pytest.approx(1.8454059519, rel=RELATIVE)
    assert all_512_pixels.item() == pytest.approx(2.4100670725, rel=RELATIVE)


def test_feature_distillation_equals_the_golden_numbers() -> None:
    teacher, student = wave(torch.cos, 0.05, (2, 6, 16, 16)), wave(torch.sin, 0.05, (2, 6, 16, 16))
    assert kd_feature_plain(student, teacher).item() == pytest.approx(0.9991827080, rel=RELATIVE)
    assert kd_feature(student, teacher).item() == pytest.approx(2.0023689820, rel=RELATIVE)


def loop_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    total, count = 0.0, 0
    for n in range(logits.shape[0]):
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                label = int(labels[n, y, x])
                if label != 255:
                    z = [float(v) for v in logits[n, :, y, x]]
                    total += math.log(sum(math.exp(v) for v in z)) - z[label]
                    count += 1
    return total / max(count, 1)


def loop_kd_output(student: Tensor, teacher: Tensor, labels: Tensor, softmax: str, mask: str) -> float:
    old = teacher.shape[1]
    total, count = 0.0, 0
    for n in range(student.shape[0]):
        for y in range(student.shape[2]):
            for x in range(student.shape[3]):
                label = int(labels[n, y, x])
                if label == 255 or (mask == "old_pixels" and label >= old):
                    continue
                s = [float(v) for v in student[n, :, y, x]]
                t = [math.exp(float(v)) for v in teacher[n, :, y, x]]
                s = s if softmax == "all" else s[:old]
                log_norm = math.log(sum(math.exp(v) for v in s))
                total -= sum(t[c] / sum(t) * (s[c] - log_norm) for c in range(old))
                count += 1
    return total / max(count, 1)


@pytest.mark.parametrize("softmax", ["all", "old"])
@pytest.mark.parametrize("mask", ["old_pixels", "all"])
def test_losses_equal_their_plain_loops(softmax: str, mask: str) -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 3, 5), generator=generator)
    labels[0, 0, :2] = 255
    assert cross_entropy(student, labels).item() == pytest.approx(loop_cross_entropy(student, labels), rel=1e-12)
    found = kd_output(student, teacher, labels, softmax=softmax, mask=mask)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(loop_kd_output(student, teacher, labels, softmax, mask), rel=1e-12)


def test_gradients_are_those_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(1, 4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 2, 2, 3, generator=generator, dtype=torch.float64)
    same_shape = torch.randn(1, 4, 2, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[[0, 1, 2], [3, 255, 1]]])
    assert torch.autograd.gradcheck(lambda s: cross_entropy(s, labels), student)
    assert torch.autograd.gradcheck(lambda s: kd_output(s, teacher, labels), student)
    assert torch.autograd.gradcheck(lambda s: kd_output(s, teacher, labels, softmax="old", mask="all"), student)
    assert torch.autograd.gradcheck(lambda s: kd_feature(s, same_shape), student)
    assert torch.autograd.gradcheck(lambda s: kd_feature_plain(s, same_shape), student)


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = torch.randn(1, 3, 2, 2, requires_grad=True), torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    (kd_output(student, teacher, labels) + kd_feature(student, teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_an_empty_mask_gives_zero_with_a_graph() -> None:
    student = torch.randn(1, 4, 2, 2, requires_grad=True)
    only_new = torch.full((1, 2, 2), 3)
    all_void = torch.full((1, 2, 2), 255)
    for loss in (
        cross_entropy(student, all_void),
        kd_output(student, torch.randn(1, 2, 2, 2), only_new),
        kd_output(student, torch.randn(1, 2, 2, 2), all_void, mask="all"),
    ):
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert torch.equal(gradient, torch.zeros_like(student))


def test_one_class_and_one_pixel_are_enough() -> None:
    logits = torch.zeros(1, 1, 1, 1)
    assert cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.long)).item() == 0.0
    student = torch.tensor([math.log(3.0), 0.0]).reshape(1, 2, 1, 1)
    found = kd_output(student, logits, torch.zeros(1, 1, 1, dtype=torch.long))
    assert found.item() == pytest.approx(-math.log(0.75))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_near(dtype: torch.dtype) -> None:
    student, teacher = wave(torch.sin, 0.1, (2, 7, 8, 8), 2.0), wave(torch.cos, 0.07, (2, 5, 8, 8), 2.0)
    labels = torch.arange(128).reshape(2, 8, 8) % 7
    exact = kd_output(student, teacher, labels).item()
    assert kd_output(student.to(dtype), teacher.to(dtype), labels).item() == pytest.approx(exact, rel=2e-2)


def test_the_feature_loss_does_not_depend_on_the_scale_of_the_features() -> None:
    teacher, student = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert kd_feature(1000 * student, 1000 * teacher).item() == pytest.approx(kd_feature(student, teacher).item(), 1e-4)


def test_a_silent_teacher_does_not_make_the_feature_loss_nan() -> None:
    assert torch.isfinite(kd_feature(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)))


def test_the_registry_and_the_methods_know_the_same_terms() -> None:
    assert tuple(DISTILLATION_TERMS) == TERM_NAMES


def test_weights_scale_their_terms_and_zero_switches_a_term_off() -> None:
    inputs = LossInputs(
        student_logits_NCHW=torch.randn(1, 3, 2, 2),
        teacher_logits_NKHW=torch.randn(1, 2, 2, 2),
        student_features_NCHW=torch.randn(1, 4, 2, 2),
        teacher_features_NCHW=torch.randn(1, 4, 2, 2),
        labels_NHW=torch.zeros(1, 2, 2, dtype=torch.long),
    )
    terms = distillation_loss(inputs, {"kd_output": 2.0, "kd_feature": 0.0, "kd_feature_plain": 50.0})
    assert set(terms) == {"kd_output", "kd_feature_plain"}
    assert terms["kd_output"].item() == pytest.approx(
        2 * kd_output(inputs.student_logits_NCHW, inputs.teacher_logits_NKHW, inputs.labels_NHW).item()
    )
    plain = F.mse_loss(inputs.student_features_NCHW, inputs.teacher_features_NCHW).item()
    assert terms["kd_feature_plain"].item() == pytest.approx(50 * plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(TrainingError, match=r"term kd_feature, iteration 7(.|\n)*--loss kd_feature"):
        check_finite({"cross_entropy": torch.tensor(1.0), "kd_feature": torch.tensor(value)}, 7)
