"""What an int8 export costs, stage by stage: wall time, peak memory, and the ratio to forward passes of the runtime.

    python benchmarks/export_cost.py --size 512x512 --images 96

A network with ImageNet weights, and a child of it with two classes more under a frozen encoder, are exported to int8
for both runtimes, calibrated on generated images, without labelled ones. The unit is one pass of the float ONNX in
onnxruntime over the calibration images, measured in the same process just before each of the two exports.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path

import numpy as np

from edge_ilseg.bundle import ClassEntry, StepEntry
from edge_ilseg.cli.options import parse_size
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.package import CalibrationImages, ExportRequest, export_bundle
from edge_ilseg.export.parent import load_parent
from edge_ilseg.export.sessions import load_onnx
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.models.weights import load_backbone_weights

BASE_CLASSES, NEW_CLASSES = 16, 2
RESET_PEAK = "5"
"""What /proc/self/clear_refs takes to forget the peak."""


class Stages:
    """A progress callback that notes how long each stage took and how much memory the process had at most."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}
        self._name = "before the first stage"
        self._start = time.perf_counter()
        _forget_peak()

    def __call__(self, text: str, share: float) -> None:
        name = re.sub(r",? (image )?\d+.*", "", text)
        if name != self._name:
            self.end()
            self._name = name

    def end(self) -> None:
        now = time.perf_counter()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._start
        self.peak_mib[self._name] = max(self.peak_mib.get(self._name, 0.0), _peak_mib())
        self._start = now
        _forget_peak()


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)


def _peak_mib() -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) / 1024


def _classes(count: int) -> tuple[ClassEntry, ...]:
    return tuple(ClassEntry(f"class {number}", int(number >= BASE_CLASSES), (number, 0, 0)) for number in range(count))


def main() -> None:
    """Export twice, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--images", type=int, default=96)
    options = parser.parse_args()
    width_px, height_px = parse_size(options.size)
    scenes = Shapes(seed=0, train=options.images, val=0, test=0, height_px=height_px, width_px=width_px)
    ids = tuple(scenes.ids("train"))
    images = CalibrationImages(ids, "00" * 32, scenes.read_image, at_hand=ids)
    spec = ModelSpec(backbone="efficientnet_lite0", input_height_px=height_px, input_width_px=width_px)
    model = build_model(spec, (BASE_CLASSES,))
    load_backbone_weights(model, "imagenet")
    model.eval()
    base = StepEntry(0, "00-base", "aa" * 32, None, "base", "00" * 32, encoder_frozen=False)
    child = StepEntry(1, "01-new", "bb" * 32, "aa" * 32, "freeze+kd-output", "00" * 32, encoder_frozen=True)
    request = ExportRequest(precisions=("int8",), max_old_drop_points=None)
    print(f"efficientnet_lite0, {options.size}, {options.images} images")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for step, parent in ((base, None), (child, out / base.name)):
            if parent:
                model.grow(NEW_CLASSES, "default")
            unit_s = _seconds_of_passes(model, out, images)
            stages = Stages()
            export_bundle(
                model,
                out / step.name,
                request=request,
                step=step,
                classes=_classes(BASE_CLASSES + NEW_CLASSES if parent else BASE_CLASSES),
                background=None,
                calibration=images,
                parent=load_parent(parent, step) if parent else None,
                progress=stages,
            )
            stages.end()
            _print_table(step.name, unit_s, stages)


def _seconds_of_passes(model: SegmentationModel, folder: Path, images: CalibrationImages) -> float:
    """Of the float ONNX in onnxruntime over all images."""
    write_float_onnx(model, folder / "float.onnx")
    predict = load_onnx(folder / "float.onnx")
    start = time.perf_counter()
    for image_id in images.ids:
        predict(images.read(image_id)[np.newaxis])
    return time.perf_counter() - start


def _print_table(name: str, unit_s: float, stages: Stages) -> None:
    print(f"\n{name}; the forward passes: {unit_s:.1f} s")
    print(f"{'stage':<66}{'s':>8}{'/ passes':>10}{'peak MiB':>10}")
    rows = [(stage, seconds, stages.peak_mib[stage]) for stage, seconds in stages.seconds.items()]
    rows.append(("whole export", sum(stages.seconds.values()), max(stages.peak_mib.values())))
    for stage, seconds, mib in rows:
        print(f"{stage:<66}{seconds:>8.1f}{seconds / unit_s:>10.2f}{mib:>10.0f}")


if __name__ == "__main__":
    main()
