"""A step of the paper's network on a GPU: DeepLab v2 on ResNet-101, crops of 321, beside the plain loop.

    python benchmarks/gpu_step.py --out gpu.json
    python benchmarks/gpu_step.py --backbone resnet18 --crop 65 --iterations 4 --batches 2 --accelerator cpu  # a try

The plain loop is that of the literature: teacher and student run whole, side by side, the student's backward pass goes
through the whole network, and the loss is read back from the device in every iteration. `edge-ilseg` is the project's
own `train`. Both get the same batches, which lie on the device already, so that neither waits for images. Prints
images a second, peak memory and the ratio to the plain loop of the same precision and batch, and where the time goes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_ilseg.config import StepConfig, override
from edge_ilseg.methods import METHODS
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.progress import no_progress
from edge_ilseg.reproduce import STEP
from edge_ilseg.terms import StepFacts
from edge_ilseg.train import train

OLD, NEW = 20, 1
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
Batch = tuple[Tensor, Tensor]


def make_batches(count: int, batch: int, crop_px: int, device: str) -> list[Batch]:
    """Noise for images and blocks of 64 pixels for labels: neither changes what an iteration costs."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        images_NHWC = torch.randint(0, 256, (batch, crop_px, crop_px, 3), dtype=torch.uint8, generator=generator)
        blocks = torch.randint(0, OLD + NEW, (batch, 1, -(-crop_px // 64), -(-crop_px // 64)), generator=generator)
        labels_NHW = F.interpolate(blocks.float(), scale_factor=64)[:, 0, :crop_px, :crop_px].long()
        batches.append((images_NHWC.to(device), labels_NHW.to(device)))
    return batches


def plain_loop(
    student: SegmentationModel, teacher: SegmentationModel, batches: Iterator[Batch], precision: str
) -> None:
    """The literature's loop: two whole networks forward, one backward, cross-entropy + L'_D."""
    student.train()
    student.set_batch_norm("eval")
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)
    device = next(student.parameters()).device.type
    for images_NHWC, labels_NHW in batches:
        images_NCHW = normalize(images_NHWC, student.spec)
        with torch.autocast(device, PRECISIONS[precision], enabled=precision != "32-true"):
            with torch.no_grad():
                taught_NKHW = teacher(images_NCHW).logits_NCHW
            logits_NCHW = student(images_NCHW).logits_NCHW
            loss = F.cross_entropy(logits_NCHW, labels_NHW, ignore_index=255)
            old_NHW = labels_NHW < OLD
            seen = torch.log_softmax(logits_NCHW, dim=1)[:, :OLD].permute(0, 2, 3, 1)[old_NHW]
            loss = loss - (torch.softmax(taught_NKHW, dim=1).permute(0, 2, 3, 1)[old_NHW] * seen).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def own_loop(
    student: SegmentationModel, teacher: SegmentationModel, batches: Iterator[Batch], settings: StepConfig, device: str
) -> None:
    """The project's loop."""
    train(
        student,
        batches,
        settings,
        teacher=teacher,
        method=METHODS[settings.method],
        facts=StepFacts(OLD, background=0),
        accelerator=device,
        progress=no_progress,
    )


def measure(options: argparse.Namespace, batch: int, precision: str, method: str, iterations: int) -> dict[str, Any]:
    """One loop for some iterations, its memory and speed; the first tenth is left out of the speed."""
    device = options.accelerator
    spec = ModelSpec(
        backbone=options.backbone,
        head="deeplab_v2",
        output_stride=8,
        input_height_px=options.crop,
        input_width_px=options.crop,
    )
    torch.manual_seed(0)
    teacher = settled(build_model(spec, (OLD,)).to(device), options.crop)
    student = copy.deepcopy(teacher)
    student.grow(NEW)
    student.to(device)
    warm_up = max(2, iterations // 10)
    stamps: list[float] = []

    def batches() -> Iterator[Batch]:
        made = make_batches(options.batches, batch, options.crop, device)
        for number, item in enumerate(itertools.islice(itertools.cycle(made), warm_up + iterations)):
            if number == warm_up:
                synchronize(device)
                stamps.append(time.perf_counter())
            yield item
        synchronize(device)
        stamps.append(time.perf_counter())

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if method == "plain":
        plain_loop(student, teacher, batches(), precision)
    else:
        changed = override(STEP, method=method, precision=precision, batch_size=batch, iterations=warm_up + iterations)
        own_loop(student, teacher, batches(), changed, device)
    seconds = stamps[1] - stamps[0]
    memory_mib = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return {
        "loop": method,
        "batch": batch,
        "precision": precision,
        "iterations": iterations,
        "images_per_s": batch * iterations / seconds,
        "peak_memory_mib": memory_mib,
    }


@torch.no_grad()
def settled(model: SegmentationModel, crop_px: int) -> SegmentationModel:
    """`model` with batch norm statistics of noise: a deep network of random weights overflows without."""
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(2, 3, crop_px, crop_px, device=device))
    return model.eval()


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def profile(options: argparse.Namespace, batch: int, precision: str, method: str) -> list[dict[str, Any]]:
    """The operators that the device spends most time in, over a few iterations."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.accelerator == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        measure(options, batch, precision, method, 4)
    key = "self_device_time_total" if options.accelerator == "cuda" else "self_cpu_time_total"
    averages = profiler.key_averages()
    total = sum(getattr(item, key) for item in averages)
    slowest = sorted(averages, key=lambda item: -getattr(item, key))[:16]
    return [
        {"operator": item.key[:90], "calls": item.count, "share_pct": 100 * getattr(item, key) / total}
        for item in slowest
    ]


def main() -> None:
    """Measure all loops and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--iterations", type=int, default=20, help="of each loop that is compared")
    parser.add_argument("--long-iterations", type=int, default=0, help="of kd-output at each batch size, as well")
    parser.add_argument("--batches", type=int, default=4, help="different batches")
    parser.add_argument("--batch-sizes", default="4,24")
    parser.add_argument("--methods", default="kd-output,freeze+kd-output")
    parser.add_argument("--accelerator", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sizes = [int(text) for text in options.batch_sizes.split(",")]
    rows: list[dict[str, Any]] = []
    print(f"{'loop':<18}{'batch':>6}{'precision':>12}{'its':>5}{'images/s':>10}{'MiB':>9}{'x plain':>9}", flush=True)
    for batch in sizes:
        for precision in PRECISIONS:
            plain = 0.0
            for method in ("plain", *options.methods.split(",")):
                row = measure(options, batch, precision, method, options.iterations)
                plain = row["images_per_s"] if method == "plain" else plain
                print_row(row, plain)
                rows.append(row)
        if options.long_iterations:
            rows.append(measure(options, batch, "32-true", "kd-output", options.long_iterations))
            print_row(rows[-1], 0.0)
    slowest = profile(options, sizes[-1], "bf16-mixed", "kd-output")
    for item in slowest:
        print(f"{item['share_pct']:6.1f} % {item['calls']:>6} {item['operator']}")
    name = torch.cuda.get_device_name() if options.accelerator == "cuda" else "CPU"
    if options.out:
        result = {"device": name, "torch": torch.__version__, "rows": rows, "profile": slowest}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def print_row(row: dict[str, Any], plain: float) -> None:
    """One line of the table."""
    ratio = f"{row['images_per_s'] / plain:.2f}" if plain else "-"
    memory = f"{row['peak_memory_mib']:.0f}" if row["peak_memory_mib"] else "-"
    print(
        f"{row['loop']:<18}{row['batch']:>6}{row['precision']:>12}{row['iterations']:>5}"
        f"{row['images_per_s']:>10.1f}{memory:>9}{ratio:>9}",
        flush=True,
    )


if __name__ == "__main__":
    main()
