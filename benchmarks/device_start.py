"""How long the command takes to start on a device, beside Python and numpy alone.

    python benchmarks/device_start.py --rounds 15

In turns, so that what else the machine does, it does to all: `python -c pass`, `python -c "import numpy"`,
`edge-ilseg --version`, `edge-ilseg verify --help`, `edge-ilseg device --help`, `edge-ilseg device facts --json`, and
`edge-ilseg verify` of a bundle that is not there, which loads all that a verdict needs but the runtime. Prints medians
of wall time and of processor time (user and system), and the ratio of the latter to that of Python alone, which says
the same on a busy machine. Asked for: under 0.5 s. Unix only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROUNDS = 15
OURS = "import sys; from edge_ilseg.cli import main; main()"
"""What the installed script `edge-ilseg` does."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "python -c pass": ("-c", "pass"),
    "import numpy": ("-c", "import numpy"),
    "edge-ilseg --version": ("-c", OURS, "--version"),
    "edge-ilseg verify --help": ("-c", OURS, "verify", "--help"),
    "edge-ilseg device --help": ("-c", OURS, "device", "--help"),
    "edge-ilseg device facts": ("-c", OURS, "device", "facts", "--json"),
    "edge-ilseg verify NOTHING": ("-c", OURS, "verify", os.devnull, "--json"),
}
HEADINGS = f"{'':<26}{'wall, s':>9}{'CPU, s':>9}{'CPU, times Python alone':>26}"


class Cost(NamedTuple):
    """Of one process, from its start to its end."""

    wall_s: float
    cpu_s: float


def main() -> None:
    """Measure, and print one row a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    print("\n".join(rows(measure(options.rounds))))


def measure(rounds: int) -> dict[str, list[Cost]]:
    """The cost of each command in each round, after one round that is not counted: it fills the system's cache."""
    costs: dict[str, list[Cost]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, words in COMMANDS.items():
            cost = cost_of([sys.executable, *words])
            if number:
                costs[name].append(cost)
    return costs


def cost_of(command: Sequence[str]) -> Cost:
    """Run a command that succeeds; `verify` of what is no bundle is to end with 3."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    start_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (3 if os.devnull in command else 0):
        raise subprocess.CalledProcessError(process.returncode, command)
    return Cost(wall_s, used.ru_utime + used.ru_stime)


def rows(costs: dict[str, list[Cost]]) -> list[str]:
    """The table, its headings first; the first command is the one that the others are compared with."""
    cpu_s = {name: median(cost.cpu_s for cost in found) for name, found in costs.items()}
    alone_s = next(iter(cpu_s.values()))
    return [
        HEADINGS,
        *(
            f"{name:<26}{median(cost.wall_s for cost in found):>9.3f}{cpu_s[name]:>9.3f}{cpu_s[name] / alone_s:>26.1f}"
            for name, found in costs.items()
        ),
    ]


if __name__ == "__main__":
    main()
