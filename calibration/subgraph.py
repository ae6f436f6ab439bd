"""What a tensor depends on, as one hash: two tensors with the same hash take the same values on every image.

1. The hash covers the operations on the way from the graph's inputs to the tensor, their attributes and order, every
   constant (type, shape and bytes) and the inputs' own positions, types and shapes.
2. It covers no name, so that a renamed layer is the same layer and a retrained layer of the same name is another one.
3. The operator sets count too: one operation may mean something else in another set.
"""

from __future__ import annotations

import hashlib

import onnx


def subgraph_hashes(model: onnx.ModelProto) -> dict[str, str]:
    """SHA-256, hexadecimal, of every tensor of the graph: inputs, constants and outputs of nodes, by name.

    Raises:
        ValueError: the nodes do not stand in the order in which they can be computed.
    """
    opsets = sorted(f"{entry.domain}:{entry.version}" for entry in model.opset_import)
    hashes = {"": _hash(b"absent")}  # an optional input that is left out
    for position, item in enumerate(model.graph.input):
        hashes[item.name] = _hash(b"input", str(position).encode(), item.type.SerializeToString(deterministic=True))
    for constant in model.graph.initializer:
        value = onnx.numpy_helper.to_array(constant)
        hashes[constant.name] = _hash(b"constant", value.dtype.str.encode(), str(value.shape).encode(), value.tobytes())
    for node in model.graph.node:
        unknown = [name for name in node.input if name not in hashes]
        if unknown:
            raise ValueError(f"node {node.name!r} reads {unknown[0]!r} before it is computed")
        operation = _hash(
            "\n".join(opsets).encode(),
            f"{node.domain}:{node.op_type}".encode(),
            *(_attribute_bytes(item) for item in sorted(node.attribute, key=lambda item: item.name)),
            *(hashes[name].encode() for name in node.input),
        )
        for position, name in enumerate(node.output):
            hashes[name] = _hash(operation.encode(), str(position).encode())
    del hashes[""]
    return hashes


def _attribute_bytes(attribute: onnx.AttributeProto) -> bytes:
    bare = onnx.AttributeProto()
    bare.CopyFrom(attribute)
    bare.doc_string = ""
    serialized: bytes = bare.SerializeToString(deterministic=True)
    return serialized


def _hash(*parts: bytes) -> str:
    """SHA-256 of the parts, each with its length before it, so that no two lists of parts read the same."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
