"""Does memory stay flat over 10,000 images, in the whole command? The peaks of `verify` and `predict`.

    python benchmarks/verify_memory.py BUNDLE --against PARENT --data msrc:MSRC --few 1000 --many 10000

Writes a folder with so many images and masks, which are links to those of the data set, and runs `edge-ilseg verify`
with labels, `verify` without (`--images`), and `predict` over it, each in a process of its own, first over a few of
them and then over all. Prints the peak of resident memory of each, the seconds, and what memory grew by for each image
more. Not for Windows, which does not tell the peak.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from edge_ilseg.cli.options import parse_data_text
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.errors import EXIT_PARITY, EXIT_PASSED, EXIT_RETENTION, EXIT_UNDECIDED

COMMAND = """
import sys
from edge_ilseg.cli import main
from edge_ilseg.devices.facts import read_peak_rss_mib
try:
    main()
finally:
    print("peak", read_peak_rss_mib(), file=sys.stderr)
"""
"""What the installed script `edge-ilseg` does, and the peak of its memory, which the process itself has to tell: what
the system tells of a child is at least what its parent had."""
VERDICTS = (EXIT_PASSED, EXIT_RETENTION, EXIT_PARITY, EXIT_UNDECIDED)
HEADINGS = f"{'':<24}{'images':>8}{'peak, MiB':>12}{'s':>8}{'bytes an image more':>22}"


class Cost(NamedTuple):
    """Of one process."""

    peak_mib: float
    wall_s: float


def main() -> None:
    """Measure, and print one row a command and number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", type=Path, required=True, help="bundle of the parent step")
    parser.add_argument("--data", required=True, help="KIND:ROOT")
    parser.add_argument("--split", default="test")
    parser.add_argument("--few", type=int, default=1000)
    parser.add_argument("--many", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / str(count) for count in (options.few, options.many)]
        source = write_source(open_data(parse_data_text(options.data)), options.split, Path(folder) / "source")
        for root, count in zip(roots, (options.few, options.many), strict=True):
            write_links(source, root, count)
        print(HEADINGS)
        for name, words in commands(options.bundle, options.against).items():
            costs = [cost_of([*words, *inputs(name, root)]) for root in roots]
            grown_bytes = (costs[1].peak_mib - costs[0].peak_mib) * (1 << 20) / (options.many - options.few)
            for count, cost, grown in zip((options.few, options.many), costs, ("", f"{grown_bytes:.0f}"), strict=True):
                print(f"{name:<24}{count:>8}{cost.peak_mib:>12.1f}{cost.wall_s:>8.1f}{grown:>22}", flush=True)


def commands(bundle: Path, against: Path) -> dict[str, list[str]]:
    """What is run, but for the images."""
    verify = ["verify", str(bundle), "--against", str(against), "--latency-runs", "1", "--json"]
    return {"verify, with labels": verify, "verify, without labels": verify, "predict": ["predict", str(bundle)]}


def inputs(name: str, root: Path) -> list[str]:
    """The images of a command, as its arguments."""
    if name == "predict":
        return [str(root / "images"), "--out", str(root.with_name(root.name + "-masks"))]
    return (
        ["--data", f"folder:{root}", "--split", "all"] if "with labels" in name else ["--images", str(root / "images")]
    )


def write_source(dataset: Dataset, split: str, root: Path) -> Path:
    """The images of a split as JPEGs, their masks as PNGs of label ids, and the list of classes."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(dataset.info.classes) + "\n")
    for number, image_id in enumerate(dataset.ids(split)):
        Image.fromarray(dataset.read_image(image_id)).save(root / "images" / f"{number}.jpg", quality=95)
        Image.fromarray(dataset.read_labels(image_id)).save(root / "masks" / f"{number}.png")
    return root


def write_links(source: Path, root: Path, count: int) -> None:
    """A data set of `count` images, all in the split `all`, that are those of `source` again and again."""
    names = sorted(path.stem for path in (source / "images").iterdir())
    for folder, suffix in (("images", ".jpg"), ("masks", ".png")):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number:06}{suffix}").hardlink_to(
                source / folder / (names[number % len(names)] + suffix)
            )
    (root / "classes.txt").hardlink_to(source / "classes.txt")
    (root / "splits").mkdir()
    (root / "splits/all.txt").write_text("".join(f"{number:06}\n" for number in range(count)))


def cost_of(words: Sequence[str]) -> Cost:
    """The peak of a process, and how long it ran.

    Raises:
        SystemExit: it ended with an error; a verdict, whichever, is none.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)
    wall_s = time.perf_counter() - start
    *said, last = done.stderr.splitlines() or [""]
    if done.returncode not in VERDICTS or not last.startswith("peak "):
        raise SystemExit(f"edge-ilseg {' '.join(words)} ended with {done.returncode}\n" + "\n".join(said))
    return Cost(float(last.removeprefix("peak ")), wall_s)


if __name__ == "__main__":
    main()
