"""The choice of memory format and threads: made by measured time, once, without a trace in the network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import msgspec
import pytest
import torch

from edge_ilseg import tuning
from edge_ilseg.config import TrainConfig
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.step_view import StepView
from edge_ilseg.errors import ConfigError
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.scenario import label_lookup
from edge_ilseg.tuning import FIXED, FORMATS, ROUNDS, Tuning, choices, choose, parse_tuning, threads_of, tune_step

SPEC = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=32, input_width_px=32)
USUAL, OTHER, THIRD = Tuning("channels_last", 1), Tuning("contiguous", 1), Tuning("contiguous", 2)


class Machine:
    """A clock that an iteration moves on by what its choice takes."""

    def __init__(self, *seconds: tuple[Tuning, float]) -> None:
        self.seconds, self.now = dict(seconds), 0.0
        self.asked: list[Tuning] = []

    def iterate(self, choice: Tuning) -> None:
        self.asked.append(choice)
        first = self.asked.count(choice) == 1
        self.now += self.seconds[choice] * (1.5 if first else 1.0)

    def choose(self, budget_s: float = 1000.0) -> Tuning:
        return choose(self.iterate, list(self.seconds), budget_s=budget_s, clock=lambda: self.now)


@pytest.fixture(scope="module")
def view() -> StepView:
    dataset = Shapes(train=4, height_px=32, width_px=32)
    classes = dataset.info.classes
    return StepView(
        dataset, dataset.ids("train"), label_lookup("sequential", classes, "background", old=classes, new=())
    )


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SegmentationModel:
    monkeypatch.setattr(tuning, "_measured", {})
    torch.manual_seed(0)
    return build_model(SPEC, (9,))


def test_the_fastest_choice_is_taken_and_the_first_iteration_of_each_does_not_count() -> None:
    machine = Machine((USUAL, 1.0), (OTHER, 0.8))
    chosen = machine.choose()
    assert (chosen.memory_format, chosen.threads) == ("contiguous", 1)
    assert [(item.iteration_ms, item.iterations) for item in chosen.timings] == [(1000, 3), (800, 3)]
    assert machine.asked == [OTHER] + [USUAL, OTHER] * ROUNDS  # the first one loads what all need
    assert chosen.seconds == pytest.approx(0.8 * 1.5 + 1.5 + 0.8 + 1.8 * 3)


def test_what_is_about_equally_fast_changes_nothing() -> None:
    chosen = Machine((USUAL, 1.0), (OTHER, 0.95)).choose()
    assert (chosen.memory_format, chosen.threads) == (USUAL.memory_format, USUAL.threads)
    assert len(chosen.timings) == 2


def test_a_hopeless_choice_is_not_measured_on() -> None:
    machine = Machine((USUAL, 1.0), (OTHER, 3.5))
    machine.choose()
    assert machine.asked.count(OTHER) == 2


def test_a_usual_choice_without_hope_is_left_after_one_iteration() -> None:
    machine = Machine((USUAL, 5.0), (OTHER, 1.0))
    assert machine.choose().memory_format == OTHER.memory_format
    assert machine.asked.count(USUAL) == 1


def test_what_was_not_measured_in_time_is_not_chosen() -> None:
    slow = Machine((USUAL, 1.0), (OTHER, 0.9))
    chosen = slow.choose(budget_s=0.0)
    assert (chosen.memory_format, chosen.timings) == (USUAL.memory_format, ())
    busy = Machine((USUAL, 1.0), (OTHER, 0.4), (THIRD, 0.6))
    chosen = busy.choose(budget_s=2.0)
    assert busy.asked == [THIRD, USUAL]
    assert (chosen.memory_format, chosen.threads) == (USUAL.memory_format, USUAL.threads)
    assert chosen.seconds < 2.0 + 1.5


def test_measuring_leaves_no_trace_in_the_network_and_the_generators(model: SegmentationModel, view: StepView) -> None:
    before = copy.deepcopy(model.state_dict())
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    tune_step(model, view, TrainConfig(batch_norm="train"), "encoder")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads
    assert model.freeze == "none"


def test_a_step_is_measured_once_in_a_process(
    model: SegmentationModel, view: StepView, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(iterate: Callable[[Tuning], None], candidates: tuple[Tuning, ...]) -> Tuning:
        calls.append(candidates)
        iterate(candidates[0])
        return candidates[0]

    monkeypatch.setattr(tuning, "choose", counted)
    first = tune_step(model, view, TrainConfig(), "encoder")
    assert tune_step(model, view, TrainConfig(), "encoder") is first
    assert len(calls) == 1
    tune_step(model, view, TrainConfig(), "none")
    assert len(calls) == 2


def test_the_usual_choice_is_what_is_computed_without_any(view: StepView) -> None:
    images_NHWC = torch.from_numpy(view.read(view.image_ids[0])[0])[None]
    images_NCHW = normalize(images_NHWC, SPEC)
    assert FIXED.arrange(images_NCHW).stride() == images_NCHW.stride()
    assert choices(is_gpu=False)[0] == Tuning(FIXED.memory_format, torch.get_num_threads())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_activations_take_over_the_format_of_the_images(
    model: SegmentationModel, view: StepView, memory_format: tuning.MemoryFormat
) -> None:
    images_NHWC = torch.from_numpy(view.read(view.image_ids[0])[0])[None]
    output = model(Tuning(memory_format).arrange(normalize(images_NHWC, SPEC)))
    assert output.features_NCHW.is_contiguous(memory_format=FORMATS[memory_format])


def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(tuning.os, "cpu_count", lambda: 8)
    assert [item.threads for item in choices(is_gpu=False)[::2]] == [8, 4, 1]
    assert [item.threads for item in choices(is_gpu=False, processes=4)[::2]] == [8, 2, 1]
    assert [item.threads for item in choices(is_gpu=True)] == [8, 8]


def test_threads_are_put_back_after_an_error_too() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    with pytest.raises(IndexError), threads_of(Tuning(threads=before + 1)):
        seen[torch.get_num_threads()]
    assert torch.get_num_threads() == before
    with threads_of(Tuning(threads=before + 1)):
        assert torch.get_num_threads() == before + 1


def test_a_choice_survives_being_written_down() -> None:
    chosen = Machine((USUAL, 1.0), (OTHER, 0.8)).choose()
    assert msgspec.json.decode(msgspec.json.encode(chosen), type=Tuning) == chosen
    assert "contiguous, 1 thread; measured in" in chosen.describe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", None),
        ("usual", FIXED),
        ("contiguous", Tuning("contiguous")),
        ("channels_last:3", Tuning("channels_last", 3)),
    ],
)
def test_the_choice_can_be_given(text: str, expected: Tuning | None) -> None:
    assert parse_tuning(text) == expected


@pytest.mark.parametrize("text", ["", "fast", "contiguous:", "contiguous:0", "contiguous:-1", "channels_last:two"])
def test_a_wrong_choice_is_explained(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_tuning(text)
    assert error.value.found == repr(text)
