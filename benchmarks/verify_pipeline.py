"""From files to counted masks against the bare model: frames per second, cost of the counting, memory over many images.

    python benchmarks/verify_pipeline.py BUNDLE --data msrc:MSRC --images 256 --long 10000

Both sides run in one process, in turns, on the same int8 model: the bare loop gets images that are decoded and resized
already, and throws the masks away; the pipeline reads files, decodes, resizes, runs, brings masks to the size of the
labels and counts. Prints the median over rounds and the ratio. The long run goes over the same files again and again.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edge_ilseg.bundle import read_manifest
from edge_ilseg.cli.options import parse_data_text
from edge_ilseg.data import open_data
from edge_ilseg.devices.evaluation import evaluate_session
from edge_ilseg.devices.loaded_bundle import for_throughput, load_bundle
from edge_ilseg.devices.stream import stream
from edge_ilseg.images import resize_image

ROUNDS = 5


def rss_mib() -> float:
    """Resident memory of this process."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) / 1024


def main() -> None:
    """Measure, and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", required=True, help="KIND:ROOT")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--long", type=int, default=10_000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    dataset = open_data(parse_data_text(options.data))
    ids = dataset.ids(options.split)[: options.images]
    manifest = read_manifest(options.bundle)
    for entry in manifest.models:
        if entry.precision != "int8":
            continue
        loaded = load_bundle(options.bundle, manifest, entry.runtime, "int8", options.threads)
        session = loaded.session
        several = for_throughput(loaded, options.threads).session
        inputs = [resize_image(dataset.read_image(i), session.input_height_px, session.input_width_px) for i in ids]

        def bare(session=session, inputs=inputs) -> None:  # type: ignore[no-untyped-def]
            for image_HWC in inputs:
                session.mask(image_HWC)

        def masks(session=session) -> None:  # type: ignore[no-untyped-def]
            for _ in stream(session, ids, lambda image_id: (dataset.read_image(image_id), None)):
                pass

        def masks_at_once(session=several) -> None:  # type: ignore[no-untyped-def]
            for _ in stream(session, ids, lambda image_id: (dataset.read_image(image_id), None)):
                pass

        def whole(session=session) -> None:  # type: ignore[no-untyped-def]
            evaluate_session(session, dataset, ids, manifest)

        names = ("bare model", "files to masks", "files to scores", "masks, --hint throughput")
        seconds = _in_turns((bare, masks, whole, masks_at_once), options.rounds)
        print(f"\n{entry.runtime} int8, {session.input_width_px}x{session.input_height_px}, {len(ids)} images")
        for name, value in zip(names, seconds, strict=True):
            print(f"  {name:<26}{len(ids) / value:>8.1f} frames/s   {seconds[0] / value:>6.2f} of the bare model")
        print(f"  labels and counting take {100 * (seconds[2] - seconds[1]) / seconds[2]:.1f} % of the run")
        if options.long:
            for done, mib in _long_run(session, dataset, ids, options.long):
                print(f"  after {done:>6} images: {mib:.1f} MiB resident")


def _in_turns(sides: tuple[Callable[[], None], ...], rounds: int) -> list[float]:
    times: list[list[float]] = [[] for _ in sides]
    for run in range(rounds + 1):
        for side, kept in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            if run:
                kept.append(time.perf_counter() - start)
    return [float(np.median(kept)) for kept in times]


def _long_run(session, dataset, ids, count: int) -> Iterator[tuple[int, float]]:  # type: ignore[no-untyped-def]
    """Resident memory after a tenth of the images, and after each further tenth."""
    again = itertools.islice(itertools.cycle(ids), count)
    for done, _ in enumerate(stream(session, again, lambda image_id: (dataset.read_image(image_id), None)), start=1):
        if done % (count // 10) == 0:
            yield done, rss_mib()


if __name__ == "__main__":
    main()
