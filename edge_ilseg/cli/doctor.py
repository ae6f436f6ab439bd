"""`edge-ilseg doctor`. It imports nothing but click and the standard library: it runs where the rest does not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edge_ilseg.doctor_check import Check

COLORS = {"ok": "green", "note": "yellow", "problem": "red"}
LABEL_WIDTH = len("problem  ")
NARROWEST, WIDEST = 60, 140


@click.command()
@click.option("--quiet", is_flag=True, help="Leave out what is in order.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
@click.pass_context
def doctor(ctx: click.Context, quiet: bool, as_json: bool) -> None:
    """Examine this machine and this installation, and say how to mend what is wrong.

    Python, processor, memory, disk and clock; extras, runtimes and GPUs; known traps. Packages are imported in
    processes of their own, so that a broken one breaks nothing. Works on a device, without torch; asks no network.

    \b
    edge-ilseg doctor
    edge-ilseg doctor --quiet
    edge-ilseg doctor --json

    \b
    exit code 0   nothing is in the way
              1   there is a problem
    """
    from edge_ilseg.doctor import REPORT_FORMAT, REPORT_VERSION, diagnose, exit_code
    from edge_ilseg.doctor_facts import read_facts

    checks = diagnose(read_facts())
    code = exit_code(checks)
    if as_json:
        report = {
            "format": REPORT_FORMAT,
            "format_version": REPORT_VERSION,
            "exit_code": code,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        click.echo(json.dumps(report, indent=1))
    else:
        for line in table([check for check in checks if not (quiet and check.status == "ok")]):
            click.echo(line)
        counts = {status: sum(check.status == status for check in checks) for status in COLORS}
        click.echo(f"{counts['problem']} problems, {counts['note']} notes, {counts['ok']} in order")
    ctx.exit(code)


def table(checks: list[Check], width: int | None = None) -> list[str]:
    """Status, name and what was found in columns, the mend below."""
    width = min(max(width or shutil.get_terminal_size((100, 20)).columns, NARROWEST), WIDEST)
    names = max((len(check.name) for check in checks), default=0) + 2
    margin = LABEL_WIDTH + names
    lines = []
    for check in checks:
        found = textwrap.wrap(check.found, width - margin) or [""]
        label = click.style(check.status.ljust(LABEL_WIDTH), fg=COLORS[check.status])
        lines.append(f"{label}{check.name.ljust(names)}{found[0]}")
        lines += [" " * margin + line for line in found[1:]]
        if check.mend is not None:
            mend = textwrap.wrap(check.mend, width - margin - 4, break_on_hyphens=False, break_long_words=False)
            lines += [" " * margin + ("do: " if place == 0 else "    ") + line for place, line in enumerate(mend)]
    return lines
