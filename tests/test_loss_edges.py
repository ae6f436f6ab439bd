"""Every loss term at its edges: gradients, one class, one pixel, nothing to learn from, half precision, autocast."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edge_ilseg.losses import (
    cross_entropy,
    cross_entropy_unbiased,
    entropy,
    kd_dilation,
    kd_feature,
    kd_feature_plain,
    kd_output,
    kd_similarity,
    kd_unbiased,
    local_pod,
    pseudo_labels,
)
from edge_ilseg.methods import resolve_method
from edge_ilseg.metrics import VOID
from edge_ilseg.terms import StepFacts, classification_term

Term = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a student's N x C x H x W, a teacher's N x K x H x W with K < C, and labels N x H x W."""


def factors(student: Tensor) -> Tensor:
    """One factor for each image."""
    return torch.linspace(0.5, 2, len(student), dtype=student.dtype)


def adjusted(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with logit adjustment."""
    channels, old_count = student.shape[1], teacher.shape[1]
    log_frequency_C = torch.linspace(-3, -0.5, channels, dtype=torch.promote_types(student.dtype, torch.float32))
    facts = StepFacts(old_count, log_frequency_C=log_frequency_C)
    method = resolve_method("finetune", logit_adjustment=0.7)
    return classification_term(student, labels, method, facts, None)


OF_LABELS: dict[str, Term] = {
    "cross_entropy": lambda s, _, y: cross_entropy(s, y),
    "cross_entropy, factors": lambda s, _, y: cross_entropy(s, y, factors(s)),
    "cross_entropy, adjusted": adjusted,
    "cross_entropy_unbiased": lambda s, t, y: cross_entropy_unbiased(s, y, t.shape[1]),
    "cross_entropy_unbiased, factors": lambda s, t, y: cross_entropy_unbiased(s, y, t.shape[1], factors(s)),
    "kd_output": lambda s, t, y: kd_output(s, t, y),
    "kd_output, mean": lambda s, t, y: kd_output(s, t, y, softmax="old", classes="mean", temperature=2.0),
}
"""What is 0 where every pixel is void."""
OF_LOGITS: dict[str, Term] = {
    "kd_output, all": lambda s, t, y: kd_output(s, t, y, softmax="old", mask="all", temperature=2.0),
    "kd_unbiased": lambda s, t, _: kd_unbiased(s, t, 0, alpha=2.0),
    "local_pod": lambda s, t, _: local_pod([s[:, : t.shape[1]]], [t], s, t, 0),
    "local_pod, no background": lambda s, t, _: local_pod([s[:, : t.shape[1]]], [t], s, t, None),
}
OF_FEATURES: dict[str, Term] = {
    "kd_feature": lambda s, t, _: kd_feature(s[:, : t.shape[1]], t),
    "kd_feature_plain": lambda s, t, _: kd_feature_plain(s[:, : t.shape[1]], t),
    "kd_dilation": lambda s, t, _: kd_dilation([s, 2 * s], [t, t]),
    "kd_similarity": lambda s, t, _: kd_similarity(s[:, : t.shape[1]], t),
    "kd_similarity, pooled": lambda s, t, _: kd_similarity(s, t, spatial_average=True),
}
NOT_NEW: dict[str, Term] = {"kd_output, not new": lambda s, t, y: kd_output(s, t, y, mask="not_new")}
TERMS = OF_LABELS | OF_LOGITS | OF_FEATURES | NOT_NEW

every_term = pytest.mark.parametrize("name", list(TERMS))
half_precision = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def batch(
    *, old: int = 3, new: int = 2, height: int = 2, width: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Two images, with a void pixel where there is room for one."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = (
        3 * torch.randn(2, channels, height, width, generator=generator, dtype=dtype) for channels in (old + new, old)
    )
    labels = torch.randint(0, old + new, (2, height, width), generator=generator)
    labels[:, 0, 1:2] = VOID
    return student, teacher, labels


def value_and_gradient(term: Term, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_(True)
    loss = term(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


@every_term
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    student, teacher, labels = batch()
    assert torch.autograd.gradcheck(lambda s: TERMS[name](s, teacher, labels), student.requires_grad_(True))


@every_term
def test_one_old_class_and_one_pixel_are_enough(name: str) -> None:
    student, teacher, _ = batch(old=1, new=1, height=1, width=1)
    loss, gradient = value_and_gradient(TERMS[name], student, teacher, torch.zeros(2, 1, 1, dtype=torch.long))
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_values_of_one_pixel_by_hand() -> None:
    one_class, old = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    assert cross_entropy(one_class, old).item() == 0.0
    student = torch.tensor([math.log(3.0), 0.0]).reshape(1, 2, 1, 1)
    assert kd_output(student, one_class, old).item() == pytest.approx(-math.log(0.75))
    assert cross_entropy_unbiased(student, old, 1).item() == pytest.approx(-math.log(0.75))
    assert kd_unbiased(student, one_class, 0).item() == pytest.approx(0.0, abs=1e-7)
    two = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])[:, :, None, None]
    # G of rows 3 and -3 has rows (1, -1) / sqrt 2 and (-1, 1) / sqrt 2; of rows 1 and 1, all 1 / sqrt 2.
    assert kd_similarity(two[:, :1], torch.ones(2, 1, 1, 1)).item() == pytest.approx(2 * 2 / 4)
    labels, factor = pseudo_labels(old, old == 0, one_class, torch.tensor([0.5]))
    assert (labels.item(), factor.item()) == (0, 1.0)


@pytest.mark.parametrize("name", list(OF_LABELS))
def test_without_a_labelled_pixel_a_term_of_labels_is_0_with_a_gradient_of_0(name: str) -> None:
    student, teacher, labels = batch()
    loss, gradient = value_and_gradient(TERMS[name], student, teacher, torch.full_like(labels, VOID))
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", ["kd_output, all", "kd_output, not new"])
def test_distillation_with_these_masks_reads_void_pixels_too(name: str) -> None:
    student, teacher, labels = batch()
    some, every = torch.full_like(labels, VOID), labels % teacher.shape[1]
    torch.testing.assert_close(TERMS[name](student, teacher, some), TERMS[name](student, teacher, every))


@pytest.mark.parametrize("name", ["kd_output", "kd_output, mean", "kd_output, not new"])
def test_where_every_pixel_is_new_distillation_of_the_others_is_0_with_a_gradient_of_0(name: str) -> None:
    student, teacher, labels = batch()
    loss, gradient = value_and_gradient(TERMS[name], student, teacher, torch.full_like(labels, teacher.shape[1]))
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_pseudo_labels_leave_a_batch_alone_that_hides_nothing() -> None:
    _, teacher, labels = batch()
    for given in (labels, torch.full_like(labels, VOID)):
        found, factor = pseudo_labels(given, torch.zeros_like(given, dtype=torch.bool), teacher, torch.ones(3))
        assert torch.equal(found, given)
        assert factor.tolist() == [1.0, 1.0]


@half_precision
@every_term
def test_half_precision_of_a_large_map_gives_what_float32_gives(name: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(height=200, width=190, dtype=torch.float32)
    given = student.to(dtype), teacher.to(dtype), labels
    wanted, wanted_gradient = value_and_gradient(TERMS[name], given[0].float(), given[1].float(), labels)
    found, gradient = value_and_gradient(TERMS[name], *given)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0, check_dtype=False)
    torch.testing.assert_close(gradient.float(), wanted_gradient, rtol=1e-2, atol=1e-6)


@half_precision
@pytest.mark.parametrize("name", [*OF_FEATURES, "local_pod"])
def test_large_features_in_half_precision_give_what_float32_gives(name: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(height=20, width=20, dtype=torch.float32)
    given = (100 * student).to(dtype), (100 * teacher).to(dtype)
    wanted = TERMS[name](given[0].float(), given[1].float(), labels)
    torch.testing.assert_close(TERMS[name](*given, labels), wanted, rtol=1e-4, atol=0, check_dtype=False)


@half_precision
def test_entropy_and_pseudo_labels_in_half_precision_are_those_of_float32(dtype: torch.dtype) -> None:
    _, teacher, labels = batch(height=20, width=20, dtype=torch.float32)
    half, thresholds = teacher.to(dtype), torch.full((3,), 0.4)
    torch.testing.assert_close(entropy(half), entropy(half.float()))
    found, wanted = (pseudo_labels(labels, labels < 3, given, thresholds) for given in (half, half.float()))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@half_precision
def test_similarity_of_images_of_zeros_in_half_precision_is_0_with_a_finite_gradient(dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, 3, 2, 2, dtype=dtype)
    loss, gradient = value_and_gradient(TERMS["kd_similarity"], zeros, zeros[:, :2], torch.zeros(2, 2, 2).long())
    assert loss.item() == 0.0
    assert torch.isfinite(gradient).all()


@half_precision
@every_term
def test_autocast_does_not_change_a_term(name: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(height=20, width=20, dtype=torch.float32)
    wanted = TERMS[name](student, teacher, labels)
    with torch.autocast("cpu", dtype=dtype):
        found = TERMS[name](student, teacher, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
