"""How much of an int8 model a step will change, estimated before it is trained. `export` counts it afterwards.

1. A convolution has changed when a parameter of it or of its batch norm, which is folded into it, is trained: all its
   int8 weights count, and for each output channel a bias and the scales of weights and bias, 4 bytes each.
2. Each classifier of the head gets one layer more, which has to be described: `NEW_LAYER_BYTES` in each runtime's
   form, as found in real bundles. Frozen layers cost nothing.
3. Bytes are counted as `edge_ilseg.export.delta` counts them: uncompressed, against the parent's model for the same
   runtime. Where an export keeps layers in float, or changes the ranges of frozen layers, it is more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
from torch import nn

from edge_ilseg.bundle import Runtime

if TYPE_CHECKING:
    from edge_ilseg.models.segmentation import SegmentationModel

CHANNEL_BYTES = 12
NEW_LAYER_BYTES: dict[Runtime, int] = {"onnxruntime": 2_700, "openvino": 12_000}


class UpdateEstimate(msgspec.Struct, frozen=True):
    """Bytes of an int8 model; an estimate."""

    parameter_bytes: int
    """Of all its convolutions."""
    changed_bytes: dict[Runtime, int]
    """New to a device that has the parent's model, by runtime; at step 0 everything is."""


def estimate_update(model: SegmentationModel, *, is_first: bool) -> UpdateEstimate:
    """Estimate from what is frozen (rules 1 and 2).

    Args:
        model: of the step, frozen as it will be trained.
        is_first: there is no parent: every layer is new.
    """
    layers = [(_int8_bytes(conv), is_trained) for conv, is_trained in _convolutions(model)]
    parameter_bytes = sum(size for size, _ in layers)
    changed = parameter_bytes if is_first else sum(size for size, is_trained in layers if is_trained)
    new_layers = 0 if is_first else len(model.classifiers)
    return UpdateEstimate(
        parameter_bytes,
        {runtime: changed + new_layers * description for runtime, description in NEW_LAYER_BYTES.items()},
    )


def _int8_bytes(conv: nn.Conv2d) -> int:
    return conv.weight.numel() + CHANNEL_BYTES * conv.out_channels


def _convolutions(model: SegmentationModel) -> Iterator[tuple[nn.Conv2d, bool]]:
    """Each convolution, and whether it or its batch norm is trained; reserved channels are never exported."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or name.endswith(".reserved"):
            continue
        holder = model.get_submodule(name.rpartition(".")[0])
        norms = [item for item in holder.children() if isinstance(item, nn.BatchNorm2d)]
        parameters = [*module.parameters(), *(parameter for norm in norms for parameter in norm.parameters())]
        yield module, any(parameter.requires_grad for parameter in parameters)
