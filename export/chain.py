"""The parity chain of one export: which forms of the model it needs, and the images they are compared on.

The chain runs twins of the shipped files that give `logits` besides `mask`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from edge_ilseg.bundle import ParityRow, Precision
from edge_ilseg.errors import MissingPackageError
from edge_ilseg.export import parity
from edge_ilseg.export.float_onnx import deployed_model
from edge_ilseg.export.openvino_ir import write_ir
from edge_ilseg.export.request import Subject
from edge_ilseg.export.sessions import load_onnx, load_openvino, load_torch
from edge_ilseg.images import resize_image

TIMED_ROUNDS = 20


def _stages(subject: Subject, work: Path) -> Iterator[parity.Stage]:
    """The forms of the model that the request needs, the reference first."""
    request = subject.request
    yield parity.Stage(parity.TORCH, load_torch(deployed_model(subject.model)))
    yield _onnx_stage(parity.ONNX_FP32, work / "float.onnx")
    if "onnx" in request.targets and "int8" in request.precisions:
        yield _onnx_stage(parity.ONNX_INT8_SIMULATED, work / "int8.onnx", simulated=True)
        yield _onnx_stage(parity.ONNX_INT8, work / "int8.onnx")
    if "openvino" not in request.targets:
        return

    def twin_stage(name: str, precision: Precision, *, simulated: bool = False) -> parity.Stage:
        twin = work / f"twin.{precision}.xml"
        if not twin.exists():
            write_ir(work / ("int8.onnx" if precision == "int8" else "float.onnx"), twin, precision, {})
        files = (twin, twin.with_suffix(".bin"))
        return parity.Stage(name, load_openvino(twin, simulated=simulated), sum(file.stat().st_size for file in files))

    yield twin_stage(parity.IR_FP32, "fp32")
    if "fp16" in request.precisions:
        yield twin_stage(parity.IR_FP16, "fp16")
    if "int8" in request.precisions:
        try:
            simulated = twin_stage(parity.IR_INT8_SIMULATED, "int8", simulated=True)
        except MissingPackageError as error:
            subject.progress(f"{error.what}: {error.found}", 1.0)
        else:
            yield simulated
        yield twin_stage(parity.IR_INT8, "int8")


def _onnx_stage(name: str, path: Path, *, simulated: bool = False) -> parity.Stage:
    return parity.Stage(name, load_onnx(path, simulated=simulated), path.stat().st_size)


def run_parity_chain(subject: Subject, work: Path, golden_NHWC: NDArray[np.uint8]) -> tuple[ParityRow, ...]:
    """Measure and check the chain on the evaluation images, or on the golden ones where there are none."""
    spec = subject.model.spec
    text = "comparing the exported models with torch"

    def images() -> Iterator[parity.ParityImage]:
        if subject.evaluation is None:
            yield from (parity.ParityImage(image_HWC[np.newaxis], None) for image_HWC in golden_NHWC)
            return
        for number, (image_HWC, labels_HW) in enumerate(subject.evaluation(), start=1):
            subject.progress(f"{text}, image {number}", 0.0)  # how many there are is not known
            resized_HWC = resize_image(image_HWC, spec.input_height_px, spec.input_width_px)
            yield parity.ParityImage(resized_HWC[np.newaxis], labels_HW)

    subject.progress(text, 0.0)
    stages = list(_stages(subject, work))
    with _one_torch_thread():
        rows = parity.measure_parity(
            stages,
            images(),
            subject.names,
            old_count=subject.old_count,
            background=subject.background,
        )
    subject.progress(text, 1.0)
    parity.check_parity(
        rows,
        min_fp16_agreement=subject.request.min_fp16_agreement,
        min_int8_agreement=subject.request.min_int8_agreement,
    )
    if subject.request.time_stages:
        subject.progress("timing the exported models", 0.0)
        latencies_ms = parity.time_stages(stages, golden_NHWC[:1], TIMED_ROUNDS)
        rows = tuple(
            msgspec.structs.replace(row, latency_ms=value) for row, value in zip(rows, latencies_ms, strict=True)
        )
        subject.progress("timing the exported models", 1.0)
    return rows


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """One image at a time gains little from threads, and torch's wait for each other where a core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
