"""From measured extremes to the ranges of a step: its own, its parent's, or the envelope of both.

| policy         | a tensor that depends on nothing but frozen parts | any other tensor                          |
|----------------|---------------------------------------------------|-------------------------------------------|
| `carry`        | the parent's range, verbatim                      | envelope of the parent's and the measured |
| `union`        | envelope of the parent's and the measured         | the same                                  |
| `new-only`     | the measured range                                | the same                                  |

1. Frozen is what the hashes say: the parent's ranges have a tensor with the same hash (`calibration.subgraph`). Its
   name is not looked at.
2. Any other tensor finds its parent's range by name. A tensor that the parent does not have is measured.
3. Every tensor of the parent must be in the graph with as many channels: a step only adds to a network.
4. `weights-only` has no ranges; it is not a case here.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from edge_ilseg.calibration.passport import Extremes, read_levels, silent_channels, write_levels
from edge_ilseg.calibration.ranges import FORMAT_VERSION, Ranges, TensorRange, check_range, check_ranges
from edge_ilseg.errors import ExportError
from edge_ilseg.int8_record import RangesMethod, RangesPolicy


class Measured(msgspec.Struct, frozen=True):
    """What `collect_extremes` found out about one float graph on some images."""

    step: str
    image_ids: tuple[str, ...]
    images_sha256: str
    graph_sha256: str
    extremes: dict[str, Extremes]
    """Of every quantized tensor, in graph order."""
    mean_extremes: dict[str, tuple[float, float]]
    """The lowest and the highest value of each tensor in one image, averaged over the images; over all images for
    logits, which feed no convolution: clipped logits tie, and a tie goes to the older class."""
    subgraphs: dict[str, str]
    """Hash of what each of these tensors depends on."""


def make_ranges(
    measured: Measured, policy: RangesPolicy, parent: Ranges | None, *, method: RangesMethod = "minmax"
) -> Ranges:
    """The ranges of a step under a policy.

    Args:
        measured: on the step's own images.
        policy: `carry`, `union` or `new-only`; without a parent all three give what was measured.
        parent: ranges of the parent step; not looked at under `new-only`.
        method: what the measured range is: `minmax`, over all images, or `mean-minmax`, the average of each image's.

    Raises:
        ExportError: a range breaks rule 1 of `calibration.ranges`, or the parent's ranges are of another network
            (rule 3).
        ValueError: the policy is `weights-only` (rule 4).
    """
    if policy == "weights-only":
        raise ValueError("weights-only needs no ranges")
    for name, extremes in measured.extremes.items():
        check_range(name, extremes.lowest, extremes.highest)
    used = None if policy == "new-only" else parent
    if used is None:
        tensors = {name: _own_range(measured, name, method) for name in measured.extremes}
    else:
        check_ranges(used)
        _check_same_network(measured, used)
        tensors = _with_parent(measured, used, method, carry=policy == "carry")
    return Ranges(
        format="edge-ilseg-ranges",
        format_version=FORMAT_VERSION,
        method=method,
        policy=policy,
        step=measured.step,
        image_ids=measured.image_ids,
        images_sha256=measured.images_sha256,
        graph_sha256=measured.graph_sha256,
        parent_graph_sha256=None if used is None else used.graph_sha256,
        tensors=tensors,
    )


def find_silent_channels(measured: Measured, parent: Ranges) -> dict[str, tuple[int, ...]]:
    """Channels of the parent's tensors that the measured images do not excite, by tensor; only tensors with some.

    Raises:
        ExportError: the parent's ranges are of another network.
    """
    _check_same_network(measured, parent)
    found = {
        name: silent_channels(_read(before), measured.extremes[name])
        for name, before in _find_before(measured, parent).items()
    }
    return {name: channels for name, channels in found.items() if channels}


def _find_before(measured: Measured, parent: Ranges) -> dict[str, TensorRange]:
    """The parent's range of each tensor that it has (rules 1 and 2)."""
    by_hash = {item.subgraph_sha256: item for item in parent.tensors.values()}
    found = {name: by_hash.get(measured.subgraphs[name]) or parent.tensors.get(name) for name in measured.extremes}
    return {name: item for name, item in found.items() if item is not None}


def _with_parent(measured: Measured, parent: Ranges, method: RangesMethod, *, carry: bool) -> dict[str, TensorRange]:
    known = _find_before(measured, parent)
    tensors = {}
    for name in measured.extremes:
        before = known.get(name)
        if before is None:
            tensors[name] = _own_range(measured, name, method)
        elif carry and before.subgraph_sha256 == measured.subgraphs[name]:
            tensors[name] = msgspec.structs.replace(before, origin="carried")
        else:
            tensors[name] = _envelope(measured, name, before, method)
    return tensors


def _range_of(measured: Measured, name: str, method: RangesMethod) -> tuple[float, float]:
    """Lowest and highest value, as float32 has them."""
    if method == "minmax":
        return measured.extremes[name].lowest, measured.extremes[name].highest
    lowest, highest = measured.mean_extremes[name]
    return float(np.float32(lowest)), float(np.float32(highest))


def _own_range(measured: Measured, name: str, method: RangesMethod) -> TensorRange:
    lowest, highest = _range_of(measured, name, method)
    return TensorRange(
        lowest=lowest,
        highest=highest,
        steps=(measured.step,),
        origin="measured",
        subgraph_sha256=measured.subgraphs[name],
        channels=write_levels(measured.extremes[name], lowest, highest),
    )


def _envelope(measured: Measured, name: str, before: TensorRange, method: RangesMethod) -> TensorRange:
    own_lowest, own_highest = _range_of(measured, name, method)
    lowest, highest = min(before.lowest, own_lowest), max(before.highest, own_highest)
    return TensorRange(
        lowest=lowest,
        highest=highest,
        steps=_joined(before.steps, (measured.step,)),
        origin="merged",
        subgraph_sha256=measured.subgraphs[name],
        channels=write_levels(_read(before).merge(measured.extremes[name]), lowest, highest),
    )


def _joined(*names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in names for name in part))


def _read(tensor: TensorRange) -> Extremes:
    return read_levels(tensor.channels, tensor.lowest, tensor.highest)


def _check_same_network(measured: Measured, parent: Ranges) -> None:
    """Rule 3."""
    hashes = set(measured.subgraphs.values())
    missing = [
        name
        for name, item in parent.tensors.items()
        if name not in measured.extremes and item.subgraph_sha256 not in hashes
    ]
    other = {
        name: (len(item.channels) // 2, len(measured.extremes[name].lowest_C))
        for name, item in _find_before(measured, parent).items()
        if len(item.channels) // 2 != len(measured.extremes[name].lowest_C)
    }
    if not missing and not other:
        return
    if missing:
        found = f"{len(missing)} of {len(parent.tensors)} tensors are not in this graph, {missing[0]!r} among them"
    else:
        name, (before, now) = next(iter(other.items()))
        found = f"tensor {name!r} with {before} channels, here it has {now}"
    raise ExportError(
        "the parent's ranges are of another network",
        where=f"ranges of step {parent.step!r}",
        found=found,
        expected="ranges of the step that this one was trained from",
        hint="give the bundle of the parent step (--parent)",
    )
