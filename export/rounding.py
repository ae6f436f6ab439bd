"""Which way each weight is rounded: fitted to what its layer reads, or carried from the parent.

1. Rounding each weight to its nearest level makes the least error in the weights, and not in what the layer computes.
   Fitted levels q make E[((w - s q) . x)^2] small: the weights are rounded one after another, and what one has lost is
   made up by those that are still to come (Frantar et al. 2022, GPTQ, arXiv 2210.17323, algorithm 1, after Hassibi and
   Stork's optimal brain surgeon; here in the order of falling E[x_k^2], its "act-order").
2. What is left of the error on average is taken from the bias: b + (w - s q) . E[x] (Nagel et al. 2019, arXiv
   1906.04721, section 4.2).
3. A layer whose output depends on nothing but frozen parts takes the parent's levels, verbatim, where the parent has it
   in int8 with the same scale: the images at hand do not show what the old classes need. So under `carry`, where its
   bias is the parent's, too, and under `union`, where the scale of what it reads may have moved: the parent's bias is
   then written in the new one. Under `new-only` nothing is taken from the parent.
4. Scales are not touched: they are those of the quantizer, and so is the highest level.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.calibration.collect import fused_outputs
from edge_ilseg.calibration.moments import Moments
from edge_ilseg.calibration.ranges import Ranges

DAMPING = 0.01
"""Of the mean second moment, added to each (GPTQ, section 3.3): keeps what is silent on these images where it is."""
COLUMNS = 64
"""So many are rounded before those behind them are told (GPTQ, "lazy batch updates"): the same sums, in cache."""
INT32 = np.iinfo(np.int32)


class Rounding(NamedTuple):
    """What decides the levels of the weights."""

    moments: Callable[[Collection[str]], Mapping[str, Moments]]
    """Moments of some convolutions of the float graph, by the names of their nodes; one that is left out keeps the
    nearest levels."""
    parent: Mapping[str, bytes]
    """Constants of the parent's int8 model, by name; without any, nothing is carried."""
    frozen: Collection[str] = ()
    """Hashes of what the parent's ranges have (`calibration.subgraph`): a tensor with one of them is the parent's."""


class _Layer(NamedTuple):
    """A quantized convolution, and its constants in the QDQ graph."""

    node: onnx.NodeProto
    levels: onnx.TensorProto
    scale: onnx.TensorProto
    bias: onnx.TensorProto | None
    bias_scale: onnx.TensorProto | None


def round_weights(quantized: onnx.ModelProto, model: onnx.ModelProto, ranges: Ranges, rounding: Rounding) -> None:
    """Put the levels and biases of rules 1 to 3 in the place of those of the quantizer.

    Args:
        quantized: the QDQ graph, each weight at its nearest level; changed in place.
        model: the float graph that it was made from.
        ranges: what it was made with.
        rounding: moments and the parent's constants.
    """
    weights = {item.name: item for item in model.graph.initializer}
    frozen = _frozen_nodes(model, ranges, rounding.frozen)
    to_fit = []
    for layer in _layers(quantized, model):
        before = _find_parents(layer, rounding.parent) if layer.node.name in frozen else None
        if before is None:
            to_fit.append(layer)
            continue
        layer.levels.raw_data = before[0]
        if layer.bias is not None:
            layer.bias.raw_data = before[1]
    moments = rounding.moments([layer.node.name for layer in to_fit])
    for layer in to_fit:
        if layer.node.name in moments:
            weight = onnx.numpy_helper.to_array(weights[layer.node.input[1]])
            lost_GOK = _fit(layer, weight, moments[layer.node.name])
            _correct(layer, lost_GOK, moments[layer.node.name])


