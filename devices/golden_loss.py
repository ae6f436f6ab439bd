"""Where an int8 model's golden masks change on this device: in the quantization, or in the kernels.

1. *Simulated* int8 computes in float what scales and zero points say, on any processor: onnxruntime without its graph
   optimizations, OpenVINO without its low-precision transformations.
2. What the simulated masks differ from those of fp32 is what quantization costs; what the real masks differ from the
   simulated ones is what the integer kernels of this device cost. 8-bit weights on a processor without integer dot
   products show in the second.
3. A runtime that cannot simulate, or a bundle without fp32, leaves that part out and says so.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import ModelEntry
from edge_ilseg.devices.loaded_bundle import LoadedBundle
from edge_ilseg.devices.runtime import load_session
from edge_ilseg.devices.verify_report import GoldenLoss
from edge_ilseg.errors import EdgeIlsegError

Masks = list[NDArray[np.uint8]]


def split_golden_loss(loaded: LoadedBundle, threads: int | None) -> GoldenLoss:
    """The two losses on each golden image (rules 2 and 3).

    Raises:
        BundleError: the int8 or the fp32 model could not be run.
    """
    real = _masks(loaded, loaded.session.mask)
    try:
        simulated = _masks(loaded, load_session(loaded.folder, loaded.entry, threads=threads, simulated=True).mask)
    except EdgeIlsegError as error:
        return GoldenLoss(None, None, f"int8 cannot be simulated here: {error.what}")
    fp32 = _fp32_entry(loaded)
    if fp32 is None:
        return GoldenLoss(_shares(real, simulated), None, "the bundle has no fp32 model to compare with")
    exact = _masks(loaded, load_session(loaded.folder, fp32, threads=threads).mask)
    return GoldenLoss(_shares(real, simulated), _shares(simulated, exact), None)


def golden_loss_text(loss: GoldenLoss) -> str:
    """The two losses in words, each the mean over the golden images."""
    told = []
    if loss.mean_device is not None:
        told.append(f"kernels of this device: {loss.mean_device:.2%} of the pixels against simulated int8")
    if loss.mean_quantization is not None:
        told.append(f"quantization: {loss.mean_quantization:.2%} against fp32")
    if loss.reason is not None:
        told.append(loss.reason)
    return "; ".join(told)


def _fp32_entry(loaded: LoadedBundle) -> ModelEntry | None:
    for entry in loaded.manifest.models:
        if (entry.runtime, entry.precision) == (loaded.entry.runtime, "fp32"):
            return entry
    return None


def _masks(loaded: LoadedBundle, mask: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Masks:
    return [mask(np.array(image_HWC)) for image_HWC in loaded.golden_images_NHWC]


def _shares(one: Masks, two: Masks) -> tuple[float, ...]:
    """Share of the pixels that differ, in 0..1, image by image."""
    return tuple(float((a != b).mean()) for a, b in zip(one, two, strict=True))
