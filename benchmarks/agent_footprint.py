"""What the update agent costs a device: its environment, its imports, its memory.

    python benchmarks/agent_footprint.py [--content-mib 20]

Installs `edge-ilseg[update]` into a new environment without a runtime (numpy and Pillow are part of the base install),
sets a device up there, and measures in processes of their own: the import of the agent, a poll with nothing new, and
fetching and staging a content of random bytes. Peak memory is the kernel's VmHWM of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests"))
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", "demo-workspace")
MEASURE = """
import sys, time
begun = time.perf_counter()
from edge_ilseg.cli import run
code = run(sys.argv[1:]) if len(sys.argv) > 1 else 0
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("MEASURED", code, int(peak) / 1024, time.perf_counter() - begun, "numpy" in sys.modules, file=sys.stderr)
"""
PACKAGES_FOLDER = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def main() -> None:
    """Install, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--content-mib", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = _install(folder)
        _print_sizes(folder / "env" / PACKAGES_FOLDER)
        seconds = min(_seconds(python, "import edge_ilseg.devices.update.agent_run") for _ in range(5))
        bare = min(_seconds(python, "pass") for _ in range(5))
        print(f"import of the agent: {seconds - bare:.3f} s ({bare:.3f} s for Python alone)")
        root = _device(folder)
        for _ in range(2):
            _measure(python, "poll with nothing new", "check", root)
        _publish(folder, options.content_mib)
        for what, command in (("poll with a release", "check"), ("fetch", "fetch"), ("stage", "stage")):
            _measure(python, what, command, root)


def _install(folder: Path) -> Path:
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    shutil.copytree(CHECKOUT, folder / "source", symlinks=True, ignore=LEFT_OUT)
    command = [python, "-m", "pip", "install", "--quiet", "-c", CHECKOUT / "constraints.txt"]
    subprocess.run([*command, f"{folder / 'source'}[update]"], check=True)
    return python


def _print_sizes(packages: Path) -> None:
    sizes = {}
    for path in packages.iterdir():
        if not path.name.endswith((".dist-info", ".pth", "pip", "setuptools", "pkg_resources", "__pycache__")):
            files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
            sizes[path.name] = sum(item.stat().st_size for item in files) / (1 << 20)
    print(f"environment without pip and a runtime: {sum(sizes.values()):.1f} MiB")
    for name, mib in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
        print(f"  {name:<24}{mib:>7.1f} MiB")


def _seconds(python: Path, program: str) -> float:
    start = time.perf_counter()
    subprocess.run([python, "-c", program], check=True)
    return time.perf_counter() - start


def _bundle(folder: Path, content_mib: int, seed: int) -> Path:
    """A bundle of the tests, with a file of random bytes beside the model."""
    import random

    from bundles import BASE, write_bundle

    from edge_ilseg.bundle import read_manifest, write_manifest

    bundle = folder / f"bundle-{seed}"
    write_bundle(bundle, BASE, step_id=str(seed) * 64)
    if content_mib:
        (bundle / "weights.bin").write_bytes(random.Random(seed).randbytes(content_mib << 20))
        write_manifest(bundle, read_manifest(bundle))
    return bundle


def _device(folder: Path) -> Path:
    from update_world import Device, Publisher

    publisher = Publisher(folder)
    return Device(folder / "device", publisher, _bundle(folder, 0, 1), images=str(folder)).root


def _publish(folder: Path, content_mib: int) -> None:
    from datetime import UTC, datetime

    from edge_ilseg.publishing.keys import KeyRing
    from edge_ilseg.publishing.releases import ReleaseRequest, publish_release

    ring = KeyRing([folder / "keys"], environment={}, unencrypted=True)
    publish_release(folder / "repo", _bundle(folder, content_mib, 2), ring, ReleaseRequest(), datetime.now(UTC))


def _measure(python: Path, what: str, command: str, root: Path) -> None:
    words = [python, "-c", MEASURE, "device", command, "--root", str(root), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    line = next((line for line in done.stderr.splitlines() if line.startswith("MEASURED")), None)
    if line is None:
        sys.exit(f"{what} failed: {done.stderr}")
    _, code, peak, seconds, has_numpy = line.split()
    said = json.loads(done.stdout)["message"] if done.stdout else done.stderr
    print(f"{what:<24} peak {float(peak):5.1f} MiB, {float(seconds):5.2f} s, exit {code}, numpy {has_numpy}: {said}")


if __name__ == "__main__":
    main()
