"""Bundles whose masks are known exactly, and images for them, without training anything.

The network is the nearest of a few colours: argmin |x - c|^2 = argmax 2 c.x - |c|^2, a 1 x 1 convolution. Every product
and sum is an integer below 2^24, so float32 is exact in whatever order a runtime adds: `nearest_color` is its oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edge_ilseg.bundle import (
    ClassEntry,
    Manifest,
    ModelEntry,
    Precision,
    Preprocessing,
    Runtime,
    StepEntry,
    write_manifest,
)
from edge_ilseg.devices.runtime import import_openvino

HEIGHT_PX, WIDTH_PX, BLOCK_PX = 48, 64, 8
COLORS = {"background": (0, 0, 0), "apple": (200, 0, 0), "grass": (0, 200, 0), "boat": (0, 0, 200)}
BASE = {"background": 0, "apple": 0, "grass": 0}
"""Class name -> step it came from."""
GROWN = {**BASE, "boat": 1}
NEVER = -1e9


def nearest_color(image_HWC: NDArray[np.uint8], names: Sequence[str]) -> NDArray[np.uint8]:
    """The channel of the nearest colour, by a plain loop over the classes."""
    distances = [((image_HWC.astype(np.int64) - COLORS[name]) ** 2).sum(axis=2) for name in names]
    return np.argmin(distances, axis=0).astype(np.uint8)


def color_network(
    names: Sequence[str],
    *,
    forget: str | None = None,
    outputs: Sequence[str] = ("mask",),
    height_px: int = HEIGHT_PX,
    width_px: int = WIDTH_PX,
    input_name: str = "image",
    mask_type: int = TensorProto.UINT8,
    add_to_mask: int = 0,
) -> onnx.ModelProto:
    """ONNX network of the nearest colour; the class `forget` is never predicted, `add_to_mask` moves every channel."""
    colors = np.array([COLORS[name] for name in names], dtype=np.float32)
    bias = -(colors**2).sum(axis=1)
    if forget:
        bias[list(names).index(forget)] = NEVER
    constants = {
        "weight": (2 * colors)[:, :, None, None],
        "bias": bias,
        "shift": np.array(add_to_mask, dtype=np.int64),
    }
    nodes = [
        helper.make_node("Cast", [input_name], ["float_NHWC"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float_NHWC"], ["float_NCHW"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["float_NCHW", "weight", "bias"], ["logits"]),
        helper.make_node("ArgMax", ["logits"], ["channel"], axis=1, keepdims=0),
        helper.make_node("Add", ["channel", "shift"], ["shifted"]),
        helper.make_node("Cast", ["shifted"], ["mask"], to=mask_type),
    ]
    shapes = {"mask": (mask_type, [1, height_px, width_px])}
    shapes["logits"] = (TensorProto.FLOAT, [1, len(names), height_px, width_px])
    graph = helper.make_graph(
        nodes,
        "nearest_color",
        [helper.make_tensor_value_info(input_name, TensorProto.UINT8, [1, height_px, width_px, 3])],
        [helper.make_tensor_value_info(name, *shapes[name]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def color_images(count: int, names: Sequence[str], *, seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of class colours with noise that never crosses half the distance between two, uint8, N x H x W x 3."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, len(names), (count, HEIGHT_PX // BLOCK_PX, WIDTH_PX // BLOCK_PX))
    colors = np.array([COLORS[name] for name in names])[blocks]
    images = colors.repeat(BLOCK_PX, axis=1).repeat(BLOCK_PX, axis=2)
    return (images + rng.integers(0, 40, images.shape)).astype(np.uint8)


def write_bundle(
    folder: Path,
    steps: dict[str, int],
    *,
    step_id: str,
    parent_id: str | None = None,
    models: Sequence[tuple[Runtime, Precision]] = (("onnxruntime", "fp32"),),
    network: onnx.ModelProto | None = None,
    outputs: Sequence[str] = ("mask",),
    forget: str | None = None,
    wrong_golden_share: float = 0.0,
    input_px: tuple[int, int] = (HEIGHT_PX, WIDTH_PX),
) -> Manifest:
    """Write a bundle of the nearest-colour network for the classes `steps` (name -> step).

    Args:
        network: in the place of the right one.
        forget: a class that the network never predicts; the golden masks agree with it.
        wrong_golden_share: so many of the golden pixels are stored wrong.
        input_px: height and width that the manifest declares.
    """
    names = list(steps)
    (folder / "golden").mkdir(parents=True)
    if network is None:
        network = color_network(names, forget=forget, outputs=outputs)
    images = color_images(2, names, seed=7)
    kept = [name for name in names if name != forget]
    masks = np.stack([np.array([names.index(name) for name in kept], np.uint8)[nearest_color(i, kept)] for i in images])
    flat = masks.reshape(-1)
    wrong = np.linspace(0, flat.size - 1, round(wrong_golden_share * flat.size)).astype(int)
    flat[wrong] = (flat[wrong] + 1) % len(names)
    np.save(folder / "golden/images.npy", images)
    entries = []
    for runtime, precision in models:
        golden = f"golden/{runtime}-{precision}.npy"
        np.save(folder / golden, masks)
        entries.append(
            ModelEntry(
                runtime=runtime,
                precision=precision,
                files=_write_model(folder, network, runtime, precision),
                outputs=tuple(outputs),
                opset=18,
                golden_masks=golden,
                calibration=None,
                expected=None,
            )
        )
    manifest = Manifest(
        format="edge-ilseg-bundle",
        format_version=1,
        bundle_id="",
        created="2026-01-01T00:00:00+00:00",
        step=StepEntry(
            index=max(steps.values()),
            name=f"{max(steps.values()):02d}-{names[-1]}",
            id=step_id,
            parent_id=parent_id,
            method="finetune",
            encoder_sha256="0" * 64,
            encoder_frozen=False,
        ),
        classes=tuple(ClassEntry(name, step, COLORS[name]) for name, step in steps.items()),
        background="background" if "background" in steps else None,
        preprocessing=Preprocessing(height_px=input_px[0], width_px=input_px[1]),
        models=tuple(entries),
        golden_images="golden/images.npy",
        expected_data=None,
        parity=(),
        versions={},
        files={},
    )
    return write_manifest(folder, manifest)


def _write_model(folder: Path, network: onnx.ModelProto, runtime: Runtime, precision: Precision) -> tuple[str, ...]:
    if runtime == "onnxruntime":
        name = f"{precision}.onnx"
        onnx.save(network, folder / name)
        return (name,)
    openvino = import_openvino()

    source = folder / "source.onnx"
    onnx.save(network, source)
    openvino.save_model(openvino.convert_model(source), folder / f"{precision}.xml", compress_to_fp16=False)
    source.unlink()
    return (f"{precision}.xml", f"{precision}.bin")


def write_color_folder(root: Path, names: Sequence[str] = tuple(COLORS), *, count: int = 3, scale: int = 1) -> Path:
    """A data set of kind `folder` with the split `test`: images `000`, `001`, ... and their exact masks."""
    for part in ("images", "masks", "splits"):
        (root / part).mkdir(parents=True)
    ids = [f"{number:03d}" for number in range(count)]
    for image_id, image_HWC in zip(ids, color_images(count, names, seed=3), strict=True):
        mask_HW = nearest_color(image_HWC, names)
        mask_HW[:4] = 255
        for part, pixels in (("images", image_HWC), ("masks", mask_HW)):
            enlarged = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
            Image.fromarray(enlarged).save(root / part / f"{image_id}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "splits/test.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    return root


def write_family(folder: Path, *, forget: str | None = None, **options: object) -> tuple[Path, Path]:
    """A bundle of step 1 (which adds `boat`) and one of its parent: (child, parent)."""
    child, parent = folder / "child", folder / "parent"
    models = options.get("models", (("onnxruntime", "fp32"),))
    write_bundle(parent, BASE, step_id="a" * 64, models=models)  # type: ignore[arg-type]
    write_bundle(child, GROWN, step_id="b" * 64, parent_id="a" * 64, forget=forget, **options)  # type: ignore[arg-type]
    return child, parent
