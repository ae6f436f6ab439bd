"""Cross-entropy and L'_D from coarse logits are those of `losses` on enlarged ones, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edge_ilseg import fused_loss, losses
from edge_ilseg.fused_loss import FusedTerms, can_fuse, fused_terms
from edge_ilseg.methods import METHODS, Mask, Method, resolve_method
from edge_ilseg.metrics import VOID
from edge_ilseg.models.segmentation import SegmentationOutput
from edge_ilseg.terms import StepFacts, loss_terms

OLD, ALL, HEIGHT_PX, WIDTH_PX = 3, 5, 13, 9
FACTS = StepFacts(OLD)


def output(coarse_NChw: Tensor, height_px: int = HEIGHT_PX, width_px: int = WIDTH_PX) -> SegmentationOutput:
    return SegmentationOutput(coarse_NChw, coarse_NChw, (), (), height_px, width_px)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's coarse logits and labels, void among them."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, ALL, 4, 3, dtype=dtype), torch.randn(2, OLD, 4, 3, dtype=dtype)
    labels_NHW = torch.randint(0, ALL, (2, HEIGHT_PX, WIDTH_PX))
    labels_NHW[0, :4] = VOID
    return 4 * student.requires_grad_(True), 4 * teacher, labels_NHW


def gradients(terms: FusedTerms | tuple[Tensor, Tensor], student: Tensor) -> list[Tensor]:
    return [torch.autograd.grad(term, student, retain_graph=True)[0] for term in terms]


@pytest.mark.parametrize("mask", ["old_pixels", "not_new", "all"])
@pytest.mark.parametrize("over_classes", ["sum", "mean"])
def test_terms_and_gradients_are_those_of_the_losses_on_enlarged_logits(mask: Mask, over_classes: str) -> None:
    student, teacher, labels_NHW = batch()
    in_mean = over_classes == "mean"
    found = fused_terms(output(student), labels_NHW, output(teacher), mask=mask, mean_over_classes=in_mean)
    logits_NCHW, teacher_NKHW = output(student).logits_NCHW, output(teacher).logits_NCHW
    wanted = (
        losses.cross_entropy(logits_NCHW, labels_NHW),
        losses.kd_output(logits_NCHW, teacher_NKHW, labels_NHW, mask=mask, classes=over_classes),  # type: ignore[arg-type]
    )
    torch.testing.assert_close(tuple(found), wanted, rtol=1e-6, atol=0)
    for own, other in zip(gradients(found, student), gradients(wanted, student), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-8)


def test_values_are_those_of_a_loop_over_pixels() -> None:
    student, teacher, labels_NHW = batch()
    found = fused_terms(output(student), labels_NHW, output(teacher))
    p_NCHW, q_NKHW = output(student.detach()).logits_NCHW.softmax(1), output(teacher).logits_NCHW.softmax(1)
    cross_entropy = distillation = 0.0
    known = old = 0
    for n in range(2):
        for y in range(HEIGHT_PX):
            for x in range(WIDTH_PX):
                label = int(labels_NHW[n, y, x])
                if label != VOID:
                    known += 1
                    cross_entropy -= float(p_NCHW[n, label, y, x].log())
                if label < OLD:
                    old += 1
                    for c in range(OLD):
                        distillation -= float(q_NKHW[n, c, y, x] * p_NCHW[n, c, y, x].log())
    assert found.cross_entropy.item() == pytest.approx(cross_entropy / known, rel=1e-6)
    assert found.kd_output.item() == pytest.approx(distillation / old, rel=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    student, teacher, labels_NHW = batch()

    def both(coarse: Tensor) -> tuple[Tensor, ...]:
        return tuple(fused_terms(output(coarse), labels_NHW, output(teacher)))

    assert torch.autograd.gradcheck(both, (student.detach().requires_grad_(True),), atol=1e-6)


def test_without_a_teacher_there_is_cross_entropy_alone() -> None:
    student, _, labels_NHW = batch()
    found = fused_terms(output(student), labels_NHW)
    assert found.cross_entropy.item() == pytest.approx(
        losses.cross_entropy(output(student).logits_NCHW, labels_NHW).item(), rel=1e-6
    )
    assert found.kd_output.item() == 0


@pytest.mark.parametrize("label", [VOID, OLD])
def test_a_batch_without_a_pixel_that_counts_is_0_with_a_gradient_of_0(label: int) -> None:
    student, teacher, labels_NHW = batch(torch.float32)
    found = fused_terms(output(student), torch.full_like(labels_NHW, label), output(teacher))
    assert found.kd_output.item() == 0
    assert (found.cross_entropy.item() == 0) == (label == VOID)
    assert not gradients(found, student)[1].any()


def test_one_pixel_and_one_class_and_logits_far_apart_are_finite() -> None:
    far = torch.tensor([[[[1e4]], [[-1e4]]]], requires_grad=True)
    found = fused_terms(output(far, 1, 1), torch.tensor([[[1]]]), output(far[:, :1], 1, 1), mask="all")
    assert found.cross_entropy.item() == pytest.approx(2e4)
    one = torch.zeros(1, 1, 1, 1, requires_grad=True)
    assert fused_terms(output(one, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)).cross_entropy.item() == 0


@pytest.mark.parametrize("apart", [50.0, 500.0, 1e5])
def test_between_positions_that_are_sure_of_different_classes_nothing_vanishes(apart: float) -> None:
    sure = apart * torch.tensor([[[[0.0, -1.0]], [[-1.0, 0.0]]]])
    student, labels_NHW = sure.clone().requires_grad_(True), torch.zeros(1, 2, 9, dtype=torch.int64)
    found = fused_terms(output(student, 2, 9), labels_NHW, output(sure, 2, 9))
    exact = sure.double().requires_grad_(True)
    logits_NCHW, teacher_NKHW = output(exact, 2, 9).logits_NCHW, output(sure.double(), 2, 9).logits_NCHW
    wanted = losses.cross_entropy(logits_NCHW, labels_NHW), losses.kd_output(logits_NCHW, teacher_NKHW, labels_NHW)
    for own, other in zip((*found, *gradients(found, student)), (*wanted, *gradients(wanted, exact)), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients() -> None:
    student, teacher, labels_NHW = batch()
    found = fused_terms(output(student), labels_NHW, output(teacher), weight=3.0)
    one, other = gradients(found, student)
    (both,) = torch.autograd.grad(torch.stack(found).sum(), student)
    torch.testing.assert_close(both, one + other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("ask", "has_teacher", "passes"),
    [("sum", True, 1), ("sum", False, 1), ("cross_entropy", False, 1), ("cross_entropy", True, 2)],
)
def test_a_second_pass_is_made_for_one_term_of_two_alone(
    ask: str, has_teacher: bool, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, labels_NHW = batch()
    made: list[None] = []
    sum_up = fused_loss._sum_up
    monkeypatch.setattr(fused_loss, "_sum_up", lambda *given: (made.append(None), sum_up(*given))[1])
    found = fused_terms(output(student), labels_NHW, output(teacher) if has_teacher else None)
    (torch.stack(found).sum() if ask == "sum" else found.cross_entropy).backward()
    assert len(made) == passes


def test_values_alone_need_no_gradient() -> None:
    student, teacher, labels_NHW = batch()
    with torch.no_grad():
        found = fused_terms(output(student), labels_NHW, output(teacher))
    assert not found.cross_entropy.requires_grad


FUSED = ("finetune", "freeze", "kd-output", "freeze+kd-output", "kd-output+kd-feature")
OTHERWISE = ("ilt", "mib", "plop", "balanced", "freeze+balanced")


@pytest.mark.parametrize("name", FUSED + OTHERWISE)
def test_methods_that_change_what_the_terms_are_go_the_other_way(name: str) -> None:
    assert can_fuse(output(batch(torch.float32)[0]), METHODS[name]) == (name in FUSED)


@pytest.mark.parametrize(
    "change", [{"kd_softmax": "old"}, {"kd_temperature": 2.0}, {"logit_adjustment": 0.5}, {"cross_entropy": "unbiased"}]
)
def test_switches_that_change_what_the_terms_are_go_the_other_way(change: dict[str, object]) -> None:
    assert not can_fuse(output(batch(torch.float32)[0]), resolve_method("kd-output", **change))  # type: ignore[arg-type]


def test_half_precision_goes_the_other_way() -> None:
    assert not can_fuse(output(torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16)), None)


def taken(monkeypatch: pytest.MonkeyPatch, run: Callable[[], dict[str, Tensor]], fused: bool) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr("edge_ilseg.terms.can_fuse", lambda *_: fused)
        return run()


@pytest.mark.parametrize(
    "method", [None, METHODS["finetune"], resolve_method("kd-output", losses={"kd_output": 3.0}, kd_classes="mean")]
)
def test_a_step_learns_the_same_either_way(monkeypatch: pytest.MonkeyPatch, method: Method | None) -> None:
    student, teacher, labels_NHW = batch()
    seen = output(teacher) if method is not None and method.losses else None
    facts = None if method is None else FACTS

    def run() -> dict[str, Tensor]:
        return loss_terms(output(student), seen, labels_NHW, method, facts)

    one, other = taken(monkeypatch, run, True), taken(monkeypatch, run, False)
    assert list(one) == list(other)
    for name, term in one.items():
        torch.testing.assert_close(term, other[name], rtol=1e-6, atol=0)
        (own,), (wanted,) = (torch.autograd.grad(item[name], student, retain_graph=True) for item in (one, other))
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-8)