def _layers(quantized: onnx.ModelProto, model: onnx.ModelProto) -> list[_Layer]:
    constants = {item.name: item for item in quantized.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv" and f"{node.input[1]}_quantized" in constants:
            bias = f"{node.input[2]}_quantized" if len(node.input) > 2 else ""
            scales = (constants[f"{node.input[1]}_scale"], constants.get(f"{bias}_scale"))
            found.append(
                _Layer(node, constants[f"{node.input[1]}_quantized"], scales[0], constants.get(bias), scales[1])
            )
    return found


def _frozen_nodes(model: onnx.ModelProto, ranges: Ranges, hashes: Collection[str]) -> frozenset[str]:
    """Names of the convolutions whose output is the parent's in float (rule 3)."""
    if ranges.policy == "new-only":
        return frozenset()
    fused = fused_outputs(model)
    outputs = {node.name: node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    tensors = {name: ranges.tensors.get(fused.get(output, output)) for name, output in outputs.items()}
    return frozenset(
        name for name, tensor in tensors.items() if tensor is not None and tensor.subgraph_sha256 in hashes
    )


def _find_parents(layer: _Layer, parent: Mapping[str, bytes]) -> tuple[bytes, bytes] | None:
    """The parent's levels and bias of a layer, where it has them and the levels mean the same: with the same scale."""
    levels = parent.get(layer.levels.name)
    scale = onnx.numpy_helper.to_array(layer.scale)
    if levels is None or _parents_scale(layer.scale, layer.node.input[1], parent) != scale.tobytes():
        return None
    if layer.bias is None or layer.bias_scale is None:
        return levels, b""
    bias, before = parent.get(layer.bias.name), _parents_scale(layer.bias_scale, layer.node.input[2], parent)
    now_O = onnx.numpy_helper.to_array(layer.bias_scale)
    if bias is None or before is None or not len(bias) == len(before) == now_O.nbytes:
        return None
    if before == now_O.tobytes():
        return levels, bias
    value_O = np.frombuffer(bias, np.int32) * np.frombuffer(before, np.float32).astype(np.float64)
    return levels, _int32(value_O / now_O.reshape(-1))


def _parents_scale(scale: onnx.TensorProto, scaled: str, parent: Mapping[str, bytes]) -> bytes | None:
    """In an ONNX file a scale has its own name; OpenVINO calls it the second input of what it scales."""
    return parent.get(scale.name, parent.get(f"{scaled}_DequantizeLinear/1"))


def _int32(values: NDArray[np.float64]) -> bytes:
    return np.rint(values).clip(INT32.min, INT32.max).astype(np.int32).tobytes()


def fit_levels(ratio_GOK: NDArray[np.float64], second_GKK: NDArray[np.float64], highest: int) -> NDArray[np.float64]:
    """Integers q in -highest..highest that make (r - q)^T H (r - q) small for each row r of `ratio_GOK` (rule 1).

    Args:
        ratio_GOK: float64, G groups of O rows: weights over their scale.
        second_GKK: H = E[x x^T], float64, one matrix for the rows of each group.
        highest: the highest level.
    """
    power_GK = np.diagonal(second_GKK, axis1=1, axis2=2)
    mean_G = power_GK.mean(axis=1)
    damping_G = np.where(mean_G > 0, DAMPING * mean_G, 1.0)
    order_GK = np.argsort(-power_GK, axis=1, kind="stable")
    damped_GKK = second_GKK + damping_G[:, np.newaxis, np.newaxis] * np.eye(second_GKK.shape[1])
    damped_GKK = np.take_along_axis(damped_GKK, order_GK[:, :, np.newaxis], axis=1)
    damped_GKK = np.take_along_axis(damped_GKK, order_GK[:, np.newaxis, :], axis=2)
    # H^-1 = L L^T: row k of L^T is row k of the inverse that is left when the values before it are gone, over a root.
    upper_GKK = np.linalg.cholesky(np.linalg.inv(damped_GKK)).transpose(0, 2, 1)
    left_GOK = np.take_along_axis(ratio_GOK, order_GK[:, np.newaxis, :], axis=2)
    for start in range(0, left_GOK.shape[2], COLUMNS):
        stop = min(start + COLUMNS, left_GOK.shape[2])
        errors_GOC = np.empty((*left_GOK.shape[:2], stop - start))
        for k in range(start, stop):
            level_GO = np.rint(left_GOK[:, :, k]).clip(-highest, highest)
            error_GO = (left_GOK[:, :, k] - level_GO) / upper_GKK[:, k, k, np.newaxis]
            left_GOK[:, :, k + 1 : stop] -= error_GO[:, :, np.newaxis] * upper_GKK[:, np.newaxis, k, k + 1 : stop]
            left_GOK[:, :, k] = level_GO
            errors_GOC[:, :, k - start] = error_GO
        left_GOK[:, :, stop:] -= errors_GOC @ upper_GKK[:, start:stop, stop:]
    levels_GOK = np.empty_like(left_GOK)
    np.put_along_axis(levels_GOK, np.broadcast_to(order_GK[:, np.newaxis, :], left_GOK.shape), left_GOK, axis=2)
    return levels_GOK


def _fit(layer: _Layer, weight: NDArray[np.float32], moments: Moments) -> NDArray[np.float64]:
    """Fill in the fitted levels of one layer, and return what its weights have lost: w - s q."""
    groups, size = moments.mean_GK.shape
    nearest = onnx.numpy_helper.to_array(layer.levels)
    highest = int(np.abs(nearest.astype(np.int64)).max())
    weight_GOK = weight.astype(np.float64).reshape(groups, -1, size)
    scale_GO1 = onnx.numpy_helper.to_array(layer.scale).astype(np.float64).reshape(groups, -1, 1)
    fitted, start = [], 0
    for second_GKK in moments.blocks_GKK:
        part = slice(start, start + second_GKK.shape[1])
        fitted.append(fit_levels(weight_GOK[:, :, part] / scale_GO1, second_GKK, highest))
        start = part.stop
    levels_GOK = np.concatenate(fitted, axis=2)
    layer.levels.raw_data = levels_GOK.reshape(weight.shape).astype(np.int8).tobytes()
    return weight_GOK - scale_GO1 * levels_GOK


def _correct(layer: _Layer, lost_GOK: NDArray[np.float64], moments: Moments) -> None:
    """Rule 2."""
    if layer.bias is None or layer.bias_scale is None:
        return
    shift_O = np.einsum("gok,gk->go", lost_GOK, moments.mean_GK).reshape(-1)
    scale_O = onnx.numpy_helper.to_array(layer.bias_scale).astype(np.float64)
    layer.bias.raw_data = _int32(onnx.numpy_helper.to_array(layer.bias) + np.rint(shift_O / scale_O))
