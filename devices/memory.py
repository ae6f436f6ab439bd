"""Peak memory of a model, measured in a process that does nothing else: `python -m edge_ilseg.devices.memory`.

The process that verifies holds a parent's model, images and counts besides: its own peak says nothing of the model.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from edge_ilseg.bundle import Precision, Runtime, read_manifest
from edge_ilseg.devices.facts import read_peak_rss_mib
from edge_ilseg.devices.loaded_bundle import load_bundle
from edge_ilseg.errors import BundleError, EdgeIlsegError

TIMEOUT_S = 300


def measure_peak_rss_mib(folder: Path, runtime: Runtime, precision: Precision, threads: int | None) -> float | None:
    """Highest resident memory of a process that loads a model and runs it on the golden images, MiB.

    Args:
        folder: of the bundle, whose hashes have been checked.
        runtime: which runtime.
        precision: which model.
        threads: of the runtime; None leaves the choice to it.

    Returns:
        None where the system does not tell the peak of a process.

    Raises:
        BundleError: the process failed, or did not end in time.
    """
    command = [sys.executable, "-m", "edge_ilseg.devices.memory", str(folder.resolve()), runtime, precision]
    try:
        done = subprocess.run(
            [*command, str(threads or "")], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BundleError(
            "the model did not run in time in a process of its own",
            where=folder,
            found=f"more than {TIMEOUT_S} s",
            hint="run the same command again while nothing else runs here",
        ) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BundleError(
            "the model does not run in a process of its own",
            where=folder,
            found=f"exit status {done.returncode}: {last[0]}",
            hint="a negative status is a signal: -9 usually means that the memory was not enough",
        )
    return float(done.stdout) if done.stdout.strip() else None


def main(folder: str, runtime: Runtime, precision: Precision, threads: str) -> None:
    """Load the model, run it on every golden image, and print the peak."""
    path = Path(folder)
    loaded = load_bundle(path, read_manifest(path), runtime, precision, int(threads) if threads else None)
    for image_HWC in loaded.golden_images_NHWC:
        loaded.session.mask(np.array(image_HWC))
    peak_mib = read_peak_rss_mib()
    print("" if peak_mib is None else peak_mib)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])  # type: ignore[arg-type]
    except EdgeIlsegError as error:
        print(error.one_line(), file=sys.stderr)
        sys.exit(error.exit_code)
