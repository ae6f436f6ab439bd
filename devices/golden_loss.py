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
from edge_ilseg.errors import EdgeIlsegError

Masks = list[NDArray[np.uint8]]


def split_golden_loss(loaded: LoadedBundle, threads: int | None) -> str:
    """The two losses on the golden images, in words (rules 2 and 3)."""
    real = _masks(loaded, loaded.session.mask)
    try:
        simulated = _masks(loaded, load_session(loaded.folder, loaded.entry, threads=threads, simulated=True).mask)
    except EdgeIlsegError as error:
        return f"int8 cannot be simulated here: {error.what}"
    told = [f"kernels of this device: {_share(real, simulated):.2%} of the pixels against simulated int8"]
    fp32 = _fp32_entry(loaded)
    if fp32 is not None:
        exact = _masks(loaded, load_session(loaded.folder, fp32, threads=threads).mask)
        told.append(f"quantization: {_share(simulated, exact):.2%} against fp32")
    return "; ".join(told)


def _fp32_entry(loaded: LoadedBundle) -> ModelEntry | None:
    for entry in loaded.manifest.models:
        if (entry.runtime, entry.precision) == (loaded.entry.runtime, "fp32"):
            return entry
    return None


def _masks(loaded: LoadedBundle, mask: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Masks:
    return [mask(np.array(image_HWC)) for image_HWC in loaded.golden_images_NHWC]


def _share(one: Masks, two: Masks) -> float:
    """Share of the pixels that differ."""
    return float(np.mean([(a != b).mean() for a, b in zip(one, two, strict=True)]))
