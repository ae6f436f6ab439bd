"""Which layers of a loaded model run in which element type: asked of OpenVINO, read from a profile of onnxruntime.

onnxruntime tells what it runs only in a profile, so one golden image is run once more, in a session of its own that
writes its profile into a temporary folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from edge_ilseg.devices.layers import ExecutedLayer, parse_profile
from edge_ilseg.devices.loaded_bundle import LoadedBundle
from edge_ilseg.devices.ports import INPUT_NAME
from edge_ilseg.devices.runtime import onnxruntime_errors, start_onnxruntime
from edge_ilseg.errors import EdgeIlsegError


def read_executed_layers(loaded: LoadedBundle, threads: int | None) -> tuple[ExecutedLayer, ...] | None:
    """The layers as they run here, in order; None where the runtime cannot be made to tell.

    Args:
        loaded: a model, with its golden images.
        threads: of the runtime, as it was loaded: another number may choose other kernels.
    """
    if loaded.session.executed_layers is not None:
        return loaded.session.executed_layers
    try:
        with tempfile.TemporaryDirectory(prefix="edge-ilseg-profile-") as folder:
            return _profiled(loaded, threads, Path(folder))
    except (EdgeIlsegError, OSError, ValueError):  # no room for a second session or for the file, another format
        return None


def _profiled(loaded: LoadedBundle, threads: int | None, folder: Path) -> tuple[ExecutedLayer, ...] | None:
    session = start_onnxruntime(loaded.folder / loaded.entry.files[0], threads, profile_prefix=folder / "profile")
    try:
        session.run(["mask"], {INPUT_NAME: np.array(loaded.golden_images_NHWC[:1])})
        written = session.end_profiling()
    except onnxruntime_errors():
        return None
    return parse_profile(Path(written).read_bytes()) or None
