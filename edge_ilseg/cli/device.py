"""`edge-ilseg device`: this device."""

from __future__ import annotations

import click

from edge_ilseg.cli import device_update
from edge_ilseg.cli.json_option import json_option, print_json


@click.group()
def device() -> None:
    """This device: what it is, and the updates of its model.

    \b
    edge-ilseg device facts
    edge-ilseg device init base.bundle --repository https://models.example/fleet --trust 1.root.json
    edge-ilseg device run            one whole pass: look, fetch, stage, prove, switch, watch, report
    edge-ilseg device status
    """


for command in device_update.COMMANDS:
    device.add_command(command)


@device.command()
@click.option("--profile", metavar="NAME|FILE", help="Check that this device profile fits this machine.")
@json_option
def facts(profile: str | None, as_json: bool) -> None:
    """What this machine is, as far as it matters for a model, and which device profile fits it.

    \b
    edge-ilseg device facts
    edge-ilseg device facts --profile x86-vnni
    """
    from rich.table import Table
    from rich.text import Text

    from edge_ilseg.cli.tables import print_table
    from edge_ilseg.devices.device_profile import check_profile_fits, propose_profile, read_profile
    from edge_ilseg.devices.facts import read_device_facts

    found = read_device_facts()
    if profile is not None:
        check_profile_fits(profile, read_profile(profile), found)
    proposed = profile or propose_profile(found)
    if as_json:
        print_json({"facts": found, "profile": proposed})
        return
    table = Table(title="this device", show_header=False)
    load = found.load_average
    for name, value in (
        ("machine", found.machine),
        ("processor", found.processor),
        ("int8 flags", " ".join(found.int8_flags) if found.int8_flags else None),
        ("cores", found.cores),
        ("governor", found.governor),
        ("memory", f"{found.memory_mib} MiB" if found.memory_mib else None),
        ("load", " ".join(f"{value:.2f}" for value in load) if load else None),
        ("system", found.system),
        ("python", found.python),
        *((package, version or "not installed") for package, version in found.versions.items()),
        ("profile", proposed or "none of ours fits: write one, see docs/profiles.md"),
    ):
        table.add_row(name, Text("-" if value is None else str(value)))
    print_table(table)
