"""`edge-ilseg demo`."""

from __future__ import annotations

from pathlib import Path

import click

from edge_ilseg.cli.json_option import json_option


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-workspace"))
@click.option("--replace", is_flag=True, help="Delete the workspace of an earlier demo first.")
@click.option("--base-iterations", type=click.IntRange(min=1), help="Of step 0.")
@click.option("--step-iterations", type=click.IntRange(min=1), help="Of each increment.")
@json_option
def demo(folder: Path, replace: bool, base_iterations: int | None, step_iterations: int | None, as_json: bool) -> None:
    """The whole way on generated images: base model, increments, bundles, verdicts. Minutes on a CPU.

    One model learns the class "star" by fine-tuning, one by distillation; both are exported to int8 and verified.

    \b
    edge-ilseg demo
    edge-ilseg demo elsewhere --replace --base-iterations 200
    """
    import msgspec
    from rich.table import Table

    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.cli.tables import as_before, percent, print_table
    from edge_ilseg.demo import METHODS, NEW_CLASS, STEP, TRAIN, run_demo

    with progress_bar("demo") as progress:
        result = run_demo(
            folder,
            base_iterations=base_iterations or TRAIN.iterations,
            step_iterations=step_iterations or STEP.iterations,
            replace=replace,
            progress=progress,
        )
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(result), indent=1).decode())
        return
    table = Table(
        title=f'teaching the class "{NEW_CLASS}" without the old images',
        caption="mIoU in per cent on the test split, background included; verify: against the bundle of before",
    )
    for column in ("model", "runs in", "old", "new", "all", "verify"):
        table.add_column(column, justify="right" if column in ("old", "new", "all") else "left")
    for row in result.rows:
        before = row.model == "before"
        scores = as_before(row.metrics) if before else row.metrics
        label = row.model if before else f"{row.model} ({METHODS[row.model].method})"
        values = (scores.miou_old, scores.miou_new, scores.miou_all)
        table.add_row(label, row.precision, *(percent(value) for value in values), row.verdict or "")
    print_table(table)
    click.echo(f"bundle: {result.bundle}")
