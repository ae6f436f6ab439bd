"""Does an iteration cost more than in proportion to the image, the classes, or the steps taken before?

    python benchmarks/step_scaling.py --out scaling

Measures milliseconds an image of the real loop (`edge_ilseg.train.train`, teacher and student, a method's losses)
against the pixels of an image, the number of classes and the number of steps that added them, each with the rest held.
Writes `scaling.json` and a PNG plot for each of the three, and prints for each whether the points lie on a straight
line, or below one (better), or bend upwards. Time by step of the whole program, with memory and size on the disk, is in
`step_cost.py`.

1. All points of a plot take turns, `--rounds` times; a point is the median over the rounds. What else the machine does
   meets them all.
2. What is timed is an iteration without the making of its batch, as in `edge-ilseg step --plan`.
3. A parabola through the points says how they bend: how far its middle lies below the straight line between its ends,
   as a share of the greatest time. Up to `STRAIGHT_SHARE`, or within the scatter of the rounds, it is called straight.
   Where no point lies more than `STRAIGHT_SHARE` above the first there is no growth to bend: that is called flat.

On a busy machine `--clock cpu`, with one thread, counts the processor's time in place of the wall clock's.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from edge_ilseg.config import TrainConfig
from edge_ilseg.forecast import TimedSamples
from edge_ilseg.methods import METHODS
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.terms import StepFacts
from edge_ilseg.train import train

SIZES_PX = ((56, 80), (84, 120), (112, 160), (140, 200), (168, 240))
CLASSES = (5, 30, 70, 110, 150)
STEPS = (1, 3, 5, 8, 10)
STEP_CLASSES = 21
BATCH, WARM_UP, MEASURED = 2, 1, 2
STRAIGHT_SHARE = 0.05
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
TITLES = {
    "size": ("pixels of an image", "image size"),
    "classes": ("classes", "classes"),
    "steps": ("steps taken before and with this one", "steps"),
}


class Case(NamedTuple):
    """One point of a plot."""

    x: int
    spec: ModelSpec
    class_counts: tuple[int, ...]
    """Of the student; the last entry is the step's."""


