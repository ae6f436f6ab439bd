"""Does a step cost more the more steps were taken? Time, memory and size of each of several one-class steps.

Every step is a process of its own, started as a user would start it, so that its peak memory is its own. Each has as
many iterations as the others. Prints one row a step, with the sums that it leaves for `analytic`, and the ratio of the
last step to the first.

    python benchmarks/step_cost.py --method freeze+kd-output --backbone efficientnet_lite0
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CLASSES = ("disk", "square", "ring", "cross", "bar", "crescent", "star", "triangle")
BASE_CLASSES = 2


def peak_rss_mib(arguments: list[str]) -> float:
    """Run one command of edge-ilseg and return the peak resident memory of its process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_ilseg", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(process.stderr.read().decode() if process.stderr else "failed")
    return usage.ru_maxrss / 1024


def main() -> None:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="freeze+kd-output")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--size", default="160x112")
    parser.add_argument("--iterations", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        data = ["--dataset", "shapes", "--setup", "overlapped", "--option", "train=200", "--option", "val=20"]
        base = ",".join(CLASSES[:BASE_CLASSES])
        model = ["--backbone", options.backbone, "--size", options.size]
        peak_rss_mib(["init", str(work), *data, *model, "--base-classes", base])
        peak_rss_mib(["train", str(work), "--iterations", "10", "--accelerator", "cpu"])
        print(f"{options.method}, {options.backbone}, {options.size}, {options.iterations} iterations of 8 a step")
        print(f"{'step':<14}{'seconds':>9}{'peak RSS, MiB':>15}{'weights, KiB':>14}{'sums, KiB':>11}")
        rows = []
        for number, name in enumerate(CLASSES[BASE_CLASSES:], start=1):
            settings = ["--method", options.method, "--iterations", str(options.iterations), "--accelerator", "cpu"]
            rss_mib = peak_rss_mib(["step", str(work), "--add-classes", name, *settings])
            step = work / "steps" / f"{number:02}-{name}"
            record = json.loads((step / "step.json").read_text())
            sums = step / "statistics.safetensors"
            sums_kib = sums.stat().st_size / 1024 if sums.exists() else 0.0
            row = (record["training_seconds"], rss_mib, record["weights_bytes"] / 1024, sums_kib)
            print(f"{number:02}-{name:<11}{row[0]:>9.2f}{row[1]:>15.0f}{row[2]:>14.1f}{row[3]:>11.1f}", flush=True)
            rows.append(row)
        ratios = [last / first if first else 1.0 for first, last in zip(rows[0], rows[-1], strict=True)]
        print(f"{'last / first':<14}{ratios[0]:>9.3f}{ratios[1]:>15.3f}{ratios[2]:>14.4f}{ratios[3]:>11.3f}")


if __name__ == "__main__":
    main()
