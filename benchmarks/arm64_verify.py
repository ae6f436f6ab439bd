"""The same verification on this machine and on emulated arm64: masks, mIoU old and new, golden outputs.

    python benchmarks/arm64_verify.py BUNDLE --against PARENT --data msrc:MSRC --images MSRC/Images --limit 48

Needs Debian's qemu-user, apt and dpkg (no special rights, nothing is installed on the machine): a Debian root for arm64
with Python, libstdc++ and libgomp is unpacked into `--work`, and the published aarch64 wheels of the device's packages,
for the Python of that root, beside it. Both sides run `edge-ilseg verify` and `edge-ilseg predict` of this checkout,
with onnxruntime.

1. Emulation proves results, not speed: the emulated latencies are not printed.
2. The emulated process sees the `/proc/cpuinfo` of an emulated processor: onnxruntime looks for instruction sets there,
   and dies where it finds that of another machine.
3. The emulated Python is a script that calls the emulator, so that it can start itself again: verify measures
   the memory of a process of its own.
4. Masks are compared as they were written, channel by channel: of each class, how much of what either side sees both
   see. Overlays are not looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import read_manifest
from edge_ilseg.cli.options import parse_data_text
from edge_ilseg.devices.prediction import MASKS
from edge_ilseg.images import IMAGE_SUFFIXES, read_mask

CHECKOUT = Path(__file__).resolve().parents[1]
DEBIAN_PACKAGES = ("python3", "libstdc++6", "libgomp1")
PACKAGES = ("numpy", "onnxruntime", "pillow", "msgspec", "click", "rich", "markdown-it-py", "mdurl", "pygments")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
CPUINFO = """processor\t: {core}
BogoMIPS\t: 108.00
Features\t: {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: {variant}
CPU part\t: {part}
CPU revision\t: {revision}

"""
PROCESSORS = {
    # what the kernel of a Raspberry Pi 4 and of a Pi 5 says
    "cortex-a72": ("fp asimd evtstrm crc32 cpuid", "0x0", "0xd08", "3"),
    "cortex-a76": (
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "0x4",
        "0xd0b",
        "1",
    ),
}


def main() -> None:
    """Prepare the root where it is not there, run both sides, print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--data", required=True, help="KIND:ROOT")
    parser.add_argument("--images", type=Path, required=True, help="folder of images whose masks are compared")
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--processor", choices=sorted(PROCESSORS), default="cortex-a72")
    parser.add_argument("--work", type=Path, default=Path("arm64"))
    options = parser.parse_args()
    options.data = resolved_data(options.data)
    for program in ("qemu-aarch64", "apt-get", "dpkg"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: apt-get install qemu-user (Debian)")
    options.work.mkdir(parents=True, exist_ok=True)
    python = _emulated_python(options.work.resolve(), options.processor)
    sides = {platform.machine(): [sys.executable], f"aarch64 ({options.processor}, emulated)": [str(python)]}
    reports = {name: _verify(command, options) for name, command in sides.items()}
    here, there = (
        _predict(command, options, options.work / f"masks-{number}") for number, command in enumerate(sides.values())
    )
    _print_scores(reports)
    _print_agreement(compare_masks(here, there, read_manifest(options.bundle).class_names))


class MaskAgreement(NamedTuple):
    """How far two sides see the same in the same images (rule 4)."""

    images: int
    equal: float
    """Share of all pixels, 0..1."""
    worst: float
    """That of the image in which it is smallest."""
    classes: dict[str, float | None]
    """Of each class: pixels that both sides call so, over those that either does; `None` where neither does."""


def compare_masks(
    here: Mapping[str, NDArray[Any]], there: Mapping[str, NDArray[Any]], class_names: Sequence[str]
) -> MaskAgreement:
    """Compare the masks of two sides.

    Args:
        here, there: name of an image -> channels, integers, H x W.
        class_names: in channel order.

    Raises:
        ValueError: there is no mask, or the two do not have masks of the same images in the same sizes.
    """
    sizes = [{name: mask_HW.shape for name, mask_HW in side.items()} for side in (here, there)]
    if not here or sizes[0] != sizes[1]:
        raise ValueError("the two sides did not make the same masks")
    pixels = equal = 0
    shares = []
    both_K, either_K = (np.zeros(len(class_names), np.int64) for _ in range(2))
    for name, mask_HW in here.items():
        other_HW = there[name]
        same = int((mask_HW == other_HW).sum())
        pixels, equal = pixels + mask_HW.size, equal + same
        shares.append(same / mask_HW.size)
        for channel in range(len(class_names)):
            mine_HW, theirs_HW = mask_HW == channel, other_HW == channel
            both_K[channel] += (mine_HW & theirs_HW).sum()
            either_K[channel] += (mine_HW | theirs_HW).sum()
    classes = {
        name: float(both / either) if either else None
        for name, both, either in zip(class_names, both_K, either_K, strict=True)
    }
    return MaskAgreement(len(here), equal / pixels, min(shares), classes)


def read_masks(out: Path) -> dict[str, NDArray[Any]]:
    """The masks of what `predict` has written, by the name of their image: channels, H x W. No overlay (rule 4)."""
    folder = out / MASKS
    return {path.relative_to(folder).as_posix(): read_mask(path).values for path in sorted(folder.rglob("*.png"))}


def resolved_data(text: str) -> str:
    """`KIND:ROOT` with an absolute root: both sides run in another folder than this script."""
    data = parse_data_text(text)
    return f"{data.kind}:{data.root or ''}"


def _emulated_python(work: Path, processor: str) -> Path:
    """A script that runs Python for arm64 with the device's packages, made where it is missing."""
    root = work / "root"
    if not (root / "usr/bin/python3").is_symlink():
        _unpack_debian(work, root)
    program = python_of(root)
    version = program.name.removeprefix("python")
    site = work / f"site-{version}"
    if not (site / "onnxruntime").exists():
        _unpack_wheels(work / f"wheels-{version}", site, version)
    (root / "proc").mkdir(exist_ok=True)
    features, variant, part, revision = PROCESSORS[processor]
    cores = os.cpu_count() or 1
    text = "".join(
        CPUINFO.format(core=core, features=features, variant=variant, part=part, revision=revision)
        for core in range(cores)
    )
    (root / "proc/cpuinfo").write_text(text)
    script = work / f"python-{processor}"
    script.write_text(
        "#!/bin/sh\n"
        f"export PYTHONHOME=/usr PYTHONDONTWRITEBYTECODE=1 PYTHONPATH='{site}:{CHECKOUT}'\n"
        f"exec qemu-aarch64 -cpu {processor} -L '{root}' -0 '{script}' '{program}' \"$@\"\n"
    )
    script.chmod(0o755)
    return script


def python_of(root: Path) -> Path:
    """The Python of a Debian root: what its `python3` leads to, as a file of the root."""
    return root / "usr/bin" / Path(os.readlink(root / "usr/bin/python3")).name


def _unpack_debian(work: Path, root: Path) -> None:
    """Fetch packages for arm64 with apt's own trust, in a state of its own, and unpack them."""
    state = work / "apt"
    (state / "lists/partial").mkdir(parents=True, exist_ok=True)
    (state / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = work / "apt.conf"
    settings.write_text(
        'APT::Architecture "arm64"; APT::Architectures { "arm64"; };\n'
        f'Dir::State "{state}"; Dir::State::status "{state}/status"; Dir::Cache "{state}/cache";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(settings)}
    install = ("apt-get", "-qq", "install", "--download-only", "-y", "--no-install-recommends", *DEBIAN_PACKAGES)
    for command in (("apt-get", "-qq", "update"), install):
        subprocess.run(command, env=environment, check=True)
    for package in sorted((state / "cache/archives").glob("*.deb")):
        subprocess.run(("dpkg", "-x", str(package), str(root)), check=True)


def _unpack_wheels(wheels: Path, site: Path, python_version: str) -> None:
    """The versions that are installed here, for arm64 and the Python of the root."""
    pinned = [f"{name}=={metadata.version(name)}" for name in PACKAGES]
    python = ("--python-version", python_version)
    platforms = [item for name in PLATFORMS for item in ("--platform", name)]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    subprocess.run([*download, *platforms, "--only-binary=:all:", *python, *pinned], check=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _verify(python: list[str], options: argparse.Namespace) -> dict[str, Any]:
    command = [
        *python,
        "-m",
        "edge_ilseg",
        "verify",
        str(options.bundle.resolve()),
        "--against",
        str(options.against.resolve()),
    ]
    command += ["--data", options.data, "--limit", str(options.limit), "--runtime", "onnxruntime"]
    command += ["--precision", options.precision, "--latency-runs", "3", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, cwd=CHECKOUT)
    if not done.stdout:
        sys.exit(f"verify failed with exit status {done.returncode}: {' '.join(command)}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _predict(python: list[str], options: argparse.Namespace, out: Path) -> dict[str, NDArray[Any]]:
    shutil.rmtree(out, ignore_errors=True)
    found = [path for path in sorted(options.images.resolve().iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    images = [str(path) for path in found[: options.limit]]
    command = [
        *python,
        "-m",
        "edge_ilseg",
        "predict",
        str(options.bundle.resolve()),
        *images,
        "--out",
        str(out.resolve()),
    ]
    command += ["--runtime", "onnxruntime", "--precision", options.precision, "--no-overlay"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=CHECKOUT)
    return read_masks(out)


def _print_scores(reports: dict[str, dict[str, Any]]) -> None:
    print(f"{'':<36}{'old':>8}{'parent':>8}{'drop':>8}{'new':>8}   golden outputs")
    for name, report in reports.items():
        scores = report["scores"]
        golden = next(check for check in report["checks"] if check["name"] == "golden outputs")
        old, parent, new = scores["miou_old"], scores["parent_miou_old"], scores["metrics"]["miou_new"]
        print(
            f"{name:<36}{100 * old:>8.2f}{100 * parent:>8.2f}{100 * (parent - old):>8.2f}{100 * new:>8.2f}   "
            f"{golden['verdict']}: {golden['detail']}"
        )
        print(f"{'':<36}{report['device']['processor'] or 'no name'}, {' '.join(report['device']['int8_flags'] or ())}")


def _print_agreement(found: MaskAgreement) -> None:
    print(f"masks of {found.images} images: {100 * found.equal:.4f} % of pixels equal, worst {100 * found.worst:.2f} %")
    for name, share in found.classes.items():
        print(f"  {name:<20}{'on neither side' if share is None else f'{100 * share:>9.3f} %'}")


if __name__ == "__main__":
    main()