class Noise(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same random image and labels again and again."""

    def __init__(self, spec: ModelSpec, classes: int) -> None:
        rng = np.random.default_rng(0)
        shape = (spec.input_height_px, spec.input_width_px)
        self.image_HWC = torch.from_numpy(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        self.labels_HW = torch.from_numpy(rng.integers(0, classes, shape))

    def __getitem__(self, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The image."""
        return self.image_HWC, self.labels_HW


def cases(axis: str, backbone: str) -> list[Case]:
    """The points of one plot."""
    spec = ModelSpec(backbone=backbone)  # type: ignore[arg-type]
    if axis == "size":
        sized = [msgspec.structs.replace(spec, input_height_px=high, input_width_px=wide) for high, wide in SIZES_PX]
        return [Case(item.input_height_px * item.input_width_px, item, (20, 1)) for item in sized]
    if axis == "classes":
        return [Case(count, spec, (count - 1, 1)) for count in CLASSES]
    return [Case(count, spec, (STEP_CLASSES - count, *([1] * count))) for count in STEPS]


def image_ms(case: Case, student: SegmentationModel, teacher: SegmentationModel, method: str, clock: str) -> float:
    """Milliseconds an image, median over the iterations that count (rule 2)."""
    settings = TrainConfig(iterations=WARM_UP + MEASURED, batch_size=BATCH, batch_norm="eval", learning_rate=1e-6)
    noise = Noise(case.spec, sum(case.class_counts))
    samples = TimedSamples(noise, settings.iterations * BATCH, CLOCKS[clock])
    ends = [0.0]

    def note_end(_text: str, _share: float) -> None:
        ends[0] = CLOCKS[clock]()

    train(
        student,
        DataLoader(samples, batch_size=BATCH, shuffle=False),
        settings,
        teacher=teacher,
        method=METHODS[method],
        facts=StepFacts(sum(case.class_counts[:-1]), background=0),
        accelerator="cpu",
        progress=note_end,
    )
    return 1000 * statistics.median(samples.iteration_seconds(BATCH, ends[0])[WARM_UP:]) / BATCH


def measure(axis: str, backbone: str, method: str, rounds: int, clock: str) -> dict[str, list[float]]:
    """Times of each round (rule 1): `x`, and `round 0` and so on."""
    points = cases(axis, backbone)
    networks = []
    for case in points:
        torch.manual_seed(0)
        teacher = build_model(case.spec, case.class_counts[:-1])
        student = copy.deepcopy(teacher)
        student.grow(case.class_counts[-1])
        networks.append((student, teacher))
    found: dict[str, list[float]] = {"x": [float(case.x) for case in points]}
    for number in range(rounds):
        found[f"round {number}"] = [
            image_ms(case, *pair, method, clock) for case, pair in zip(points, networks, strict=True)
        ]
    return found


def judge(x: np.ndarray, rounds_RP: np.ndarray) -> dict[str, float | str]:
    """Fit a line and a parabola to the medians, and say how they bend (rule 3)."""
    ms = np.median(rounds_RP, axis=0)
    slope, start = np.polyfit(x, ms, 1)
    scaled = (x - x[0]) / (x[-1] - x[0])
    # Of a + b t + c t^2 over 0..1, the chord's middle lies c / 4 above the parabola's.
    bend = float(np.polyfit(scaled, ms, 2)[0] / 4 / ms.max())
    bends = [np.polyfit(scaled, row, 2)[0] / 4 / row.max() for row in rounds_RP]
    scatter = float(np.std(bends) / np.sqrt(len(bends))) if len(bends) > 1 else 0.0
    explained = 1 - np.sum((ms - start - slope * x) ** 2) / max(float(np.sum((ms - ms.mean()) ** 2)), 1e-12)
    limit = max(STRAIGHT_SHARE, 2 * scatter)
    verdict = "a straight line" if abs(bend) <= limit else "bends upwards" if bend > 0 else "better than a line"
    if ms.max() <= (1 + STRAIGHT_SHARE) * ms[0]:
        verdict = "flat"
    return {
        "ms_at_0": float(start),
        "ms_per_unit": float(slope),
        "explained": float(explained),
        "bend": bend,
        "bend_scatter": scatter,
        "last_to_first": float(ms[-1] / ms[0]),
        "verdict": verdict,
    }


def plot(path: Path, axis: str, x: np.ndarray, rounds_RP: np.ndarray, fit: dict[str, float | str], note: str) -> None:
    """One PNG: the median of each point, the range of its rounds, and the line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ms = np.median(rounds_RP, axis=0)
    low, high = np.quantile(rounds_RP, (0.25, 0.75), axis=0)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.errorbar(x, ms, yerr=(ms - low, high - ms), fmt="o", color="#0072b2", capsize=4, label="median, quartiles")
    ends = np.array([0.0, x[-1]])
    line = float(fit["ms_at_0"]) + float(fit["ms_per_unit"]) * ends
    axes.plot(ends, line, color="#e69f00", label=f"line, explains {100 * float(fit['explained']):.0f} %")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(TITLES[axis][0])
    axes.set_ylabel("ms an image")
    axes.set_title(f"{TITLES[axis][1]}: {fit['verdict']} (bend {100 * float(fit['bend']):+.1f} %)\n{note}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure, plot and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="kd-output", choices=sorted(METHODS))
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--axes", default="size,classes,steps", metavar="A,B,...")
    parser.add_argument("--out", type=Path, default=Path("step-scaling"), help="Folder of the JSON file and the plots.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {
        name: getattr(options, name) for name in ("method", "backbone", "rounds", "threads", "clock")
    } | {"batch_size": BATCH}
    note = f"{options.backbone}, {options.method}, batch {BATCH}, {options.threads} threads, {options.clock} clock"
    for axis in options.axes.split(","):
        started = time.perf_counter()
        found = measure(axis, options.backbone, options.method, options.rounds, options.clock)
        x = np.array(found["x"])
        rounds_RP = np.array([values for key, values in found.items() if key != "x"])
        fit = judge(x, rounds_RP)
        report[axis] = {"fit": fit, "ms_an_image": np.median(rounds_RP, axis=0).tolist(), **found}
        plot(options.out / f"{axis}.png", axis, x, rounds_RP, fit, note)
        print(f"{axis}: {fit['verdict']}; {time.perf_counter() - started:.0f} s of measuring")
        print(
            "  "
            + ", ".join(f"{value:.0f}: {ms:.1f} ms" for value, ms in zip(x, np.median(rounds_RP, axis=0), strict=True))
        )
        print(f"  last / first {fit['last_to_first']:.2f}, line explains {fit['explained']:.3f}", end="")
        print(
            f", bend {100 * float(fit['bend']):+.1f} % (scatter {100 * float(fit['bend_scatter']):.1f} %)", flush=True
        )
    (options.out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
