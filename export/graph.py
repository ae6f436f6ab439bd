"""Changes to an ONNX graph, each a small step that leaves the results of the graph as they were.

1. After `name_by_module`, every node, tensor and constant is named after the torch module it comes from. A name does
   not depend on what lies behind it in the graph, so a larger head renames nothing in the encoder.
2. After `strip_notes`, the file says nothing of the machine or the source files it was made from.
3. `keep_outputs` leaves no node that no kept output needs.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from edge_ilseg.errors import ExportError
from edge_ilseg.files import write_bytes

MODULE_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules around a node: a list of paths, the outermost first, then the operation."""

EXPORTER_HINT = "install the versions of torch, onnx and onnxscript that constraints.txt names"


def write_onnx(path: Path, model: onnx.ModelProto) -> None:
    """Check `model` and write it, the same bytes for the same content.

    Raises:
        ExportError: the graph is not valid ONNX.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "the exported graph is not valid ONNX", where=path, found=str(error), hint=EXPORTER_HINT
        ) from error
    write_bytes(path, model.SerializeToString(deterministic=True))


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the default operator set."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def keep_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of `model` with only the outputs `names`, in the model's order, and without what only the others need.

    Raises:
        ValueError: a name is no output of the model.
    """
    kept = set(names)
    unknown = kept - {output.name for output in model.graph.output}
    if unknown:
        raise ValueError(f"no such output: {sorted(unknown)}")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    needed = set(kept)
    nodes = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            nodes.append(node)
    outputs = [output for output in model.graph.output if output.name in kept]
    dropped = {output.name: output for output in model.graph.output if output.name not in kept}
    constants = [item for item in graph.initializer if item.name in needed]
    shapes = [info for info in graph.value_info if info.name in needed]
    shapes += [info for name, info in dropped.items() if name in needed]
    _refill(graph.node, list(reversed(nodes)))
    _refill(graph.output, outputs)
    _refill(graph.initializer, constants)
    _refill(graph.value_info, shapes)
    return result


def set_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace the model's `metadata_props` by `metadata`, sorted by key."""
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))


def strip_notes(model: onnx.ModelProto) -> None:
    """Remove documentation strings and the exporter's notes, which hold paths of this machine (rule 2)."""
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


def fold_padding(model: onnx.ModelProto) -> None:
    """Move every Pad with zeros into the convolution behind it, which can pad unevenly by itself.

    A Pad stays where it pads other than with zeros, or other axes than the convolution's, or feeds anything else.
    """
    graph = model.graph
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {output.name: [] for output in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        behind = readers.get(pad.output[0], [])
        amounts = _zero_padding(pad, constants)
        if amounts is None or len(behind) != 1 or behind[0].op_type != "Conv" or behind[0].input[0] != pad.output[0]:
            continue
        conv = behind[0]
        rank = len(amounts) // 2
        if any(amounts[:2]) or any(amounts[rank : rank + 2]):
            continue
        attributes = {item.name: item for item in conv.attribute}
        if attributes.get("auto_pad", onnx.helper.make_attribute("auto_pad", "NOTSET")).s != b"NOTSET":
            continue
        own = list(attributes["pads"].ints) if "pads" in attributes else [0] * (2 * rank - 4)
        added = amounts[2:rank] + amounts[rank + 2 :]
        pads = onnx.helper.make_attribute("pads", [one + two for one, two in zip(own, added, strict=True)])
        _refill(conv.attribute, [item for item in conv.attribute if item.name != "pads"] + [pads])
        conv.input[0] = pad.input[0]
        graph.node.remove(pad)


def _zero_padding(pad: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]) -> list[int] | None:
    """The amounts of a Pad of all axes with constant zeros, begins before ends; None for any other Pad."""
    mode = next((item.s for item in pad.attribute if item.name == "mode"), b"constant")
    inputs = [*pad.input, "", ""][:4]
    value = constants.get(inputs[2])
    if mode != b"constant" or inputs[1] not in constants or inputs[3] or (inputs[2] and (value is None or value.any())):
        return None
    return [int(amount) for amount in constants[inputs[1]]]


def name_by_module(model: onnx.ModelProto, *, wrapper: str, parameters: Collection[str]) -> None:
    """Name nodes, tensors and constants after torch modules (rule 1) and order constants by first use.

    A node becomes `<module path>/<operation>`, numbered where a module has several, and its output is named as it;
    a parameter keeps its state-dict name; any other constant becomes `<first node that reads it>/<its input there>`.
    Inputs and outputs of the graph keep their names. Shapes of tensors are inferred anew.

    Args:
        model: as the torch exporter made it, with its notes still in place; changed in place.
        wrapper: prefix of the state-dict names that is left out, as `"model."`.
        parameters: state-dict names of the exported module.
    """
    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    renamed = {item.name: item.name for item in (*graph.input, *graph.output)}
    used: set[str] = set(renamed)
    ordered: list[onnx.TensorProto] = []
    for node in graph.node:
        module = _module_of(node, constants, wrapper)
        node.name = _unused(f"{module}/{node.op_type}" if module else node.op_type, used)
        for position, name in enumerate(node.input):
            if name in constants and name not in renamed:
                renamed[name] = _unused(_constant_name(node, position, wrapper, parameters), used)
                ordered.append(constants[name])
        for position, name in enumerate(node.output):
            if name not in renamed:
                renamed[name] = node.name if position == 0 else f"{node.name}:{position}"
    for node in graph.node:
        _refill(node.input, [renamed.get(name, name) for name in node.input])
        _refill(node.output, [renamed.get(name, name) for name in node.output])
    for item in ordered:
        item.name = renamed[item.name]
    _refill(graph.initializer, ordered)
    del graph.value_info[:]
    model.CopyFrom(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))


def _module_of(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], wrapper: str) -> str:
    """Path of the module that owns the node's weight, else of the one that the exporter noted, else an empty string."""
    for name in node.input:
        if name in constants and name.endswith(".weight"):
            return str(name).removesuffix(".weight").removeprefix(wrapper)
    for note in node.metadata_props:
        if note.key == MODULE_SCOPES_KEY:
            scopes = ast.literal_eval(note.value)
            return f"{scopes[-2]}.".removeprefix(wrapper).removesuffix(".") if len(scopes) > 1 else ""
    return ""


def _constant_name(node: onnx.NodeProto, position: int, wrapper: str, parameters: Collection[str]) -> str:
    """A state-dict name for a parameter; for the bias that a folded batch norm left, that of its convolution's bias."""
    name = str(node.input[position])
    if name in parameters:
        return name.removeprefix(wrapper)
    if node.op_type == "Conv" and position == 2 and node.input[1] in parameters:
        return str(node.input[1]).removeprefix(wrapper).removesuffix("weight") + "bias"
    schema = onnx.defs.get_schema(node.op_type)
    return f"{node.name}/{schema.inputs[min(position, len(schema.inputs) - 1)].name}"


def _unused(name: str, used: set[str]) -> str:
    candidate, number = name, 1
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    used.add(candidate)
    return candidate


def _refill(field: Any, items: Sequence[Any]) -> None:
    """Replace the content of a repeated protobuf field; `items` may be elements of it."""
    copies = [copy.deepcopy(item) for item in items]
    del field[:]
    field.extend(copies)
