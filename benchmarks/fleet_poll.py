"""Many devices that ask one web server at once: requests and bytes for each, seconds, errors.

    python benchmarks/fleet_poll.py BASE NEXT --devices 200 --at-once 200

BASE and NEXT are bundles. NEXT is published, and every device (a process of its own, set up with BASE) looks at the
same time; then each fetches what it lacks, and looks again. Requests are counted in nginx's log. Devices wait for the
cores of one machine: this shows that the server and the agents stand it, not how fast a fleet is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests"))

from nginx import Nginx, serving  # noqa: E402
from update_world import Device, Publisher  # noqa: E402

from edge_ilseg.devices.update.agent_config import CONFIG_NAME, encode_agent_config  # noqa: E402


def main() -> None:
    """Set up, ask, fetch, ask again; print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("next", type=Path)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        publisher = Publisher(folder)
        with serving(publisher.repository, folder / "nginx") as server:
            roots = _devices(folder, publisher, server, options.base, options.devices)
            publisher.publish(options.next)
            print(f"{options.devices} devices, {options.at_once} at once")
            for command in ("check", "fetch", "check"):
                _ask(server, roots, command, options.at_once)


def _devices(folder: Path, publisher: Publisher, server: Nginx, base: Path, count: int) -> list[Path]:
    """One device set up, and copies of it under other names."""
    first = Device(folder / "device-0", publisher, base, name="device-0", repository=server.url)
    roots = [first.root]
    for number in range(1, count):
        root = folder / f"device-{number}"
        shutil.copytree(first.root, root, symlinks=True)
        config = msgspec.structs.replace(first.agent.config, device_id=root.name)
        (root / CONFIG_NAME).write_text(encode_agent_config(config))
        roots.append(root)
    return roots


def _ask(server: Nginx, roots: list[Path], command: str, at_once: int) -> None:
    before = len(server.requests())
    start = time.perf_counter()

    def run(root: Path) -> tuple[int, float]:
        began = time.perf_counter()
        words = [sys.executable, "-m", "edge_ilseg", "device", command, "--root", str(root)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=CHECKOUT)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
        return done.returncode, time.perf_counter() - began

    with ThreadPoolExecutor(at_once) as pool:
        ended = list(pool.map(run, roots))
    seconds = time.perf_counter() - start
    lines = server.requests()[before:]
    sent = sum(int(line.split()[9]) for line in lines)
    failed = [line for line in lines if line.split()[8] not in ("200", "206", "404")]
    errors = sum(code != 0 for code, _ in ended)
    slowest = max(taken for _, taken in ended)
    print(
        f"  {command:<6} {len(lines) / len(roots):5.1f} requests and {sent / len(roots):9.0f} bytes a device, "
        f"{seconds:6.1f} s in all, {slowest:6.1f} s the slowest, {errors} errors, {len(failed)} refused requests"
    )


if __name__ == "__main__":
    main()
