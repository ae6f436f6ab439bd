"""`--json`, for every command that has something to say. Apart from the other options: it loads next to nothing."""

from __future__ import annotations

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")


def print_json(value: object) -> None:
    """Anything of msgspec's, indented, to standard output."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=1).decode())
