"""Cached features are what the network would compute, in the order in which a run without a cache shows its images."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from edge_ilseg.config import TrainConfig
from edge_ilseg.data.loader import TrainingSamples, epoch_order, training_batches
from edge_ilseg.data.order import sample_views
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.step_view import StepView
from edge_ilseg.errors import ConfigError, TrainingError
from edge_ilseg.feature_cache import CachedViews, FeatureCache, cache_bytes, forward_cached, open_cache, view_shape
from edge_ilseg.feature_views import are_views_reused, check_views, needs_logits_alone
from edge_ilseg.methods import METHODS, Method, resolve_method
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import Head, ModelSpec
from edge_ilseg.scenario import label_lookup

SPEC = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=32, input_width_px=48)
IMAGES, BATCH, VIEWS = 7, 4, 3
COMPUTED = 24  # 21 views in blocks of 4
SETTINGS = TrainConfig(
    iterations=20, batch_size=BATCH, seed=3, augment_views=VIEWS, feature_cache_dtype="float32", feature_cache_mib=64
)
METHOD = METHODS["freeze+kd-output"]


class Calls:
    """A trunk that counts the images which it has seen."""

    def __init__(self, network: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        real = network.trunk

        def trunk(images_NCHW: torch.Tensor, stages: int, *, with_body: bool = False) -> object:
            self.images += len(images_NCHW)
            return real(images_NCHW, stages, with_body=with_body)

        monkeypatch.setattr(network, "trunk", trunk)


@pytest.fixture(scope="module")
def view() -> StepView:
    dataset = Shapes(train=IMAGES, height_px=40, width_px=56)
    classes = dataset.info.classes
    lookup = label_lookup("sequential", classes, "background", old=classes[:-1], new=classes[-1:])
    return StepView(dataset, dataset.ids("train"), lookup)


def make_network(spec: ModelSpec = SPEC) -> SegmentationModel:
    torch.manual_seed(1)
    return build_model(spec, (8,)).eval()


def make_cache(
    view: StepView, network: SegmentationModel, settings: TrainConfig = SETTINGS, method: Method = METHOD, **rest: Any
) -> FeatureCache:
    loader = training_batches(view, network.spec, settings, workers=rest.pop("workers", 0))
    cache = open_cache(loader, network, method, has_teacher=True, autocast=nullcontext, **rest)
    assert cache is not None
    return cache


Batch = tuple[CachedViews, torch.Tensor]


def same(batch: Batch, other: Batch) -> bool:
    (views, labels_NHW), (other_views, other_labels_NHW) = batch, other
    assert views.teacher_logits_NKHW is not None
    assert other_views.teacher_logits_NKHW is not None
    return (
        torch.equal(views.trunk.x_NCHW, other_views.trunk.x_NCHW)
        and torch.equal(labels_NHW, other_labels_NHW)
        and torch.equal(views.teacher_logits_NKHW, other_views.teacher_logits_NKHW)
    )


def test_a_view_is_a_function_of_the_image_and_of_the_epoch_modulo_the_views() -> None:
    samples = SETTINGS.iterations * BATCH
    numbers = sample_views(samples, IMAGES, SETTINGS.seed, VIEWS)
    assert numbers[: VIEWS * IMAGES].tolist() == list(range(VIEWS * IMAGES))
    for sample in range(samples):
        epoch, position = divmod(sample, IMAGES)
        made_in, made_at = divmod(int(numbers[sample]), IMAGES)
        assert made_in == epoch % VIEWS
        image = epoch_order(IMAGES, SETTINGS.seed, epoch)[position]
        assert epoch_order(IMAGES, SETTINGS.seed, made_in)[made_at] == image
    assert not np.array_equal(numbers[VIEWS * IMAGES : (VIEWS + 1) * IMAGES], numbers[:IMAGES])


def test_without_views_every_sample_is_its_own() -> None:
    assert sample_views(10, 3, 0, views=4).tolist() == list(range(10))


def test_float32_gives_the_bits_that_the_network_computes_and_the_labels_of_the_same_crop(view: StepView) -> None:
    network = make_network()
    samples = TrainingSamples(view, SPEC, SETTINGS)
    numbers = sample_views(len(samples), IMAGES, SETTINGS.seed, VIEWS).reshape(-1, BATCH)
    for shown, (views, found_NHW) in zip(numbers, make_cache(view, network), strict=True):
        images_NHWC, labels_NHW = (torch.stack(parts) for parts in zip(*(samples[k] for k in shown), strict=True))
        with torch.no_grad():
            seen = network(normalize(images_NHWC, SPEC))
            output, from_cache = forward_cached(as_student(network), network, views)
        assert from_cache is not None
        assert torch.equal(found_NHW, labels_NHW)
        assert torch.equal(views.trunk.x_NCHW, seen.features_NCHW)
        assert torch.equal(from_cache.logits_NCHW, seen.logits_NCHW)
        assert torch.equal(output.logits_NCHW, seen.logits_NCHW)


def as_student(network: SegmentationModel) -> Any:
    return network  # what Fabric's wrapper does with `tail` does not matter here


def test_each_block_of_views_is_computed_once(view: StepView, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network()
    cache = make_cache(view, network)
    calls = Calls(network, monkeypatch)
    assert len(list(cache)) == SETTINGS.iterations
    assert calls.images == COMPUTED
    list(cache)
    assert calls.images == COMPUTED


@pytest.mark.parametrize("first", [1, 5, 13])
def test_a_run_that_goes_on_sees_the_bits_of_one_that_was_not_interrupted(view: StepView, first: int) -> None:
    network = make_network()
    whole = list(make_cache(view, network))
    resumed = list(make_cache(view, network, first=first))
    assert len(resumed) == SETTINGS.iterations - first
    assert all(same(batch, other) for batch, other in zip(resumed, whole[first:], strict=True))


def test_a_file_that_a_killed_run_left_saves_the_computing(
    view: StepView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network()
    whole = list(make_cache(view, network))
    killed = iter(make_cache(view, network, folder=tmp_path))
    for _ in range(3):
        next(killed)
    cache = make_cache(view, network, folder=tmp_path, first=3)
    calls = Calls(network, monkeypatch)
    assert all(same(batch, other) for batch, other in zip(cache, whole[3:], strict=True))
    assert calls.images == COMPUTED - 3 * BATCH
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_another_encoder_does_not_read_the_file(view: StepView, tmp_path: Path) -> None:
    network = make_network()
    list(make_cache(view, network, folder=tmp_path))
    with torch.no_grad():
        next(network.encoder.parameters()).add_(1e-3)
    assert not make_cache(view, network, folder=tmp_path).store.is_kept.any()


def test_two_processes_share_each_batch_and_see_each_sample_once(view: StepView) -> None:
    network = make_network()
    pairs = [make_cache(view, network, process=(rank, 2)) for rank in range(2)]
    for whole, even, odd in zip(make_cache(view, network), *pairs, strict=True):
        for part, (views, labels_NHW) in enumerate((even, odd)):
            assert torch.equal(views.trunk.x_NCHW, whole[0].trunk.x_NCHW[part::2])
            assert torch.equal(labels_NHW, whole[1][part::2])


def test_worker_processes_change_nothing(view: StepView) -> None:
    network = make_network()
    settings = TrainConfig(iterations=8, batch_size=BATCH, augment_views=1, feature_cache_dtype="int8")
    alone, helped = (list(make_cache(view, network, settings, workers=n, first=1)) for n in (0, 2))
    assert all(same(batch, other) for batch, other in zip(alone, helped, strict=True))


@pytest.mark.parametrize(("head", "skip"), [("deeplab_v2", False), ("deeplab_v3", False), ("deeplab_v3", True)])
def test_where_all_but_the_head_is_frozen_the_tails_go_on_from_what_the_classifiers_read(
    view: StepView, head: Head, skip: bool
) -> None:
    spec = msgspec.structs.replace(SPEC, head=head, skip_classifier=skip)
    network = make_network(spec)
    method = resolve_method("freeze+kd-output", freeze="all_but_head")
    samples = TrainingSamples(view, spec, SETTINGS)
    views, _ = next(iter(make_cache(view, network, method=method)))
    images_NHWC = torch.stack([samples[k][0] for k in range(BATCH)])
    with torch.no_grad():
        wanted = network(normalize(images_NHWC, spec)).logits_NCHW
        output, _ = forward_cached(as_student(network), None, views)
    assert torch.equal(output.logits_NCHW, wanted)
    features = network.encoder.out_channels
    assert views.trunk.x_NCHW.shape[1] == {"deeplab_v2": features, "deeplab_v3": 16 + features * skip}[head]


def test_a_method_that_looks_at_the_branches_has_the_teacher_run(view: StepView) -> None:
    method = resolve_method("freeze+kd-output", losses={"kd_dilation": 1.0})
    assert not needs_logits_alone(method)
    network = make_network()
    views, _ = next(iter(make_cache(view, network, method=method)))
    assert views.teacher_logits_NKHW is None
    with torch.no_grad():
        output, seen = forward_cached(as_student(copy.deepcopy(network)), network, views)
    assert seen is not None
    assert len(seen.branches) == 5
    assert torch.equal(output.logits_NCHW, seen.logits_NCHW)


def test_the_size_is_known_before_anything_is_computed(view: StepView) -> None:
    network = make_network()
    shape = view_shape(network, with_body=False, with_teacher=True)
    cache = make_cache(view, network)
    assert cache_bytes(SETTINGS, IMAGES, shape) == cache.store.rows.nbytes
    assert next(iter(cache))[0].trunk.x_NCHW.shape[1:] == shape.features_CHW


def test_a_cache_above_the_limit_is_refused_before_training(view: StepView) -> None:
    settings = TrainConfig(iterations=10**6, batch_size=BATCH, augment_views=1000, feature_cache_mib=1)
    with pytest.raises(TrainingError, match="do not fit into the cache"):
        make_cache(view, make_network(), settings)


def test_a_run_that_shows_no_view_twice_has_no_cache(view: StepView) -> None:
    settings = TrainConfig(iterations=5, batch_size=BATCH, augment_views=3)
    assert not are_views_reused(settings, IMAGES)
    assert are_views_reused(TrainConfig(iterations=6, batch_size=BATCH, augment_views=3), IMAGES)
    loader = training_batches(view, SPEC, settings)
    assert open_cache(loader, make_network(), METHOD, has_teacher=True, autocast=nullcontext) is None


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (None, "step 0"),
        (METHODS["kd-output"], "freeze = 'none'"),
        (resolve_method("kd-output", freeze="stages:2"), "freeze = 'stages:2'"),
        (resolve_method("freeze+kd-output", losses={"local_pod": 1.0}), "local_pod"),
    ],
)
def test_a_step_that_cannot_use_views_is_refused(method: Method | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_views(SETTINGS, method, "tiny")
    check_views(TrainConfig(), method, "tiny")


@pytest.mark.parametrize("freeze", ["encoder", "all_but_head", "stages:3"])
def test_a_frozen_encoder_may_have_views(freeze: str) -> None:
    check_views(SETTINGS, resolve_method("freeze+kd-output", freeze=freeze), "tiny")
