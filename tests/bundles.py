"""Bundles whose masks are known exactly, images for them, and real exports, without training anything.

The network of the exact ones is the nearest of a few colours: argmin |x - c|^2 = argmax 2 c.x - |c|^2, a 1 x 1
convolution. Every product and sum is an integer below 2^24, so float32 is exact in whatever order a runtime adds:
`nearest_color` is its oracle.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edge_ilseg.bundle import (
    FORMAT_VERSION,
    ClassEntry,
    Manifest,
    ModelEntry,
    Precision,
    Preprocessing,
    Runtime,
    StepEntry,
    read_manifest,
    write_manifest,
)
from edge_ilseg.devices.runtime import import_openvino

if TYPE_CHECKING:
    from edge_ilseg.calibration.ranges import TensorRange
    from edge_ilseg.calibration.sample import CalibrationImages
    from edge_ilseg.models.segmentation import SegmentationModel

HEIGHT_PX, WIDTH_PX, BLOCK_PX = 48, 64, 8
COLORS = {"background": (0, 0, 0), "apple": (200, 0, 0), "grass": (0, 200, 0), "boat": (0, 0, 200)}
BASE = {"background": 0, "apple": 0, "grass": 0}
"""Class name -> step it came from."""
GROWN = {**BASE, "boat": 1}
NEVER = -1e9
ENOUGH = 24
"""Images on which a drop can be decided: `Limits.min_images` are 20."""
BASE_COUNT = 4
"""Classes of step 0 of `grown_model`."""
NEW_BIAS = -2.0
"""Logit offset of its new classes: they win on some pixels, and the old ones keep the rest."""


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
                convolutions=None,
                expected=None,
            )
        )
    manifest = Manifest(
        format="edge-ilseg-bundle",
        format_version=FORMAT_VERSION,
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
        int8=None,
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


def write_color_folder(
    root: Path, names: Sequence[str] = tuple(COLORS), *, count: int = ENOUGH, scale: int = 1
) -> Path:
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


def grown_model(*additions: int) -> SegmentationModel:
    """`fakes.small_model` with `BASE_COUNT` classes, grown by so many for each step; what is there stays as it was."""
    import torch
    from fakes import small_model

    model = small_model((BASE_COUNT,))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for count in additions:
            model.grow(count, "scaled")
            bias = model.classifiers[0].convs[-1].bias
            assert bias is not None
            bias.fill_(NEW_BIAS)
    return model


def step_entry(index: int, **changes: object) -> StepEntry:
    """Step `index` of a chain in which each is the parent of the next, all with one frozen encoder."""
    parent_id = str(index - 1) * 64 if index else None
    entry = StepEntry(index, f"{index:02}-step", str(index) * 64, parent_id, "freeze", "e" * 64, encoder_frozen=True)
    return msgspec.structs.replace(entry, **changes)


def class_entries(model: SegmentationModel) -> tuple[ClassEntry, ...]:
    """Classes `c0`, `c1`, ... of a model, each with the step that brought it."""
    steps = [step for step, count in enumerate(model.class_counts) for _ in range(count)]
    return tuple(ClassEntry(f"c{channel}", step, (channel, 0, 0)) for channel, step in enumerate(steps))


def images_at_hand(count: int = 3, *, seed: int = 0) -> CalibrationImages:
    """Images of a step, larger than the model's input; it calibrates on all of them."""
    from fakes import random_images

    from edge_ilseg.calibration.sample import CalibrationImages

    found = random_images(count, seed=seed, height_px=72, width_px=80)
    images = {f"{seed}-{number}": image for number, image in enumerate(found)}
    return CalibrationImages(tuple(images), f"{seed:064}", images.__getitem__, at_hand=tuple(images))


def export_grown(
    out: Path, *additions: int, parent: Path | None = None, model: SegmentationModel | None = None, **options: object
) -> Manifest:
    """The bundle of `grown_model(*additions)`, or of `model`: int8 for onnxruntime, unless options say otherwise.

    Args:
        parent: folder of the parent's bundle.
        options: of `export_bundle`, or else fields of its request.
    """
    from edge_ilseg.export.package import ExportRequest, export_bundle
    from edge_ilseg.export.parent import load_parent

    model = model or grown_model(*additions)
    index = len(model.class_counts) - 1
    settings: dict[str, object] = {"targets": ("onnx",), "precisions": ("int8",), "golden_count": 2}
    others: dict[str, object] = {"step": step_entry(index), "calibration": images_at_hand(seed=index)}
    for name, value in options.items():
        (settings if name in ExportRequest.__struct_fields__ else others)[name] = value
    return export_bundle(
        model,
        out,
        request=ExportRequest(**settings),  # type: ignore[arg-type]
        classes=class_entries(model),
        background="c0",
        parent=load_parent(parent, others["step"]) if parent else None,  # type: ignore[arg-type]
        **others,  # type: ignore[arg-type]
    )


def stretch_ranges(folder: Path, out: Path, factor: float, prefixes: Iterable[str] = ("",)) -> Path:
    """A whole copy of a bundle whose ranges are stretched where a tensor's name starts so; its models stay as they are.

    Ranges that are far too narrow, or far too wide, are what a later step must not be ruined by.
    """
    from edge_ilseg.calibration.ranges import read_ranges, write_ranges

    def stretched(name: str, item: TensorRange) -> TensorRange:
        if not name.startswith(tuple(prefixes)):
            return item
        return msgspec.structs.replace(item, lowest=factor * item.lowest, highest=factor * item.highest)

    shutil.copytree(folder, out)
    ranges = read_ranges(out / "ranges.json")
    tensors = {name: stretched(name, item) for name, item in ranges.tensors.items()}
    write_ranges(out / "ranges.json", msgspec.structs.replace(ranges, tensors=tensors))
    write_manifest(out, read_manifest(out))
    return out
