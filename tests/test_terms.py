"""Terms: which tensors each loss gets, weights, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from edge_ilseg import losses
from edge_ilseg.errors import TrainingError
from edge_ilseg.methods import METHODS, TERM_NAMES, Method, resolve_method
from edge_ilseg.models.segmentation import SegmentationOutput
from edge_ilseg.terms import (
    DISTILLATION_TERMS,
    LossInputs,
    StepFacts,
    check_finite,
    classification_term,
    distillation_terms,
    hidden_pixels,
    needs_teacher,
)

LABELS = torch.tensor([[[0, 1, 2], [3, 255, 0]], [[0, 0, 2], [1, 1, 3]]])
OLD = 2
REACHED = {
    "kd_feature": ("features",),
    "kd_feature_plain": ("features",),
    "kd_dilation": ("branches",),
    "kd_similarity": ("branches",),
    "local_pod": ("features", "stages"),
}
"""Layers beside the logits that a term sends a gradient to."""


def output(channels: int, seed: int) -> SegmentationOutput:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 5, 2, 3, generator=generator)
    branches = tuple(torch.randn(2, 4, 2, 3, generator=generator) for _ in range(3))
    stages = (torch.randn(2, 3, 4, 6, generator=generator), features)
    coarse = torch.randn(2, channels, 2, 3, generator=generator)
    return SegmentationOutput(coarse, features, branches, stages, 2, 3)


def inputs(method: Method, background: int | None = 0) -> LossInputs:
    return LossInputs(output(4, 1), output(OLD, 2), LABELS, method, StepFacts(OLD, background))


def test_the_registry_and_the_methods_know_the_same_terms() -> None:
    assert tuple(DISTILLATION_TERMS) == TERM_NAMES


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_its_terms_with_a_gradient(name: str) -> None:
    method = METHODS[name]
    student = output(4, 1)
    for tensor in (student.coarse_NCHW, *student.branches, *student.stages):
        tensor.requires_grad_(True)
    x = LossInputs(student, output(OLD, 2), LABELS, method, StepFacts(OLD, 0, torch.full((OLD,), 0.9)))
    terms = distillation_terms(x)
    assert set(terms) == set(method.losses)
    total = classification_term(student.logits_NCHW, LABELS, method, x.facts, x.teacher.logits_NCHW)
    total = total + sum(terms.values())
    total.backward()
    assert torch.isfinite(total)
    assert student.coarse_NCHW.grad is not None
    reached = {"features": student.features_NCHW, "branches": student.branches[0], "stages": student.stages[0]}
    expected = {layer for term in terms for layer in REACHED.get(term, ())}
    assert {layer for layer, tensor in reached.items() if tensor.grad is not None} == expected


def test_weights_scale_their_terms_and_zero_switches_a_term_off() -> None:
    method = resolve_method("kd-output", losses={"kd_output": 2.0, "kd_feature": 0.0, "kd_feature_plain": 50.0})
    x = inputs(method)
    terms = distillation_terms(x)
    assert set(terms) == {"kd_output", "kd_feature_plain"}
    once = losses.kd_output(x.student.logits_NCHW, x.teacher.logits_NCHW, LABELS)
    assert terms["kd_output"].item() == pytest.approx(2 * once.item())
    plain = F.mse_loss(x.student.features_NCHW, x.teacher.features_NCHW).item()
    assert terms["kd_feature_plain"].item() == pytest.approx(50 * plain)


def test_switches_reach_the_loss_that_they_are_of() -> None:
    x = inputs(resolve_method("kd-output", kd_softmax="old", kd_mask="all", kd_classes="mean", kd_temperature=3.0))
    expected = losses.kd_output(
        x.student.logits_NCHW, x.teacher.logits_NCHW, LABELS, softmax="old", mask="all", classes="mean", temperature=3.0
    )
    assert distillation_terms(x)["kd_output"].item() == expected.item()
    x = inputs(resolve_method("mib", kd_alpha=2.0), background=1)
    expected = losses.kd_unbiased(x.student.logits_NCHW, x.teacher.logits_NCHW, 1, alpha=2.0)
    assert distillation_terms(x)["kd_unbiased"].item() == pytest.approx(10 * expected.item())


def test_similarity_compares_the_layer_that_is_asked_for() -> None:
    x = inputs(METHODS["kd-similarity"])
    joined = [torch.cat(side.branches, dim=1) for side in (x.student, x.teacher)]
    averaged = [torch.stack(side.branches).mean(dim=0) for side in (x.student, x.teacher)]
    cases = {
        ("branches", "none"): losses.kd_similarity(*joined),
        ("branches", "spatial"): losses.kd_similarity(*joined, spatial_average=True),
        ("branches", "branches"): losses.kd_similarity(*averaged),
        ("features", "none"): losses.kd_similarity(x.student.features_NCHW, x.teacher.features_NCHW),
        ("logits", "none"): losses.kd_similarity(x.student.logits_NCHW[:, :OLD], x.teacher.logits_NCHW),
    }
    for (layer, pooling), expected in cases.items():
        method = resolve_method("kd-similarity", similarity_layer=layer, similarity_pooling=pooling)
        assert distillation_terms(inputs(method))["kd_similarity"].item() == expected.item()


@pytest.mark.parametrize("pooling", ["none", "spatial", "branches"])
def test_similarity_of_the_branches_equals_its_plain_loops(pooling: str) -> None:
    """Images x branches x channels x positions in lists, pooled, multiplied and normalised by hand."""
    x = inputs(METHODS["kd-similarity"])

    def rows(branches: Sequence[torch.Tensor]) -> list[list[float]]:
        images = []
        for image in range(branches[0].shape[0]):
            maps = [[channel.flatten().tolist() for channel in branch[image]] for branch in branches]
            if pooling == "branches":
                maps = [[[sum(at) / len(at) for at in zip(*same, strict=True)] for same in zip(*maps, strict=True)]]
            channels = [values for branch in maps for values in branch]
            if pooling == "spatial":
                channels = [[sum(values) / len(values)] for values in channels]
            images.append([value for values in channels for value in values])
        return images

    def similarities(vectors: list[list[float]]) -> list[list[float]]:
        gram = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in vectors] for p in vectors]
        return [[value / math.sqrt(sum(other * other for other in row)) for value in row] for row in gram]

    new, old = (similarities(rows(side.branches)) for side in (x.student, x.teacher))
    squares = [(a - b) ** 2 for p, q in zip(new, old, strict=True) for a, b in zip(p, q, strict=True)]
    method = resolve_method("kd-similarity", similarity_pooling=pooling)
    expected = sum(squares) / len(new) ** 2
    assert distillation_terms(inputs(method))["kd_similarity"].item() == pytest.approx(expected, rel=1e-4)


def test_pseudo_labels_complete_what_the_setup_hides() -> None:
    x = inputs(METHODS["plop"])
    logits, seen = x.student.logits_NCHW, x.teacher.logits_NCHW
    hidden = hidden_pixels(LABELS, 0)
    assert torch.equal(hidden, LABELS == 0)
    assert torch.equal(hidden_pixels(LABELS, None), LABELS == 255)
    thresholds = torch.tensor([0.9, 0.9])
    labels, weight = losses.pseudo_labels(LABELS, hidden, seen, thresholds)
    found = classification_term(logits, LABELS, METHODS["plop"], StepFacts(OLD, 0, thresholds), seen)
    assert found.item() == losses.cross_entropy(logits, labels, weight).item()
    without = classification_term(logits, LABELS, METHODS["plop"], StepFacts(OLD, 0), seen)
    assert without.item() == losses.cross_entropy(logits, LABELS).item()


def test_adjusted_logits_carry_the_frequencies_of_the_classes_in_cross_entropy_alone() -> None:
    method = resolve_method("finetune", logit_adjustment=0.5)
    logits = output(4, 1).logits_NCHW
    frequency = torch.tensor([0.5, 0.01, 0.09, 0.4])
    found = classification_term(logits, LABELS, method, StepFacts(OLD, 0, log_frequency_C=frequency.log()), None)
    total, count = 0.0, 0
    for n, y, x in [(n, y, x) for n in range(2) for y in range(2) for x in range(3)]:
        if (label := int(LABELS[n, y, x])) != 255:
            scores = [math.exp(float(z)) * float(f) ** 0.5 for z, f in zip(logits[n, :, y, x], frequency, strict=True)]
            total -= math.log(scores[label] / sum(scores))
            count += 1
    assert found.item() == pytest.approx(total / count, rel=1e-5)
    plain = classification_term(logits, LABELS, METHODS["finetune"], StepFacts(OLD, 0), None)
    assert plain.item() == pytest.approx(losses.cross_entropy(logits, LABELS).item())


def test_fine_tuning_and_freezing_run_no_teacher() -> None:
    assert [name for name, method in METHODS.items() if not needs_teacher(method)] == ["finetune", "freeze", "analytic"]
    assert needs_teacher(resolve_method("finetune", pseudo_labels="entropy"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(TrainingError, match=r"term kd_feature, iteration 7(.|\n)*--loss kd_feature"):
        check_finite({"cross_entropy": 1.0, "kd_feature": value}, 7)
