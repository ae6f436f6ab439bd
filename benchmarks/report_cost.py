"""What a report costs: seconds and bytes, against the models' own share of it.

    python benchmarks/report_cost.py                              # 10 steps, 21 classes, 256 images, made here
    python benchmarks/report_cost.py --workspace work --step 1    # a workspace of yours, which stays as it is

Made here: ten steps of two new classes each, EfficientNet-Lite0 with random weights at 160x112 in the step's and its
parent's bundle (the "int8" model is the float one again, so that its share is an upper bound), photographs' size, noise
in the place of photographs, which compresses worst. Everything is measured in a process of its own, from start to exit.
The unit is what the three models alone take for the images, one after another with one thread, in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests"))
STEPS, IMAGES, CLASSES = 10, 256, 21
IMAGE_PX, INPUT_PX = (213, 320), (112, 160)
LIMIT_S, LIMIT_MIB = 20.0, 5.0


def make_world(root: Path) -> Path:
    """The workspace; the last step and the one before it have bundles."""
    import bundles
    import onnx
    import report_world
    from records import make_record

    from edge_ilseg.checkpoint import ClassRecord
    from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
    from edge_ilseg.export.float_onnx import write_float_onnx
    from edge_ilseg.models.segmentation import build_model
    from edge_ilseg.models.spec import ModelSpec
    from edge_ilseg.workspace import create_workspace

    names = [f"class-{number}" for number in range(CLASSES)]
    _write_images(root / "data", names)
    spec = ModelSpec(input_height_px=INPUT_PX[0], input_width_px=INPUT_PX[1])
    data = DataConfig(kind="folder", root=str(root / "data"), eval_split="test")
    config = Config(data, ClassesConfig(tuple(names[:3])), spec, "none", TrainConfig(), StepConfig())
    workspace = create_workspace(root / "work", config)
    parent = None
    models = (("onnxruntime", "fp32"), ("onnxruntime", "int8"))
    for index in range(STEPS):
        step_of = {name: max(place - 1, 0) // 2 for place, name in enumerate(names[: 3 + 2 * index])}
        scores = report_world.make_metrics(dict.fromkeys(step_of, 0.5), 0.5, 0.5, 0.5)
        colors = {name: (place * 11, 255 - place * 9, 90) for place, name in enumerate(names)}
        record = make_record(
            index=index,
            name=f"{index:02}-step",
            parent_id=parent.id if parent else None,
            parent_name=parent.name if parent else None,
            classes=tuple(ClassRecord(name, step, colors[name]) for name, step in step_of.items()),
            metrics={"test": scores},
            parent_metrics={"test": scores},
            model=spec,
        )
        parent = report_world.write_record(workspace, record)
        if index >= STEPS - 2:
            counts = [list(step_of.values()).count(step) for step in range(index + 1)]
            write_float_onnx(build_model(spec, tuple(counts)), root / "network.onnx")
            with mock.patch.object(bundles, "COLORS", colors):
                bundles.write_bundle(
                    workspace.bundle_folder(record.name), step_of, step_id=parent.id, parent_id=record.parent_id,
                    models=models, network=onnx.load(root / "network.onnx"), input_px=INPUT_PX,
                    outputs=("mask", "logits"),
                )  # fmt: skip
    return workspace.root


def _write_images(root: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    for part in ("images", "masks", "splits"):
        (root / part).mkdir(parents=True)
    for number in range(IMAGES):
        image_HWC = rng.integers(0, 255, (*IMAGE_PX, 3), dtype=np.uint8)
        mask_HW = np.full(IMAGE_PX, number % len(names), dtype=np.uint8)
        mask_HW[:100, :150] = (number + 5) % len(names)
        Image.fromarray(image_HWC).save(root / "images" / f"{number:03}.jpg", quality=90)
        Image.fromarray(mask_HW).save(root / "masks" / f"{number:03}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "splits/test.txt").write_text("".join(f"{number:03}\n" for number in range(IMAGES)))


def models_alone_s(root: Path, step: str | None) -> float:
    """The unit: the models over as many images, without anything else."""
    from edge_ilseg.report.gather import gather
    from edge_ilseg.report.scoring import load_eyes
    from edge_ilseg.workspace import open_workspace

    workspace = open_workspace(root)
    eyes, _ = load_eyes(workspace, gather(workspace, step))
    image_HWC = np.zeros((*IMAGE_PX, 3), dtype=np.uint8)
    begun_s = time.perf_counter()
    for _ in range(IMAGES):
        for eye in eyes:
            eye.mask(image_HWC)
    return time.perf_counter() - begun_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.workspace or make_world(Path(folder))
        out = Path(folder) / "report.html"
        command = [sys.executable, "-m", "edge_ilseg", "report", str(root), "--out", str(out), "--json"]
        command += ["--step", arguments.step] if arguments.step else []
        before, begun_s = os.times(), time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall_s, after = time.perf_counter() - begun_s, os.times()
        cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        outcome = json.loads(done.stdout)
        unit_s = models_alone_s(root, arguments.step)
        mib = outcome["bytes"] / (1 << 20)
    print(f"images scored {outcome['images_scored']}, shown {outcome['images_shown']}; load {os.getloadavg()[0]:.1f}")
    print(f"wall {wall_s:.1f} s (limit {LIMIT_S:g}), processor {cpu_s:.1f} s, page {mib:.2f} MiB (limit {LIMIT_MIB:g})")
    print(f"the models alone {unit_s:.1f} s; the whole report {wall_s / unit_s:.2f} times that")
    sys.exit(wall_s > LIMIT_S or mib > LIMIT_MIB)


if __name__ == "__main__":
    main()
