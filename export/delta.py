"""How much of an int8 model is new to a device that has the parent's: the delta budget.

1. Constants are compared by name and bytes, the rest of the file by the pieces that describe one layer each (nodes of
   an ONNX file, lines of an IR's .xml). A piece that the parent's file has, wherever it stands, is not new.
2. Under a frozen encoder with carried ranges no constant of the encoder may be new, and its output on the golden
   images is the same to the bit.
3. Bytes are counted uncompressed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.bundle import ModelEntry
from edge_ilseg.calibration.ranges import Ranges
from edge_ilseg.devices.runtime import OPENVINO_SETTINGS, openvino_core
from edge_ilseg.errors import ExportError
from edge_ilseg.export.parent import ParentBundle
from edge_ilseg.export.pieces import read_constants, take_apart
from edge_ilseg.export.sessions import ORT_LOG_FATAL
from edge_ilseg.int8_record import DeltaRow

ENCODER = "encoder."


def measure_delta(
    folder: Path, entry: ModelEntry, parent: ParentBundle, golden_NHWC: NDArray[np.uint8], *, encoder_tensor: str | None
) -> DeltaRow | None:
    """Compare an int8 model with the parent's for the same runtime; None where the parent has none.

    Args:
        folder: of the bundle that is being made.
        entry: the model.
        parent: the parent's bundle.
        golden_NHWC: uint8 images at the input size.
        encoder_tensor: name of the last encoder tensor in the float graph, to compare its values; None: do not.
    """
    before = parent.int8(entry.runtime)
    if before is None:
        return None
    old = take_apart([parent.folder / name for name in before.files])
    new = take_apart([folder / name for name in entry.files])
    encoder = {name: value for name, value in new.constants.items() if name.startswith(ENCODER)}
    changed = _changed(new.constants, old.constants)
    is_same = None
    if encoder_tensor is not None:
        paths = (parent.folder / before.files[0], folder / entry.files[0])
        one, two = (_tensor_values(path, encoder_tensor, golden_NHWC) for path in paths)
        is_same = len(one) == len(two) and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    return DeltaRow(
        runtime=entry.runtime,
        total_bytes=sum((folder / name).stat().st_size for name in entry.files),
        changed_bytes=changed + sum(len(piece) * count for piece, count in (new.others - old.others).items()),
        encoder_bytes=sum(len(value) for value in encoder.values()),
        encoder_changed_bytes=_changed(encoder, old.constants),
        encoder_output_identical=is_same,
    )


def last_carried_encoder_tensor(ranges: Ranges) -> str | None:
    """The last tensor of the encoder, where its range is the parent's, verbatim; else None."""
    names = [name for name in ranges.tensors if name.startswith(ENCODER)]
    return names[-1] if names and ranges.tensors[names[-1]].origin == "carried" else None


def check_delta(rows: Iterable[DeltaRow], *, encoder_is_carried: bool, max_changed_pct: float | None) -> None:
    """Check the delta budget.

    Args:
        rows: one for each runtime.
        encoder_is_carried: rule 2 must hold.
        max_changed_pct: how much of a model may be new; None: all of it.

    Raises:
        ExportError: the budget is exceeded.
    """
    for row in rows:
        if encoder_is_carried and (row.encoder_changed_bytes or row.encoder_output_identical is False):
            raise ExportError(
                "the encoder was frozen, and its int8 form is not the parent's",
                where=f"{row.runtime} int8",
                found=f"{row.encoder_changed_bytes} of {row.encoder_bytes} bytes of its constants changed"
                + (", other output on the golden images" if row.encoder_output_identical is False else ""),
                expected="the same bytes and the same output",
                hint="export with the versions of onnx, onnxruntime and openvino that made the parent's bundle, "
                "with the same --profile and --keep-float, or allow it: --ranges union",
            )
        changed_pct = 100 * row.changed_bytes / row.total_bytes
        if max_changed_pct is not None and changed_pct > max_changed_pct:
            raise ExportError(
                "more of the int8 model is new than the delta budget allows",
                where=f"{row.runtime} int8",
                found=f"{changed_pct:.2f} % of {row.total_bytes} bytes differ from the parent's",
                expected=f"at most {max_changed_pct:g} %",
                hint="freeze more (--freeze all_but_head), keep --ranges carry, or allow more: --max-changed; where "
                "another way to int8 had to be taken than carry, more of it is new",
            )


def encoder_sha256(folder: Path, files: Sequence[str]) -> str:
    """Hash of the names and bytes of the encoder's constants in a model: the same for the same frozen encoder."""
    digest = hashlib.sha256()
    for name, value in sorted(read_constants([folder / item for item in files]).items()):
        if name.startswith(ENCODER):
            digest.update(f"{name}\0{len(value)}\0".encode())
            digest.update(value)
    return digest.hexdigest()


def _changed(now: dict[str, bytes], before: dict[str, bytes]) -> int:
    return sum(len(value) for name, value in now.items() if before.get(name) != value)


def _tensor_values(path: Path, tensor: str, images_NHWC: NDArray[np.uint8]) -> list[NDArray[np.generic]]:
    """What a model computes for one of its tensors, for each image; the tensor's levels where it is quantized."""
    run = _tensor_in_onnxruntime if path.suffix == ".onnx" else _tensor_in_openvino
    return run(path, tensor, images_NHWC)


def _tensor_in_onnxruntime(path: Path, tensor: str, images_NHWC: NDArray[np.uint8]) -> list[NDArray[np.generic]]:
    import onnxruntime

    model = onnx.load(path)
    name = next(
        (node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == tensor),
        tensor,
    )
    kind = onnx.TensorProto.FLOAT if name == tensor else onnx.TensorProto.UINT8
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ORT_LOG_FATAL
    with tempfile.TemporaryDirectory(prefix="edge-ilseg-delta-") as folder:
        onnx.save(model, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(
            str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    return [session.run([name], {"image": image_HWC[np.newaxis]})[0] for image_HWC in images_NHWC]


def _tensor_in_openvino(path: Path, tensor: str, images_NHWC: NDArray[np.uint8]) -> list[NDArray[np.generic]]:
    core = openvino_core()
    model = core.read_model(path)
    output = next(
        output
        for layer in model.get_ordered_ops()
        for output in layer.outputs()
        if tensor in output.get_names() or f"{tensor}_DequantizeLinear_Output" in output.get_names()
    )
    model.add_outputs([output])
    request = core.compile_model(model, "CPU", OPENVINO_SETTINGS).create_infer_request()
    found = []
    for image_HWC in images_NHWC:
        request.infer({"image": image_HWC[np.newaxis]})
        found.append(request.get_output_tensor(len(model.outputs) - 1).data.copy())
    return found
