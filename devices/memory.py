"""Peak memory of a model, measured in a process that does nothing else.

The process that verifies holds a parent's model, images and counts besides: its own peak says nothing of the model.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from edge_ilseg.bundle import Precision, Runtime, read_manifest
from edge_ilseg.devices.facts import read_peak_rss_mib
from edge_ilseg.devices.loaded_bundle import load_bundle
from edge_ilseg.devices.own_process import module_command
from edge_ilseg.errors import BundleError, EdgeIlsegError

TIMEOUT_S = 300
ANSWER = re.compile(r"^peak_rss_mib=(unknown|\d+(?:\.\d+)?)$", re.MULTILINE)
"""The child's last word. A runtime, or a hook of the Python there, may print before and after it."""


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
        BundleError: the process failed, did not end in time, or gave no answer.
    """
    command = [
        *module_command("edge_ilseg.devices.memory"),
        str(folder.resolve()),
        runtime,
        precision,
        str(threads or ""),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
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
    answers = ANSWER.findall(done.stdout)
    if not answers:
        raise BundleError(
            "the process that measures memory gave no answer",
            where=folder,
            found=done.stdout.strip()[-200:] or "nothing printed",
            expected="peak_rss_mib=NUMBER",
            hint="run the same command again; a hook of this Python may have replaced its output",
        )
    return None if answers[-1] == "unknown" else float(answers[-1])


def main(folder: str, runtime: Runtime, precision: Precision, threads: str) -> None:
    """Load the model, run it on every golden image, and print the peak."""
    path = Path(folder)
    loaded = load_bundle(path, read_manifest(path), runtime, precision, int(threads) if threads else None)
    for image_HWC in loaded.golden_images_NHWC:
        loaded.session.mask(np.array(image_HWC))
    peak_mib = read_peak_rss_mib()
    print(f"\npeak_rss_mib={'unknown' if peak_mib is None else peak_mib}", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])  # type: ignore[arg-type]
    except EdgeIlsegError as error:
        print(error.one_line(), file=sys.stderr)
        sys.exit(error.exit_code)
