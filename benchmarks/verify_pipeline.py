"""From files to counted masks against the bare model: frames per second, cost of the counting, memory over many images.

    python benchmarks/verify_pipeline.py BUNDLE --data msrc:MSRC --images 256 --long 10000

Both sides run in one process, in turns, on the same int8 model: the bare loop gets images that are decoded and
resized already, and throws the masks away; the pipeline reads files, decodes, resizes, runs, brings masks to the size
of the labels and counts. Each is done with one image at a time and all threads, `--hint latency`, and with several
images side by side and a thread each, as `verify` and `predict` do by default. Prints the quickest of the rounds,
which other work on the machine disturbs least, beside it the median of all, the ratio of the quickest, and what reading
labels and counting add to a run. Decoding is work that no pipeline can leave out: the last line of each form says which
ratio is left when nothing but decoding is added to the model's work, both spread over the cores without a loss.

The long run is `evaluate_session`, files to scores, over the same files again and again: resident memory after each
tenth. Of each image an evaluation keeps the counts of the old classes (for the bootstrap) and the latency; how many
bytes that is is printed beside what resident memory grew by.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.bundle import Manifest, read_manifest
from edge_ilseg.cli.options import parse_data_text
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.devices.evaluation import Evaluation, evaluate_session
from edge_ilseg.devices.loaded_bundle import for_throughput, load_bundle
from edge_ilseg.devices.runtime import Session
from edge_ilseg.devices.stream import stream
from edge_ilseg.images import resize_image

ROUNDS = 5
TENTHS = 10


class Seconds(NamedTuple):
    """Of the rounds of one side."""

    quickest: float
    median: float


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

        sides: list[Callable[[], object]] = []
        for model in (session, several):
            sides += [
                functools.partial(_bare, model, inputs),
                functools.partial(_masks, model, dataset, ids),
                functools.partial(_masks, model, dataset, ids, with_labels=True),
                functools.partial(evaluate_session, model, dataset, ids, manifest),
            ]
        sides.append(functools.partial(_decoded, dataset, ids))
        seconds = _in_turns(sides, options.rounds)
        print(f"\n{entry.runtime} int8, {session.input_width_px}x{session.input_height_px}, {len(ids)} images")
        for form, part in (("", seconds[:4]), (", side by side", seconds[4:8])):
            for name, took in zip(
                ("bare model", "files to masks", "with labels", "files to scores"), part, strict=True
            ):
                ratio = f"{seconds[0].quickest / took.quickest:>6.2f} of the bare model"
                ratio += f", {part[0].quickest / took.quickest:.2f} of it in this form" if form else ""
                middle = f"(median {len(ids) / took.median:.1f})"
                print(f"  {name + form:<36}{len(ids) / took.quickest:>8.1f} frames/s {middle:<16}{ratio}")
            _, masks_s, labels_s, scores_s = (took.quickest for took in part)
            shares = [100 * (scores_s - less_s) / scores_s for less_s in (masks_s, labels_s)]
            print(f"  labels and counting: {shares[0]:.1f} % of the run; counting alone: {shares[1]:.1f} %")
            bare_s, decode_s = part[0].quickest, seconds[-1].quickest / len(os.sched_getaffinity(0))
            print(f"  decoding alone would leave {bare_s / (bare_s + decode_s):.2f} of the bare model in this form")
        if options.long:
            memory_mib, kept = long_run(session, dataset, ids, manifest, options.long)
            for done, mib in memory_mib:
                print(f"  files to scores, after {done:>6} images: {mib:.1f} MiB resident")
            grown_bytes = (memory_mib[-1][1] - memory_mib[0][1]) * (1 << 20)
            print(f"  kept of each image: {kept_bytes(kept) / len(kept.latencies_ms):.0f} bytes")
            print(
                f"  resident memory grew by {grown_bytes / (memory_mib[-1][0] - memory_mib[0][0]):.0f} bytes an image"
            )


def _bare(session: Session, inputs: list[NDArray[np.uint8]]) -> None:
    """As many images at the same time as the session takes, in memory and of its size already."""
    if session.concurrent_runs == 1:
        for image_HWC in inputs:
            session.mask(image_HWC)
        return
    with ThreadPoolExecutor(session.concurrent_runs) as pool:
        for _ in pool.map(session.mask, inputs):
            pass


def _masks(session: Session, dataset: Dataset, ids: Sequence[str], *, with_labels: bool = False) -> None:
    def read(image_id: str) -> tuple[Image.Image, NDArray[np.uint8] | None]:
        return dataset.open_image(image_id), dataset.read_labels(image_id) if with_labels else None

    for _ in stream(session, ids, read):
        pass


def _decoded(dataset: Dataset, ids: Sequence[str]) -> None:
    for image_id in ids:
        dataset.open_image(image_id)


def _in_turns(sides: Sequence[Callable[[], object]], rounds: int) -> list[Seconds]:
    times: list[list[float]] = [[] for _ in sides]
    for run in range(rounds + 1):
        for side, kept in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            if run:
                kept.append(time.perf_counter() - start)
    return [Seconds(min(kept), median(kept)) for kept in times]


def long_run(
    session: Session, dataset: Dataset, ids: Sequence[str], manifest: Manifest, count: int
) -> tuple[list[tuple[int, float]], Evaluation]:
    """Files to scores over `count` images: resident memory after each tenth of them, and what was kept.

    Args:
        count: at least `TENTHS`.
    """
    memory_mib: list[tuple[int, float]] = []

    def look(_: str, share: float) -> None:
        done = round(share * count)
        if done % (count // TENTHS) == 0:
            memory_mib.append((done, rss_mib()))

    again = tuple(itertools.islice(itertools.cycle(ids), count))
    kept = evaluate_session(session, dataset, again, manifest, look)
    return memory_mib, kept


def kept_bytes(found: Evaluation) -> int:
    """Memory of what an evaluation keeps of each image: the counts of old classes and the latencies."""
    total = sys.getsizeof(found.latencies_ms) + sum(sys.getsizeof(latency_ms) for latency_ms in found.latencies_ms)
    for part_NK in found.old_counts:
        whole: NDArray[np.uint32] = part_NK
        while whole.base is not None:  # a part of a larger array keeps all of that
            whole = whole.base
        total += sys.getsizeof(whole)
    return total


if __name__ == "__main__":
    main()
