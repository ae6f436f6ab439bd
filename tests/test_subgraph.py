"""Hashes of what tensors depend on: the same whatever things are called, another after any change."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fakes import random_images, small_model, with_constant, with_names
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_ilseg.calibration.subgraph import subgraph_hashes
from edge_ilseg.export.float_onnx import write_float_onnx

WEIGHT = "encoder.stages.1.0.conv.weight"
CONV = "encoder.stages.1.0.conv/Conv"


@pytest.fixture(scope="module")
def parent_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parent") / "float.onnx"
    write_float_onnx(small_model(), path)
    return path


@pytest.fixture(scope="module")
def child_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    grown = small_model()
    grown.grow(2, "scaled")
    path = tmp_path_factory.mktemp("child") / "float.onnx"
    write_float_onnx(grown, path)
    return path


@pytest.fixture(scope="module")
def parent(parent_path: Path) -> onnx.ModelProto:
    return onnx.load(parent_path)


@pytest.fixture(scope="module")
def child(child_path: Path) -> onnx.ModelProto:
    return onnx.load(child_path)


def dependent_on(model: onnx.ModelProto, roots: set[str]) -> set[str]:
    """`roots`, and every tensor that is computed from one of them, by a plain loop."""
    found = set(roots)
    for node in model.graph.node:
        if any(name in found for name in node.input):
            found.update(node.output)
    return found


def changed(before: onnx.ModelProto, after: onnx.ModelProto) -> set[str]:
    hashes, others = subgraph_hashes(before), subgraph_hashes(after)
    assert hashes.keys() == others.keys()
    return {name for name in hashes if hashes[name] != others[name]}


def shifted_by_one(value: NDArray[Any]) -> NDArray[Any]:
    value.flat[5] = np.nextafter(value.flat[5], np.float32(1.0))
    return value


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = (node for node in model.graph.node if node.name == name)
    assert isinstance(found, onnx.NodeProto)
    return found


def all_values(path: Path, names: list[str], image_HWC: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"image": image_HWC[np.newaxis]}), strict=True))


def small_graph(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_every_input_constant_and_output_of_a_node_has_a_sha256(parent: onnx.ModelProto) -> None:
    graph = parent.graph
    names = {item.name for item in (*graph.input, *graph.initializer)} | {name for n in graph.node for name in n.output}
    hashes = subgraph_hashes(parent)
    assert hashes.keys() == names
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes.values())


def test_other_names_give_the_same_hashes(parent: onnx.ModelProto) -> None:
    renamed = subgraph_hashes(with_names(parent, lambda name: f"other.{name}.too"))
    hashes = subgraph_hashes(parent)
    kept = {"image", "logits", "mask"}
    assert renamed == {name if name in kept else f"other.{name}.too": value for name, value in hashes.items()}


def test_another_name_of_the_input_gives_the_same_hashes(parent: onnx.ModelProto) -> None:
    renamed = onnx.ModelProto()
    renamed.CopyFrom(parent)
    renamed.graph.input[0].name = "picture"
    for node in renamed.graph.node:
        node.input[:] = ["picture" if name == "image" else name for name in node.input]
    assert subgraph_hashes(renamed)["logits"] == subgraph_hashes(parent)["logits"]


def test_two_inputs_of_one_type_are_not_the_same_tensor() -> None:
    model = small_graph([helper.make_node("Sub", ["x", "z"], ["y"])])
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2]))
    hashes = subgraph_hashes(model)
    assert hashes["x"] != hashes["z"]


def test_notes_shapes_and_the_order_of_constants_do_not_count(parent: onnx.ModelProto) -> None:
    noted = onnx.ModelProto()
    noted.CopyFrom(parent)
    graph = noted.graph
    noted.producer_name, noted.doc_string, graph.name = "another exporter", "note", "another graph"
    constants = list(reversed([deepcopy(item) for item in graph.initializer]))
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.value_info[:]
    for node in graph.node:
        node.doc_string = "note"
        node.metadata_props.add(key="key", value="value")
        attributes = list(reversed([deepcopy(item) for item in node.attribute]))
        del node.attribute[:]
        node.attribute.extend(attributes)
        for attribute in node.attribute:
            attribute.doc_string = "note"
    assert changed(parent, noted) == set()


def test_one_bit_of_one_weight_changes_what_depends_on_it_and_nothing_else(parent: onnx.ModelProto) -> None:
    found = changed(parent, with_constant(parent, WEIGHT, shifted_by_one))
    assert found == dependent_on(parent, {WEIGHT})
    assert {CONV, "encoder.stages.2.1/Clip", "logits", "mask"} <= found
    assert "encoder.stages.0.1/Clip" not in found


def test_one_attribute_changes_what_depends_on_its_node_and_nothing_else(parent: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(parent)
    (strides,) = (item for item in node_of(other, CONV).attribute if item.name == "strides")
    strides.ints[:] = [value + 1 for value in strides.ints]
    assert changed(parent, other) == dependent_on(parent, {CONV})


def test_the_size_of_the_input_changes_everything_but_the_constants(parent: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(parent)
    other.graph.input[0].type.tensor_type.shape.dim[1].dim_value += 16
    assert changed(parent, other) == dependent_on(parent, {"image"})


def test_the_type_of_the_input_changes_everything_but_the_constants(parent: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(parent)
    other.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    assert changed(parent, other) == dependent_on(parent, {"image"})


def test_another_operator_set_changes_every_computed_tensor(parent: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(parent)
    other.opset_import[0].version += 1
    assert changed(parent, other) == {name for node in parent.graph.node for name in node.output}
    second = onnx.ModelProto()
    second.CopyFrom(parent)
    second.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert changed(parent, second) == changed(parent, other)


def test_no_two_computed_tensors_of_a_network_are_taken_for_one(parent: onnx.ModelProto) -> None:
    hashes = subgraph_hashes(parent)
    computed = [hashes[name] for node in parent.graph.node for name in node.output]
    assert len(set(computed)) == len(computed)


def test_growing_the_head_changes_no_hash_of_what_was_there_before_the_logits(
    parent: onnx.ModelProto, child: onnx.ModelProto
) -> None:
    before, after = subgraph_hashes(parent), subgraph_hashes(child)
    same = {name for name in before if after.get(name) == before[name]}
    encoder = {name for name in before if name.startswith("encoder.")}
    branches = {name for name in before if name.startswith(("decoder.branches", "decoder.pooling", "decoder.project"))}
    assert len(encoder) > 25
    assert len(branches) > 30
    assert encoder | branches | {"Div", "decoder/Concat", "decoder.classifiers.0.steps.1/Conv"} <= same
    assert not {"decoder.classifiers.0/Concat", "logits", "mask"} & same
    assert after["decoder.classifiers.0.steps.2/Conv"] not in before.values()


def test_a_weight_of_the_encoder_that_was_trained_changes_the_childs_hashes_from_there_on(
    parent: onnx.ModelProto, child: onnx.ModelProto
) -> None:
    before, after = subgraph_hashes(parent), subgraph_hashes(with_constant(child, WEIGHT, shifted_by_one))
    behind = dependent_on(parent, {WEIGHT})
    for name in before.keys() - {"Resize/sizes"}:  # holds the number of classes
        assert (after[name] != before[name]) == (name in behind), name


def test_tensors_of_the_same_hash_take_the_same_values_in_parent_and_child(parent_path: Path, child_path: Path) -> None:
    models = [onnx.load(path) for path in (parent_path, child_path)]
    computed = [[name for node in model.graph.node for name in node.output] for model in models]
    hashes = [subgraph_hashes(model) for model in models]
    by_hash = {hashes[0][name]: name for name in computed[0]}
    pairs = {name: by_hash[hashes[1][name]] for name in computed[1] if hashes[1][name] in by_hash}
    assert len(pairs) > 40
    image_HWC = random_images(1, seed=5)[0]
    before = all_values(parent_path, computed[0], image_HWC)
    after = all_values(child_path, computed[1], image_HWC)
    for name, twin in pairs.items():
        np.testing.assert_array_equal(after[name], before[twin], err_msg=name)


def test_a_constant_is_its_type_shape_and_bytes() -> None:
    value = np.array([[1.5, -2.0]], dtype=np.float32)
    model = small_graph([helper.make_node("Add", ["x", "c"], ["y"])], {"c": value})
    digest = hashlib.sha256()
    for part in (b"constant", b"<f4", b"(1, 2)", value.tobytes()):
        digest.update(len(part).to_bytes(8, "little") + part)
    assert subgraph_hashes(model)["c"] == digest.hexdigest()


@pytest.mark.parametrize(
    "change", [lambda value: value.reshape(2, 1), lambda value: value.view(np.int32), lambda value: -value]
)
def test_another_type_shape_or_value_of_a_constant_is_another_hash(
    change: Callable[[NDArray[Any]], NDArray[Any]],
) -> None:
    value = np.array([[1.5, -2.0]], dtype=np.float32)
    nodes = [helper.make_node("Add", ["x", "c"], ["y"])]
    assert changed(small_graph(nodes, {"c": value}), small_graph(nodes, {"c": change(value)})) == {"c", "y"}


def test_a_constant_says_the_same_as_raw_bytes_and_as_a_list_of_floats(parent: onnx.ModelProto) -> None:
    listed = onnx.ModelProto()
    listed.CopyFrom(parent)
    (constant,) = (item for item in listed.graph.initializer if item.name == WEIGHT)
    value = numpy_helper.to_array(constant)
    constant.CopyFrom(helper.make_tensor(WEIGHT, TensorProto.FLOAT, value.shape, value.ravel().tolist()))
    assert not constant.raw_data
    assert changed(parent, listed) == set()


def y_of(*inputs: str, op_type: str = "Clip", domain: str = "") -> str:
    constants = {name: np.array(1.0, np.float32) for name in inputs if name not in ("", "x")}
    return subgraph_hashes(small_graph([helper.make_node(op_type, inputs, ["y"], domain=domain)], constants))["y"]


def test_the_place_of_an_input_counts_and_one_that_is_left_out_too() -> None:
    variants = [y_of("x", "low"), y_of("x", "", "high"), y_of("x", "low", "high"), y_of("low", "x")]
    assert len(set(variants)) == len(variants)
    assert y_of("x", "low") == y_of("x", "bound")


def test_the_operation_and_its_domain_count() -> None:
    variants = [y_of("x", "c", op_type=name, domain=domain) for name in ("Add", "Mul") for domain in ("", "own")]
    assert len(set(variants)) == 4


def test_the_outputs_of_one_node_are_told_apart() -> None:
    hashes = subgraph_hashes(small_graph([helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2)]))
    assert hashes["y"] != hashes["z"]


def test_a_node_that_stands_before_what_it_reads_is_named() -> None:
    nodes = [helper.make_node("Relu", ["h"], ["y"], name="late"), helper.make_node("Abs", ["x"], ["h"], name="early")]
    with pytest.raises(ValueError, match=r"'late' reads 'h'"):
        subgraph_hashes(small_graph(nodes))
