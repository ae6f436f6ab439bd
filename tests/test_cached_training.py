"""A step with cached features learns what it would learn from the same views without a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
import torch

from edge_ilseg.config import TrainConfig
from edge_ilseg.data.loader import TrainingSamples, training_batches
from edge_ilseg.data.order import sample_views
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.step_view import StepView
from edge_ilseg.errors import ConfigError
from edge_ilseg.methods import METHODS, Method, resolve_method
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.progress import no_progress
from edge_ilseg.scenario import label_lookup
from edge_ilseg.terms import StepFacts
from edge_ilseg.train import train

SPEC = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=32, input_width_px=32)
SETTINGS = TrainConfig(
    iterations=9, batch_size=4, learning_rate=0.05, batch_norm="eval", augment_views=2, feature_cache_dtype="float32"
)
UNCACHED = msgspec.structs.replace(SETTINGS, augment_views=0)
METHOD = METHODS["freeze+kd-output"]


@pytest.fixture(scope="module")
def view() -> StepView:
    dataset = Shapes(train=6, height_px=32, width_px=32)
    classes = dataset.info.classes
    lookup = label_lookup("sequential", classes, "background", old=classes[:-1], new=classes[-1:])
    return StepView(dataset, dataset.ids("train"), lookup)


def run(batches: Iterable[Any], settings: TrainConfig, method: Method = METHOD) -> SegmentationModel:
    torch.manual_seed(1)
    teacher = build_model(SPEC, (8,))
    student = copy.deepcopy(teacher)
    student.grow(1)
    facts = StepFacts(old_count=8, background=0)
    train(
        student,
        batches,
        settings,
        teacher=teacher,
        method=method,
        facts=facts,
        accelerator="cpu",
        progress=no_progress,
    )
    return student


def equal(model: SegmentationModel, other: SegmentationModel) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(own, theirs) for own, theirs in pairs)


def same_views(view: StepView) -> list[tuple[torch.Tensor, ...]]:
    samples = TrainingSamples(view, SPEC, SETTINGS)
    numbers = sample_views(len(samples), len(view), SETTINGS.seed, SETTINGS.augment_views).reshape(-1, 4)
    return [tuple(torch.stack(part) for part in zip(*(samples[k] for k in row), strict=True)) for row in numbers]


@pytest.mark.parametrize("freeze", ["encoder", "stages:3", "all_but_head"])
def test_the_weights_are_those_of_the_same_views_computed_each_time(view: StepView, freeze: str) -> None:
    method = resolve_method("freeze+kd-output", freeze=freeze)
    cached = run(training_batches(view, SPEC, SETTINGS), SETTINGS, method)
    assert equal(cached, run(same_views(view), UNCACHED, method))


def test_a_method_without_a_teacher_learns_the_same_too(view: StepView) -> None:
    method = resolve_method("finetune", freeze="encoder")
    cached = run(training_batches(view, SPEC, SETTINGS), SETTINGS, method)
    assert equal(cached, run(same_views(view), UNCACHED, method))


def test_with_as_many_views_as_epochs_a_run_is_the_one_without_a_cache(view: StepView) -> None:
    settings = msgspec.structs.replace(SETTINGS, augment_views=6)
    uncached = run(training_batches(view, SPEC, UNCACHED), UNCACHED)
    assert equal(run(training_batches(view, SPEC, settings), settings), uncached)
    assert not equal(run(training_batches(view, SPEC, SETTINGS), SETTINGS), uncached)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_narrower_features_move_the_weights_little(view: StepView, dtype: str) -> None:
    settings = msgspec.structs.replace(SETTINGS, feature_cache_dtype=dtype)
    exact = run(training_batches(view, SPEC, SETTINGS), SETTINGS).decoder.state_dict()
    narrow = run(training_batches(view, SPEC, settings), settings).decoder.state_dict()
    start = run([], UNCACHED).decoder.state_dict()
    moved = sum((exact[name] - start[name]).square().sum() for name in exact).item() ** 0.5
    error = sum((exact[name] - narrow[name]).square().sum() for name in exact).item() ** 0.5
    assert 0 < error < 0.05 * moved


def test_a_trained_encoder_is_refused(view: StepView) -> None:
    with pytest.raises(ConfigError, match="while the encoder that makes them is frozen"):
        run(training_batches(view, SPEC, SETTINGS), SETTINGS, METHODS["kd-output"])
