"""What `scenario` and `reproduce` print and write of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edge_ilseg.reproduce import Published
    from edge_ilseg.scenario_results import ScenarioResults


def show_results(
    results: ScenarioResults, out: Path | None, as_json: bool, published: Mapping[str, Published] | None = None
) -> None:
    """Write results into a folder, if one is given, and print them; `published` rows are in what is printed as JSON."""
    import msgspec

    from edge_ilseg.files import write_bytes
    from edge_ilseg.scenario_results import (
        STEP_TABLES,
        SUMMARY_HEADER,
        class_rows,
        describe,
        markdown,
        remarks,
        step_rows,
        summary_rows,
    )

    encoded = msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / "results.json", encoded)
        write_bytes(out / "results.md", markdown(results).encode())
    if as_json:
        if published is not None:
            both = {**msgspec.to_builtins(results), "published": msgspec.to_builtins(published)}
            encoded = msgspec.json.format(msgspec.json.encode(both), indent=1) + b"\n"
        click.echo(encoded.decode(), nl=False)
        return
    click.echo(describe(results))
    tables = (
        ("after the last step", SUMMARY_HEADER, summary_rows(results)),
        *((title, *step_rows(results, score)) for title, score in STEP_TABLES.items()),
        ("IoU of each class after the last step", *class_rows(results, "iou", with_std=False)),
        ("forgetting of each class, points", *class_rows(results, "forgetting", with_std=False)),
    )
    for title, header, rows in tables:
        print_rows(title, header, rows)
    for sentence in remarks(results):
        click.echo(sentence)
    if out is not None:
        click.echo(f"written: {out / 'results.json'}, {out / 'results.md'}")


def print_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    from edge_ilseg.cli.tables import print_table

    table = Table(title=title)
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    print_table(table)
