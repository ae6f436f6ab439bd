"""How fast is a step, and how much memory does it take, beside the plain loop of the literature?

    python benchmarks/step_speed.py --sizes 160x112,320x224 --threads 2

`plain` is written here as it is published: each batch goes through the whole teacher and the whole student, and the
gradient through the whole student; convolutions, enlargement and losses are torch's own. The others are
`edge_ilseg.train.train` as `edge-ilseg step` runs it: with a frozen encoder (`freeze`), the same with cached features
once the cache is full (`cache`), and with every weight trained (`unfrozen`). All have output distillation and the same
images, of a photograph's size, augmented alike.

Each runs in a process of its own, so that its peak memory is its own. They take turns, a round each, so that whatever
else the machine does meets them all; the ratio is the median over the rounds of plain's time to theirs. On a busy
machine `--clock cpu --threads 1` counts the processor's time in place of the wall clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

VARIANTS = ("plain", "freeze", "cache", "unfrozen")
TARGETS = {"freeze": 4.0, "cache": 12.0, "unfrozen": 1.0}
MEMORY_TARGET = 0.6  # of freeze
OLD, NEW, BATCH, IMAGES, VIEWS = 16, 5, 8, 16, 2
PHOTO_HEIGHT_PX, PHOTO_WIDTH_PX = 213, 320
ROUND_ITERATIONS = {"plain": 2, "freeze": 10, "cache": 10, "unfrozen": 10}
"""`train` calls its `progress` every ten iterations; the plain loop needs no more than two."""


class Photos:
    """A data set of noise in the size of photographs, labelled in squares, held in memory."""

    def __init__(self) -> None:
        import numpy as np

        from edge_ilseg.data.dataset import DatasetInfo

        rng = np.random.default_rng(0)
        names = tuple(f"class{index:02}" for index in range(OLD + NEW))
        self.info = DatasetInfo("photos", names, None, ((0, 0, 0),) * len(names), {}, ("train",))
        self.images_NHWC = rng.integers(0, 256, (IMAGES, PHOTO_HEIGHT_PX, PHOTO_WIDTH_PX, 3), dtype=np.uint8)
        squares_NHW = rng.integers(0, len(names), (IMAGES, 7, 10), dtype=np.uint8)
        labels_NHW = squares_NHW.repeat(32, axis=1).repeat(32, axis=2)
        self.labels_NHW = labels_NHW[:, :PHOTO_HEIGHT_PX, :PHOTO_WIDTH_PX]

    def ids(self, split: str) -> tuple[str, ...]:
        """All images."""
        return tuple(str(index) for index in range(IMAGES))

    def read_image(self, image_id: str) -> Any:
        """One image."""
        return self.images_NHWC[int(image_id)]

    def read_labels(self, image_id: str) -> Any:
        """Its label ids."""
        return self.labels_NHW[int(image_id)]


def make_networks(width_px: int, height_px: int) -> tuple[Any, Any]:
    """Student and teacher."""
    import copy

    import torch

    from edge_ilseg.models.segmentation import build_model
    from edge_ilseg.models.spec import ModelSpec

    torch.manual_seed(0)
    teacher = build_model(ModelSpec(input_width_px=width_px, input_height_px=height_px), (OLD,)).eval()
    student = copy.deepcopy(teacher)
    student.grow(NEW)
    return student, teacher


def make_batches(student: Any, settings: Any) -> Any:
    """The loader of a step, endless for the purpose."""
    import numpy as np

    from edge_ilseg.data.loader import training_batches
    from edge_ilseg.data.step_view import StepView

    photos = Photos()
    return training_batches(
        StepView(photos, photos.ids("train"), np.arange(256, dtype=np.uint8)), student.spec, settings
    )


def run_plain(student: Any, teacher: Any, settings: Any, turn: Callable[..., None]) -> None:
    """The loop as published: two whole networks, and the gradient through the whole student."""
    import torch
    from torch.nn import functional as F

    from edge_ilseg.models import depthwise
    from edge_ilseg.models.normalization import normalize

    depthwise._may_be_replaced = lambda *_: False
    teacher.requires_grad_(False).eval()
    student.set_batch_norm("eval")
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    for iteration, (images_NHWC, labels_NHW) in enumerate(make_batches(student, settings)):
        images_NCHW = normalize(images_NHWC, student.spec)
        with torch.no_grad():
            old_NKHW = F.interpolate(teacher(images_NCHW).coarse_NCHW, images_NCHW.shape[2:], mode="bilinear")
        logits_NCHW = F.interpolate(student(images_NCHW).coarse_NCHW, images_NCHW.shape[2:], mode="bilinear")
        loss = F.cross_entropy(logits_NCHW, labels_NHW, ignore_index=255)
        log_p_NKHW = F.log_softmax(logits_NCHW, dim=1)[:, :OLD]
        is_old_NHW = labels_NHW < OLD
        per_pixel_NHW = -(F.softmax(old_NKHW, dim=1) * log_p_NKHW).sum(dim=1)
        loss = loss + (per_pixel_NHW * is_old_NHW).sum() / is_old_NHW.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % ROUND_ITERATIONS["plain"] == 0:
            turn()


def run_ours(variant: str, student: Any, teacher: Any, settings: Any, turn: Callable[..., None]) -> None:
    """The training loop of `edge-ilseg step`."""
    from edge_ilseg.methods import METHODS
    from edge_ilseg.terms import StepFacts
    from edge_ilseg.train import train

    train(
        student,
        make_batches(student, settings),
        settings,
        teacher=teacher,
        method=METHODS["kd-output" if variant == "unfrozen" else "freeze+kd-output"],
        facts=StepFacts(old_count=OLD),
        accelerator="cpu",
        progress=lambda *_: turn(),
    )


def child(variant: str, width_px: int, height_px: int, threads: int, clock: Callable[[], float]) -> None:
    """Run a variant; before each round wait for a line, and after it print the seconds of one iteration."""
    import torch

    from edge_ilseg.config import TrainConfig

    torch.set_num_threads(threads)
    student, teacher = make_networks(width_px, height_px)
    views = VIEWS if variant == "cache" else 0
    settings = TrainConfig(
        iterations=10**5, batch_size=BATCH, learning_rate=1e-4, batch_norm="eval", augment_views=views
    )
    started: list[float] = []

    def turn() -> None:
        if started:
            seconds = (clock() - started[-1]) / ROUND_ITERATIONS[variant]
            peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps([seconds, peak_mib]), flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the benchmark is done; the run would go on for ever
        started.append(clock())

    if variant == "plain":
        run_plain(student, teacher, settings, turn)
    else:
        run_ours(variant, student, teacher, settings, turn)


def measure(size: str, options: argparse.Namespace, variants: list[str]) -> dict[str, tuple[list[float], float]]:
    """Seconds an iteration in each round, and peak memory in MiB, of each variant."""
    shared = ["--threads", str(options.threads), "--clock", options.clock]
    processes = {
        variant: subprocess.Popen(
            [sys.executable, __file__, "--child", variant, "--sizes", size, *shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for variant in variants
    }
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    peaks_mib: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for variant, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{variant} failed")
            took, peaks_mib[variant] = json.loads(line)
            if number:  # the first round warms up, and fills the cache
                seconds[variant].append(took)
    for process in processes.values():
        process.communicate()
    return {variant: (seconds[variant], peaks_mib[variant]) for variant in variants}


def main() -> None:
    """Measure, and print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="160x112,320x224")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        width_px, height_px = map(int, options.sizes.split("x"))
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        child(options.child, width_px, height_px, options.threads, clock)
        return
    variants = options.variants.split(",")
    for size in options.sizes.split(","):
        found = measure(size, options, variants)
        how = f"{options.threads} threads, {options.clock} time"
        print(f"efficientnet_lite0, {size}, batch {BATCH}, {OLD}+{NEW} classes, {how}")
        print(f"{'':<10}{'images/s':>10}{'x plain':>10}{'rounds':>18}{'target':>9}{'peak MiB':>11}{'x plain':>10}")
        plain_s, plain_mib = found["plain"]
        for variant, (seconds, peak_mib) in found.items():
            ratios = [plain / own for plain, own in zip(plain_s, seconds, strict=True)]
            spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
            rate = BATCH / statistics.median(seconds)
            target = f">= {TARGETS[variant]:g}" if variant in TARGETS else ""
            print(
                f"{variant:<10}{rate:>10.2f}{statistics.median(ratios):>10.2f}{spread:>18}{target:>9}"
                f"{peak_mib:>11.0f}{peak_mib / plain_mib:>10.2f}" + ("  <= 0.6" if variant == "freeze" else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
