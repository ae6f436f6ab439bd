"""Dilated depthwise convolutions of a training batch: torch's own against those of `edge_ilseg.models.depthwise`.

    python benchmarks/depthwise.py --size 160x112 --threads 2

The layers are those that EfficientNet-Lite0 and its DeepLab v3 head have at output stride 16, batch 8, channels last.
Both sides take turns in one run; milliseconds are medians, and the ratio is torch's time to ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_ilseg.models.depthwise import DepthwiseConv2d
from edge_ilseg.models.spec import ModelSpec, aspp_rates

BATCH, OUTPUT_STRIDE, ROUNDS = 8, 16, 15


class Layer(NamedTuple):
    """One convolution."""

    part: str
    channels: int
    kernel: int
    dilation: int


def layers(width_px: int, height_px: int) -> list[Layer]:
    """Of the encoder's last two stages, and of the head."""
    rates = aspp_rates(ModelSpec(input_width_px=width_px, input_height_px=height_px))
    encoder = [Layer("encoder", 1152, 5, 2), Layer("encoder", 1152, 3, 2)]
    return encoder + [Layer("head", 320, 3, rate) for rate in rates]


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def measure(layer: Layer, height_px: int, width_px: int) -> list[tuple[float, float]]:
    """Milliseconds of torch and of ours: forward, then both gradients."""
    channels, padding = layer.channels, layer.dilation * (layer.kernel // 2)
    conv = DepthwiseConv2d(
        channels, channels, layer.kernel, padding=padding, dilation=layer.dilation, groups=channels, bias=False
    )
    x_NCHW = torch.randn(BATCH, layer.channels, height_px, width_px).contiguous(memory_format=torch.channels_last)
    x_NCHW.requires_grad_(True)

    def by_torch() -> Tensor:
        return F.conv2d(x_NCHW, conv.weight, None, 1, padding, layer.dilation, channels)

    def gradients(y_NCHW: Tensor) -> Callable[[], object]:
        grad_NCHW = torch.ones_like(y_NCHW)
        return lambda: torch.autograd.grad(y_NCHW, (x_NCHW, conv.weight), grad_NCHW, retain_graph=True)

    pairs = [(by_torch, lambda: conv(x_NCHW)), (gradients(by_torch()), gradients(conv(x_NCHW)))]
    found = []
    for pair in pairs:
        times = [[milliseconds(run) for run in pair] for _ in range(ROUNDS + 1)][1:]
        torch_ms, own_ms = (statistics.median(column) for column in zip(*times, strict=True))
        found.append((torch_ms, own_ms))
    return found


@click.command()
@click.option("--size", default="160x112", show_default=True, help="Of the image, WxH.")
@click.option("--threads", default=2, show_default=True)
def main(size: str, threads: int) -> None:
    """Measure and print a table."""
    torch.set_num_threads(threads)
    width_px, height_px = map(int, size.split("x"))
    print(f"{size}, batch {BATCH}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("| layer | forward, torch / ours, ms | ratio | gradients, torch / ours, ms | ratio |")
    print("|---|---:|---:|---:|---:|")
    for layer in layers(width_px, height_px):
        cells = [
            f"{torch_ms:.2f} / {own_ms:.2f} | {torch_ms / own_ms:.1f}"
            for torch_ms, own_ms in measure(layer, -(-height_px // OUTPUT_STRIDE), -(-width_px // OUTPUT_STRIDE))
        ]
        name = f"{layer.part}, {layer.channels} channels, {layer.kernel}x{layer.kernel}, dilation {layer.dilation}"
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
