"""From files to counted masks against the bare model: frames per second, cost of the counting, memory over many images.

    python benchmarks/verify_pipeline.py BUNDLE --data msrc:MSRC --images 256 --long 10000

Both sides run in one process, in turns, on the same int8 model: the bare loop gets images that are decoded and
resized already, and throws the masks away; the pipeline reads files, decodes, resizes, runs, brings masks to the size
of the labels and counts. Each is done with one image at a time and all threads, `--hint latency`, and with several
images side by side and a thread each, as `verify` and `predict` do by default. Prints the quickest of the rounds,
which other work on the machine disturbs least, beside it the median of all, the ratio of the quickest, and what reading
labels and counting add to a run. Decoding is work that no pipeline can leave out: the last line of each form says which
ratio is left when nothing but decoding is added to the model's work, both spread over the cores without a loss. With
`--own-tool SECONDS` OpenVINO's own `benchmark_app` runs the same file after each round, with the same hint, random
values and nothing around it, and the pipeline's ratio to its best round is printed too.

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
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.bundle import Manifest, ModelEntry, read_manifest
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
NAMES = ("bare model", "files to masks", "with labels", "files to scores")
HINTS = ("latency", "throughput")
OWN_TOOL = "import sys; from openvino.tools.benchmark.main import main; sys.exit(main())"
"""What the installed script `benchmark_app` does."""


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
    parser.add_argument("--own-tool", type=float, default=0.0, metavar="SECONDS", help="OpenVINO's, each round")
    options = parser.parse_args()
    if options.own_tool and options.threads:
        parser.error("benchmark_app takes no number of threads beside a hint: leave --threads out")
    dataset = open_data(parse_data_text(options.data))
    ids = dataset.ids(options.split)[: options.images]
    manifest = read_manifest(options.bundle)
    for entry in manifest.models:
        if entry.precision != "int8":
            continue
        loaded = load_bundle(options.bundle, manifest, entry.runtime, "int8", options.threads)
        forms = {"": loaded.session, ", side by side": for_throughput(loaded, options.threads).session}
        own_tool_fps: list[list[float]] = [[] for _ in HINTS]

        def each_round(entry: ModelEntry = entry, found: list[list[float]] = own_tool_fps) -> None:
            if options.own_tool and entry.runtime == "openvino":
                for hint, kept in zip(HINTS, found, strict=True):
                    kept.append(own_tool(options.bundle / entry.files[0], hint, options.own_tool))

        *parts, decoded = _in_turns(_sides(forms.values(), dataset, ids, manifest), options.rounds, each_round)
        session = loaded.session
        print(f"\n{entry.runtime} int8, {session.input_width_px}x{session.input_height_px}, {len(ids)} images")
        for place, (form, tool_fps) in enumerate(zip(forms, own_tool_fps, strict=True)):
            part = parts[place * len(NAMES) : (place + 1) * len(NAMES)]
            print_form(form, part, parts[0].quickest, decoded.quickest, len(ids), tool_fps)
        if options.long:
            print_long_run(*long_run(loaded.session, dataset, ids, manifest, options.long))


def _sides(
    sessions: Iterable[Session], dataset: Dataset, ids: Sequence[str], manifest: Manifest
) -> list[Callable[[], object]]:
    """For each session those of `NAMES`, then decoding alone."""
    sides: list[Callable[[], object]] = []
    for session in sessions:
        inputs = [resize_image(dataset.read_image(i), session.input_height_px, session.input_width_px) for i in ids]
        sides += [
            functools.partial(_bare, session, inputs),
            functools.partial(_masks, session, dataset, ids),
            functools.partial(_masks, session, dataset, ids, with_labels=True),
            functools.partial(evaluate_session, session, dataset, ids, manifest),
        ]
    return [*sides, functools.partial(_decoded, dataset, ids)]


def print_form(
    form: str, part: Sequence[Seconds], one_by_one_s: float, decoded_s: float, count: int, tool_fps: Sequence[float]
) -> None:
    """The rows of one form.

    Args:
        form: its name; empty: one image at a time.
        part: of the sides in `NAMES`.
        one_by_one_s: of the bare model, one image at a time.
        decoded_s: of decoding alone, on one core.
        count: of the images.
        tool_fps: frames a second in the runtime's own tool, each round; empty: it was not asked.
    """
    for name, took in zip(NAMES, part, strict=True):
        ratio = f"{one_by_one_s / took.quickest:>6.2f} of the bare model"
        ratio += f", {part[0].quickest / took.quickest:.2f} of it in this form" if form else ""
        middle = f"(median {count / took.median:.1f})"
        print(f"  {name + form:<36}{count / took.quickest:>8.1f} frames/s {middle:<16}{ratio}")
    bare_s, masks_s, labels_s, scores_s = (took.quickest for took in part)
    if tool_fps:
        ratio = f"{count / masks_s / max(tool_fps):>6.2f} of it from files to masks"
        middle = f"(median {median(tool_fps):.1f})"
        print(f"  {'benchmark_app' + form:<36}{max(tool_fps):>8.1f} frames/s {middle:<16}{ratio}")
    shares = [100 * (scores_s - less_s) / scores_s for less_s in (masks_s, labels_s)]
    print(f"  labels and counting: {shares[0]:.1f} % of the run; counting alone: {shares[1]:.1f} %")
    least_s = bare_s + decoded_s / len(os.sched_getaffinity(0))
    print(f"  decoding alone would leave {bare_s / least_s:.2f} of the bare model in this form")


def print_long_run(memory_mib: Sequence[tuple[int, float]], kept: Evaluation) -> None:
    """Resident memory after each tenth of the images, and what was kept of each."""
    for done, mib in memory_mib:
        print(f"  files to scores, after {done:>6} images: {mib:.1f} MiB resident")
    (first, first_mib), (last, last_mib) = memory_mib[0], memory_mib[-1]
    print(f"  kept of each image: {kept_bytes(kept) / len(kept.latencies_ms):.0f} bytes")
    print(f"  resident memory grew by {(last_mib - first_mib) * (1 << 20) / (last - first):.0f} bytes an image")


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


def own_tool(model: Path, hint: str, seconds: float) -> float:
    """Frames a second of a model in OpenVINO's `benchmark_app`.

    Raises:
        SystemExit: it failed, or did not say.
    """
    words = ["-m", str(model), "-d", "CPU", "-hint", hint, "-t", str(max(1, round(seconds)))]
    done = subprocess.run([sys.executable, "-c", OWN_TOOL, *words], capture_output=True, text=True, check=False)
    match = re.search(r"Throughput:\s+([\d.]+) FPS", done.stdout)
    if done.returncode or not match:
        raise SystemExit(f"benchmark_app ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(match[1])


def _in_turns(sides: Sequence[Callable[[], object]], rounds: int, each_round: Callable[[], None]) -> list[Seconds]:
    """Wall time of each side, in so many rounds after one that is not counted; `each_round` is called after each."""
    times: list[list[float]] = [[] for _ in sides]
    for run in range(rounds + 1):
        for side, kept in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            if run:
                kept.append(time.perf_counter() - start)
        if run:
            each_round()
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
