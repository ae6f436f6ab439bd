"""Ranges of a step from its own and its parent's: which tensor gets which, on networks that really grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
import pytest
from fakes import measure, random_images, small_model, with_constant, with_names
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_ilseg.calibration.merge import Measured, find_silent_channels, make_ranges
from edge_ilseg.calibration.passport import Extremes, read_levels
from edge_ilseg.calibration.ranges import Ranges, TensorRange
from edge_ilseg.errors import ExportError
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.int8_record import RangesMethod, RangesPolicy

POLICIES: tuple[RangesPolicy, ...] = ("carry", "union", "new-only")
METHODS: tuple[RangesMethod, ...] = ("minmax", "mean-minmax")
RETRAINED = "encoder.stages.1.0.conv.weight"
BEFORE_IT = ("Div", "encoder.stem", "encoder.stages.0")
NEW = "decoder.classifiers.0.steps.2/Conv"
NEWEST = "decoder.classifiers.0.steps.3/Conv"
RED, BLUE = (250, 10, 10), (10, 10, 250)


class Chain(NamedTuple):
    """Float graphs of three steps; only the head grows."""

    base: Path
    child: Path
    grandchild: Path


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    model = small_model()
    chain = Chain(*(folder / f"{number}.onnx" for number in range(3)))
    for path, new_count in zip(chain, (0, 2, 1), strict=True):
        if new_count:
            model.grow(new_count, "scaled")
        write_float_onnx(model, path)
    return chain


@pytest.fixture(scope="module")
def parent(chain: Chain) -> Ranges:
    return make_ranges(measure(chain.base, random_images(3)), "carry", None)


@pytest.fixture(scope="module")
def measured(chain: Chain) -> Measured:
    """Of the child, on images of its own: dark ones, so that some of its ranges are narrower than its parent's."""
    return measure(chain.child, random_images(3, seed=7) // 2, step="01-boat")


def scaled(factor: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda value: value * np.float32(factor)


def changed(path: Path, to: Path, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> Path:
    onnx.save(change(onnx.load(path)), to)
    return to


def retrained(path: Path, to: Path, factor: float = 1.5) -> Path:
    return changed(path, to, lambda model: with_constant(model, RETRAINED, scaled(factor)))


def flat_images(colour: tuple[int, int, int], count: int = 2) -> NDArray[np.uint8]:
    """Images of one colour, and of darker shades of it."""
    shades = random_images(count)[..., :1].astype(np.float64) / 255
    images_NHWC: NDArray[np.uint8] = (shades * np.array(colour)).astype(np.uint8)
    return images_NHWC


def assert_envelope(found: TensorRange, before: TensorRange, extremes: Extremes) -> None:
    """Of what the parent has and what was measured, by plain loops, for the tensor and for each channel."""
    assert found.lowest == min([before.lowest, *extremes.lowest_C.tolist()])
    assert found.highest == max([before.highest, *extremes.highest_C.tolist()])
    level = (found.highest - found.lowest) / 255
    passport = read_levels(found.channels, found.lowest, found.highest)
    old = read_levels(before.channels, before.lowest, before.highest)
    for channel in range(len(extremes.lowest_C)):
        low = min(float(old.lowest_C[channel]), float(extremes.lowest_C[channel]))
        high = max(float(old.highest_C[channel]), float(extremes.highest_C[channel]))
        assert -1.001 * level <= float(passport.lowest_C[channel]) - low <= 1e-3 * level
        assert -1e-3 * level <= float(passport.highest_C[channel]) - high <= 1.001 * level


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_parent_every_range_is_the_measured_one(measured: Measured, policy: RangesPolicy) -> None:
    ranges = make_ranges(measured, policy, None)
    assert list(ranges.tensors) == list(measured.extremes)
    for name, item in ranges.tensors.items():
        extremes = measured.extremes[name]
        assert (item.lowest, item.highest) == (extremes.lowest_C.min(), extremes.highest_C.max())
        assert (item.steps, item.origin) == (("01-boat",), "measured")
        assert item.subgraph_sha256 == measured.subgraphs[name]
        assert len(item.channels) == 2 * len(extremes.lowest_C)
    assert (ranges.policy, ranges.step, ranges.parent_graph_sha256) == (policy, "01-boat", None)
    assert (ranges.graph_sha256, ranges.image_ids) == (measured.graph_sha256, ("0", "1", "2"))
    assert ranges.count("measured") == len(ranges.tensors)


def test_carry_takes_the_parents_range_verbatim_where_nothing_was_trained(measured: Measured, parent: Ranges) -> None:
    ranges = make_ranges(measured, "carry", parent)
    for name, item in parent.tensors.items():
        assert ranges.tensors[name] == msgspec.structs.replace(item, origin="carried")
        assert ranges.tensors[name].steps == ("00-base",)
    assert ranges.tensors.keys() - parent.tensors.keys() == {NEW}
    assert list(ranges.tensors) == list(measured.extremes)
    assert ranges.parent_graph_sha256 == parent.graph_sha256
    assert ranges.graph_sha256 == measured.graph_sha256 != parent.graph_sha256
    narrower = [name for name, item in parent.tensors.items() if measured.extremes[name].highest < item.highest]
    assert len(narrower) > 10


@pytest.mark.parametrize("policy", ["carry", "union"])
def test_a_tensor_that_the_parent_does_not_have_is_measured(
    measured: Measured, parent: Ranges, policy: RangesPolicy
) -> None:
    ranges = make_ranges(measured, policy, parent)
    own = make_ranges(measured, "new-only", None)
    assert ranges.tensors[NEW] == own.tensors[NEW]
    assert [name for name, item in ranges.tensors.items() if item.origin == "measured"] == [NEW]
    assert ranges.tensors[NEW].steps == ("01-boat",)


def test_a_retrained_layer_of_the_same_name_gets_the_envelope_and_so_does_all_behind_it(
    chain: Chain, parent: Ranges, tmp_path: Path
) -> None:
    other = measure(retrained(chain.child, tmp_path / "retrained.onnx"), random_images(2, seed=4), step="01-boat")
    ranges = make_ranges(other, "carry", parent)
    carried = {name for name, item in ranges.tensors.items() if item.origin == "carried"}
    assert carried == {name for name in parent.tensors if name.startswith(BEFORE_IT)}
    for name in parent.tensors.keys() - carried:
        assert ranges.tensors[name].origin == "merged"
        assert ranges.tensors[name].steps == ("00-base", "01-boat")
        assert ranges.tensors[name].subgraph_sha256 == other.subgraphs[name] != parent.tensors[name].subgraph_sha256
        assert_envelope(ranges.tensors[name], parent.tensors[name], other.extremes[name])
    assert (ranges.count("carried"), ranges.count("merged"), ranges.count("measured")) == (4, 18, 1)
    widened = [name for name in parent.tensors if ranges.tensors[name].highest > parent.tensors[name].highest]
    assert any(name.startswith("decoder.") for name in widened)


def test_layers_that_have_changed_places_find_their_ranges_by_what_they_compute(
    chain: Chain, parent: Ranges, tmp_path: Path
) -> None:
    one, two = "branches.1.", "branches.2."

    def swap(name: str) -> str:
        return name.replace(one, "\0").replace(two, one).replace("\0", two)

    path = changed(chain.child, tmp_path / "swapped.onnx", lambda model: with_names(model, swap))
    swapped = measure(path, random_images(1, seed=6), step="01-boat")
    ranges, union = (make_ranges(swapped, policy, parent) for policy in POLICIES[:2])
    for name, item in parent.tensors.items():
        assert ranges.tensors[swap(name)] == msgspec.structs.replace(item, origin="carried")
        assert_envelope(union.tensors[swap(name)], item, swapped.extremes[swap(name)])
    tensor, twin = (f"decoder.{part}0/Relu" for part in (one, two))
    assert ranges.tensors[tensor].highest == parent.tensors[twin].highest != parent.tensors[tensor].highest


def test_a_renamed_layer_that_is_otherwise_the_same_is_carried(chain: Chain, parent: Ranges, tmp_path: Path) -> None:
    def rename(name: str) -> str:
        return name.replace("encoder.stages.", "encoder.blocks.")

    path = changed(chain.child, tmp_path / "renamed.onnx", lambda model: with_names(model, rename))
    renamed = measure(path, random_images(1), step="01-boat")
    ranges = make_ranges(renamed, "carry", parent)
    for name, item in parent.tensors.items():
        assert ranges.tensors[rename(name)] == msgspec.structs.replace(item, origin="carried")
    same = find_silent_channels(measure(chain.child, random_images(1), step="01-boat"), parent)
    assert len(same) > 5
    assert find_silent_channels(renamed, parent) == {rename(name): channels for name, channels in same.items()}


def test_union_is_the_envelope_also_where_nothing_was_trained(measured: Measured, parent: Ranges) -> None:
    ranges = make_ranges(measured, "union", parent)
    for name, item in parent.tensors.items():
        assert (ranges.tensors[name].origin, ranges.tensors[name].steps) == ("merged", ("00-base", "01-boat"))
        assert_envelope(ranges.tensors[name], item, measured.extremes[name])
    assert ranges.policy == "union"


def test_new_only_looks_at_no_parent(measured: Measured, parent: Ranges) -> None:
    ranges = make_ranges(measured, "new-only", parent)
    assert ranges == make_ranges(measured, "new-only", None)
    nonsense = msgspec.structs.replace(parent, tensors={"elsewhere": parent.tensors["Div"]})
    assert make_ranges(measured, "new-only", nonsense) == ranges


def test_weights_only_is_no_policy_for_ranges(measured: Measured) -> None:
    with pytest.raises(ValueError, match="no ranges"):
        make_ranges(measured, "weights-only", None)


def test_growing_from_the_background_changes_the_old_classifiers_and_nothing_before_them(tmp_path: Path) -> None:
    model = small_model((3,), head="deeplab_v2")
    write_float_onnx(model, tmp_path / "base.onnx")
    model.grow(2, "background", background_channel=0)
    write_float_onnx(model, tmp_path / "child.onnx")
    parent = make_ranges(measure(tmp_path / "base.onnx", random_images(2)), "carry", None)
    ranges = make_ranges(measure(tmp_path / "child.onnx", random_images(1), step="01-boat"), "carry", parent)
    found = {name: item.origin for name, item in ranges.tensors.items() if item.origin != "carried"}
    assert found == {
        f"decoder.classifiers.{branch}.steps.{step}/Conv": origin
        for branch in range(4)
        for step, origin in enumerate(["merged", "measured"])
    }


def test_calibrated_again_on_other_images_carried_ranges_are_the_same(chain: Chain, parent: Ranges) -> None:
    again = make_ranges(measure(chain.base, random_images(2, seed=3), step="00-base"), "carry", parent)
    assert again.count("carried") == len(parent.tensors)
    lowered = {name: msgspec.structs.replace(item, origin="measured") for name, item in again.tensors.items()}
    assert lowered == parent.tensors


def test_over_three_steps_each_range_knows_its_steps_and_origin(
    chain: Chain, measured: Measured, parent: Ranges, tmp_path: Path
) -> None:
    second = make_ranges(measured, "carry", parent)
    path = retrained(chain.grandchild, tmp_path / "third.onnx", 1.2)
    third = make_ranges(measure(path, random_images(2, seed=5), step="02-car"), "carry", second)
    for name in parent.tensors:
        item, same = third.tensors[name], name.startswith(BEFORE_IT)
        assert item.origin == ("carried" if same else "merged"), name
        assert item.steps == (("00-base",) if same else ("00-base", "02-car")), name
        if same:
            assert (item.lowest, item.highest) == (parent.tensors[name].lowest, parent.tensors[name].highest)
    assert (third.tensors[NEW].origin, third.tensors[NEW].steps) == ("merged", ("01-boat", "02-car"))
    assert (third.tensors[NEWEST].origin, third.tensors[NEWEST].steps) == ("measured", ("02-car",))
    assert third.parent_graph_sha256 == second.graph_sha256
    union = make_ranges(measure(path, random_images(2, seed=5), step="02-car"), "union", second)
    assert union.tensors["Div"].steps == ("00-base", "02-car")
    both = make_ranges(
        measure(path, random_images(2, seed=5), step="02-car"), "union", make_ranges(measured, "union", parent)
    )
    assert both.tensors["Div"].steps == ("00-base", "01-boat", "02-car")


def test_a_new_classifier_is_carried_from_the_step_that_brought_it(
    chain: Chain, measured: Measured, parent: Ranges
) -> None:
    second = make_ranges(measured, "carry", parent)
    third = make_ranges(measure(chain.grandchild, random_images(2, seed=5), step="02-car"), "carry", second)
    assert third.tensors[NEW] == msgspec.structs.replace(second.tensors[NEW], origin="carried")
    assert third.tensors[NEW].steps == ("01-boat",)
    assert (third.count("carried"), third.count("merged"), third.count("measured")) == (len(second.tensors), 0, 1)


def test_a_step_that_is_measured_twice_is_named_once(chain: Chain, parent: Ranges) -> None:
    again = make_ranges(measure(chain.base, random_images(1), step="00-base"), "union", parent)
    assert {item.steps for item in again.tensors.values()} == {("00-base",)}


numbers = st.floats(-1e4, 1e4, width=32)
channels = st.lists(st.tuples(numbers, numbers).map(sorted), min_size=1, max_size=5)


def synthetic(rows: list[list[float]], step: str, subgraph: str) -> Measured:
    low_C, high_C = np.array(rows, dtype=np.float32).T
    extremes = Extremes(low_C, high_C)
    return Measured(
        step=step,
        image_ids=("0",),
        images_sha256="22",
        graph_sha256=step,
        extremes={"t": extremes},
        mean_extremes={"t": (extremes.lowest, extremes.highest)},
        subgraphs={"t": subgraph},
    )


@given(st.lists(channels, min_size=3, max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_over_any_chain_the_range_of_a_trained_tensor_is_that_of_all_its_images(
    steps: list[list[list[float]]], data: st.DataObject
) -> None:
    count = min(len(rows) for rows in steps)
    ranges: Ranges | None = None
    for number, rows in enumerate(steps):
        policy: RangesPolicy = data.draw(st.sampled_from(["carry", "union"]))
        ranges = make_ranges(synthetic(rows[:count], str(number), f"trained {number}"), policy, ranges)
    assert ranges is not None
    item = ranges.tensors["t"]
    assert item.lowest == min(low for rows in steps for low, _ in rows[:count])
    assert item.highest == max(high for rows in steps for _, high in rows[:count])
    assert item.steps == tuple(str(number) for number in range(len(steps)))


@pytest.mark.parametrize("method", METHODS)
def test_the_measured_range_is_the_extremes_or_the_mean_of_each_images_own(chain: Chain, method: RangesMethod) -> None:
    images_NHWC = random_images(3, seed=2)
    ranges = make_ranges(measure(chain.base, images_NHWC), "carry", None, method=method)
    assert ranges.method == method
    single = [measure(chain.base, image[np.newaxis]).extremes for image in images_NHWC]
    for name, item in ranges.tensors.items():
        lowest = [float(one[name].lowest_C.min()) for one in single]
        highest = [float(one[name].highest_C.max()) for one in single]
        if method == "minmax" or name.startswith("decoder.classifiers"):  # clipped logits tie
            assert (item.lowest, item.highest) == (min(lowest), max(highest))
        else:
            assert item.lowest == float(np.float32(sum(lowest) / 3))
            assert item.highest == float(np.float32(sum(highest) / 3))
            assert item.highest < max(highest) or max(highest) == min(highest)
        assert len(item.channels) == 2 * len(single[0][name].lowest_C)
        passport = read_levels(item.channels, item.lowest, item.highest)
        assert passport.highest == pytest.approx(item.highest, rel=1e-6)


def test_mean_minmax_widens_a_parents_range_and_never_narrows_it(measured: Measured, parent: Ranges) -> None:
    ranges = make_ranges(measured, "union", parent, method="mean-minmax")
    for name, item in parent.tensors.items():
        lowest, highest = (float(np.float32(value)) for value in measured.mean_extremes[name])
        found = ranges.tensors[name]
        assert (found.lowest, found.highest) == (min(item.lowest, lowest), max(item.highest, highest))


def test_mean_minmax_changes_nothing_that_is_carried(measured: Measured, parent: Ranges) -> None:
    carried = make_ranges(measured, "carry", parent).tensors
    mean = make_ranges(measured, "carry", parent, method="mean-minmax").tensors
    assert mean == carried
    first = make_ranges(measured, "carry", None).tensors
    averaged = make_ranges(measured, "carry", None, method="mean-minmax").tensors
    assert [name for name in first if first[name] == averaged[name]] != list(first)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranges]:
    """Ranges of networks that are not the chain's."""
    folder = tmp_path_factory.mktemp("others")
    models = {
        "backbone": small_model(backbone="efficientnet_lite0"),
        "channels": small_model((4, 1)),
    }
    found = {}
    for name, model in models.items():
        write_float_onnx(model, folder / f"{name}.onnx")
        found[name] = make_ranges(measure(folder / f"{name}.onnx", random_images(1), step=name), "carry", None)
    return found


@pytest.mark.parametrize("policy", ["carry", "union"])
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("backbone", r"tensors are not in this graph, 'encoder\.stages\.\d.*' among them"),
        ("channels", r"tensor 'decoder\.classifiers\.0\.steps\.0/Conv' with 4 channels, here it has 3"),
    ],
)
def test_ranges_of_another_network_are_refused_and_a_tensor_is_named(
    measured: Measured, others: dict[str, Ranges], policy: RangesPolicy, other: str, named: str
) -> None:
    with pytest.raises(ExportError, match=rf"another network\n.*step '{other}'\n.*{named}"):
        make_ranges(measured, policy, others[other])
    with pytest.raises(ExportError, match=named):
        find_silent_channels(measured, others[other])


def test_a_child_is_no_parent_of_its_own_parent(chain: Chain, measured: Measured) -> None:
    child = make_ranges(measured, "carry", None)
    with pytest.raises(ExportError, match=rf"1 of 23 tensors are not in this graph, '{NEW}'"):
        make_ranges(measure(chain.base, random_images(1)), "carry", child)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("lowest", "highest"), [(np.nan, np.nan), (0.0, np.inf), (-np.inf, 0.0), (2.0, 1.0)])
def test_what_is_measured_and_is_no_range_is_refused_by_name(
    measured: Measured, parent: Ranges, policy: RangesPolicy, lowest: float, highest: float
) -> None:
    name = "encoder.stages.1.0/Clip"
    count = len(measured.extremes[name].lowest_C)
    broken = Extremes(np.full(count, lowest, np.float32), np.full(count, highest, np.float32))
    other = msgspec.structs.replace(measured, extremes={**measured.extremes, name: broken})
    with pytest.raises(ExportError, match=rf"'{name}': lowest {lowest}, highest {highest}"):
        make_ranges(other, policy, parent)


def test_one_channel_that_is_not_finite_is_enough(measured: Measured) -> None:
    name = "encoder.stages.1.0/Clip"
    extremes = Extremes(*(value.copy() for value in measured.extremes[name]))
    extremes.highest_C[7] = np.nan
    other = msgspec.structs.replace(measured, extremes={**measured.extremes, name: extremes})
    with pytest.raises(ExportError, match=name):
        make_ranges(other, "carry", None)


@pytest.mark.parametrize(("lowest", "highest"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_a_parents_range_that_is_none_is_refused_by_name(
    measured: Measured, parent: Ranges, lowest: float, highest: float
) -> None:
    name = "encoder.stem/Clip"
    item = msgspec.structs.replace(parent.tensors[name], lowest=lowest, highest=highest)
    with pytest.raises(ExportError, match=name):
        make_ranges(measured, "carry", msgspec.structs.replace(parent, tensors={**parent.tensors, name: item}))


CHANNEL = 5


def red_alone(path: Path, to: Path) -> Path:
    """A stem whose channel `CHANNEL` is alive where an image is red, and zero behind its activation elsewhere."""

    def weight(value: NDArray[np.float32]) -> NDArray[np.float32]:
        value[CHANNEL] = 0.0
        value[CHANNEL, :, 1, 1] = (1.0, -1.0, -1.0)
        return value

    def bias(value: NDArray[np.float32]) -> NDArray[np.float32]:
        value[CHANNEL] = -1.0  # black is -(-1) - (-1) + (-1) = 1 before it
        return value

    def change(model: onnx.ModelProto) -> onnx.ModelProto:
        return with_constant(with_constant(model, "encoder.stem.conv.weight", weight), "encoder.stem.conv.bias", bias)

    return changed(path, to, change)


def test_a_channel_that_only_the_parents_images_excite_is_found_and_keeps_its_range(
    chain: Chain, tmp_path: Path
) -> None:
    base, child = (red_alone(path, tmp_path / path.name) for path in (chain.base, chain.child))
    before = measure(base, np.concatenate([flat_images(RED), flat_images(BLUE)]))
    parent = make_ranges(before, "carry", None)
    now = measure(child, flat_images(BLUE), step="01-boat")
    name = "encoder.stem/Clip"
    assert before.extremes[name].highest_C[CHANNEL] > 1.0
    assert now.extremes[name].highest_C[CHANNEL] < 0.02
    silent = find_silent_channels(now, parent)
    assert CHANNEL in silent[name]
    for tensor, found in silent.items():
        for channel in found:
            span = before.extremes[tensor].highest_C[channel] - before.extremes[tensor].lowest_C[channel]
            span_now = now.extremes[tensor].highest_C[channel] - now.extremes[tensor].lowest_C[channel]
            assert span_now < 0.05 * (span + 2 / 255 * (parent.tensors[tensor].highest - parent.tensors[tensor].lowest))
    assert make_ranges(now, "carry", parent).tensors[name].highest == parent.tensors[name].highest
    assert NEW not in silent


def test_on_the_parents_own_images_no_channel_is_silent(chain: Chain, parent: Ranges) -> None:
    assert find_silent_channels(measure(chain.child, random_images(3), step="01-boat"), parent) == {}


def test_a_channel_that_never_was_alive_is_not_called_silent_after_many_steps(chain: Chain, tmp_path: Path) -> None:
    def dead(value: NDArray[np.float32]) -> NDArray[np.float32]:
        value[CHANNEL] = 0.0
        return value

    path = changed(
        chain.base, tmp_path / "dead.onnx", lambda model: with_constant(model, "encoder.stem.conv.weight", dead)
    )
    images_NHWC = random_images(1)
    ranges = make_ranges(measure(path, images_NHWC), "carry", None)
    for number in range(1, 13):
        step = measure(path, images_NHWC, step=f"{number:02d}")
        assert find_silent_channels(step, ranges) == {}, number
        ranges = make_ranges(step, "union", ranges)
