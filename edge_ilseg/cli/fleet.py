"""`edge-ilseg fleet`: all devices, by the reports that they sent."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_ilseg.cli.json_option import json_option, print_json
from edge_ilseg.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from edge_ilseg.fleet import FleetStatus


SHOWN_CLASSES = 5


def parse_share(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """`"5%"` or `"5"` to per cent."""
    if text is None:
        return None
    try:
        share_pct = float(text.strip().removesuffix("%"))
    except ValueError:
        share_pct = float("nan")
    if not 0 <= share_pct < 100:
        raise click.BadParameter(f"{text!r}: a share is expected, such as 5%", ctx, param)
    return share_pct


@click.group()
def fleet() -> None:
    """Look at all devices by the reports that they sent (`reports` in agent.toml): a folder, and no server.

    \b
    edge-ilseg fleet status reports
    edge-ilseg fleet status reports --halt-above 5% --repo models
    edge-ilseg fleet report reports --out fleet.html
    """


@fleet.command()
@click.argument("reports", metavar="REPORTS_DIR", type=click.Path(path_type=Path))
@click.option(
    "--halt-above", "above_pct", callback=parse_share, metavar="5%", help="Halt releases that fail on more devices."
)
@click.option("--min-devices", type=click.IntRange(min=1), default=3, show_default=True, help="That have tried it.")
@click.option("--repo", "repository", type=click.Path(path_type=Path), metavar="REPO", help="Where they are halted.")
@click.option(
    "--keys",
    "key_folders",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where private keys are.  [REPO.keys]",
)
@json_option
def status(
    reports: Path,
    above_pct: float | None,
    min_devices: int,
    repository: Path | None,
    key_folders: tuple[Path, ...],
    as_json: bool,
) -> None:
    """How each device stands, and how each release fares, by the reports in REPORTS_DIR.

    A report is believed as it is: let nobody but your devices write there. With --halt-above a release is halted when
    more than that share of the devices that tried it have refused it or gone back. The passphrase of the keys is in
    EDGE_ILSEG_KEY_PASSPHRASE, so that a timer can run this.

    \b
    edge-ilseg fleet status reports
    edge-ilseg fleet status reports --halt-above 5% --repo models
    edge-ilseg fleet status reports --json
    """
    from msgspec.structs import replace

    from edge_ilseg.cli.tables import print_table
    from edge_ilseg.fleet import read_fleet

    if (above_pct is None) != (repository is None):
        raise ConfigError("--halt-above and --repo belong together", hint="give both, or none")
    found = read_fleet(reports)
    if above_pct is not None and repository is not None:
        halted = _halt(found, repository, key_folders, above_pct, min_devices)
        found = replace(found, halted=tuple(sorted(halted)))
        for number, reason in halted.items():
            click.echo(f"halted: release {number}: {reason}", err=True)
    if as_json:
        print_json(found)
        return
    print_table(_devices(found))
    print_table(_releases(found))
    for item in found.damaged:
        click.echo(f"no report: {item.file}: {item.reason}", err=True)
    if found.damaged_count > len(found.damaged):
        click.echo(f"no report: {found.damaged_count - len(found.damaged)} more", err=True)


@fleet.command()
@click.argument("reports", metavar="REPORTS_DIR", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE.html", help="Where the page goes.")
def report(reports: Path, out: Path) -> None:
    """Write one HTML file about the fleet: models in use, roll-outs, refusals, latency and memory, who is silent.

    The file holds everything that it shows, and takes the place of an earlier page of this program. Needs the extra
    `report`.

    \b
    edge-ilseg fleet report reports --out fleet.html
    """
    from edge_ilseg.errors import check_extra
    from edge_ilseg.files import write_bytes
    from edge_ilseg.fleet import read_reports

    check_extra("report", ["jinja2", "matplotlib"], "a report for people")
    from edge_ilseg.report.fleet_page import fleet_page
    from edge_ilseg.report.writing import check_place

    check_place(out)
    page = fleet_page(read_reports(reports), reports.resolve().name).encode()
    write_bytes(out, page)
    click.echo(f"report: {out} ({len(page) / (1 << 20):.2f} MiB)")


def _halt(
    found: FleetStatus, repository: Path, key_folders: tuple[Path, ...], above_pct: float, min_devices: int
) -> dict[int, str]:
    """Halt what fails too often; what is halted already stays as it is."""
    from edge_ilseg.fleet import to_halt
    from edge_ilseg.publishing.keys import KeyRing, check_publisher
    from edge_ilseg.publishing.releases import halt, read_status

    check_publisher()
    ring = KeyRing(key_folders or (repository.with_name(repository.name + ".keys"),))
    now = datetime.now(UTC)
    entries = read_status(repository, ring, now).entries
    reasons = to_halt(found.releases, entries, above_pct, min_devices)
    for number, reason in reasons.items():
        halt(repository, ring, number, reason, now)
    return reasons


def _devices(found: FleetStatus) -> Table:
    from rich.table import Table
    from rich.text import Text

    total = f"{len(found.devices)} devices, {found.reports} reports"
    table = Table(title=f"{total}, {found.damaged_count} files that are none" if found.damaged_count else total)
    for column in ("device", "group", "step", "release", "last event", "verdict", "old mIoU drop", "forgotten", "seen"):
        table.add_column(column)
    for item in found.devices:
        active = item.active
        row = (
            item.device_id,
            item.group,
            active.step_name if active else None,
            str(active.release) if active and active.release is not None else None,
            item.event if item.release is None else f"{item.event} ({item.release})",
            item.verdict,
            _drop(item.retention.old_miou_drop_pct, item.retention.old_miou_drop_interval_pct)
            if item.retention
            else None,
            ", ".join(entry.name for entry in item.forgotten),
            item.last_seen,
        )
        table.add_row(*(Text(cell or "-") for cell in row))
    return table


def _drop(drop_pct: float | None, interval_pct: tuple[float, float] | None) -> str | None:
    if drop_pct is None:
        return None
    return f"{drop_pct:.1f}" + (f" ({interval_pct[0]:.1f} to {interval_pct[1]:.1f})" if interval_pct else "")


def _releases(found: FleetStatus) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="releases", caption="devices, each counted once; failed: rolled back or refused, of those tried"
    )
    for column in ("release", "step", "bundle"):
        table.add_column(column)
    for column in ("chosen", "on trial", "confirmed", "rolled back", "refused", "failed"):
        table.add_column(column, justify="right")
    table.add_column("forgotten")
    for item in found.releases:
        share = "-" if item.failed_pct is None else f"{item.failed_pct:.1f} %"
        halted = " (halted)" if item.release in found.halted else ""
        cells = (
            f"{item.release}{halted}",
            item.step_name or "-",
            (item.bundle_id or "-")[:12],
            *map(str, (item.chosen, item.trying, item.confirmed, item.rolled_back, item.refused)),
            share,
            ", ".join(f"{name} ({count})" for name, count in list(item.forgotten.items())[:SHOWN_CLASSES]) or "-",
        )
        table.add_row(*map(Text, cells))
    return table
