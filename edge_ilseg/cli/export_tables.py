"""What `edge-ilseg export` shows of a bundle that it has made."""

from __future__ import annotations

import click
from rich.table import Table

from edge_ilseg.bundle import Manifest
from edge_ilseg.cli.tables import percent, print_table
from edge_ilseg.int8_notes import unmeasured
from edge_ilseg.int8_record import Int8Record


def show_export(manifest: Manifest, *, explain: bool) -> None:
    """Print the tables of an export; with `explain` also how int8 came about, and notes in plain words."""
    print_table(parity_table(manifest))
    print_table(models_table(manifest))
    record = manifest.int8
    if record is None:
        return
    if explain or len(record.attempts) > 1:
        print_table(attempts_table(record))
    if explain and record.worst_sqnr:
        print_table(sqnr_table(record))
    if record.delta:
        print_table(delta_table(record))
    for note in int8_notes(manifest, record):
        click.echo(note)


def parity_table(manifest: Manifest) -> Table:
    """The chain torch -> ... -> int8, each stage compared with the first."""
    timed = any(row.latency_ms is not None for row in manifest.parity)
    table = Table(title=f"{manifest.step.name}: from torch to the shipped models")
    columns = ["stage", "max abs", "relative RMSE", "same pixels", "mIoU old", "mIoU new"]
    for column in columns + (["MiB", "ms"] if timed else []):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in manifest.parity:
        cells = [
            row.stage,
            "-" if row.max_abs is None else f"{row.max_abs:.2g}",
            "-" if row.relative_rmse is None else f"{row.relative_rmse:.2g}",
            f"{100 * row.agreement:.3f} %",
            percent(row.miou_old),
            percent(row.miou_new),
        ]
        if timed:
            cells.append("-" if row.model_bytes is None else f"{row.model_bytes / 2**20:.2f}")
            cells.append("-" if row.latency_ms is None else f"{row.latency_ms:.1f}")
        table.add_row(*cells)
    return table


def models_table(manifest: Manifest) -> Table:
    """What is in the bundle: size and expected scores of each model."""
    table = Table(title="models of the bundle", caption=f"scores in per cent, on {manifest.expected_data or 'no data'}")
    for column in ("runtime", "precision", "MiB", "mIoU old", "mIoU new", "mIoU all"):
        table.add_column(column, justify="left" if column in ("runtime", "precision") else "right")
    for entry in manifest.models:
        size_mib = sum(manifest.files[name].bytes for name in entry.files) / 2**20
        scores = entry.expected
        values = (scores.miou_old, scores.miou_new, scores.miou_all) if scores else (None, None, None)
        table.add_row(entry.runtime, entry.precision, f"{size_mib:.2f}", *(percent(value) for value in values))
    return table


def attempts_table(record: Int8Record) -> Table:
    """What int8 costs against fp32, attempt by attempt."""
    limit = "no limit" if record.max_old_drop_points is None else f"at most {record.max_old_drop_points:g} points"
    table = Table(
        title=f"what int8 costs the old classes ({limit})",
        caption="per cent: mIoU on labelled images, else agreement with the parent's int8 masks; "
        "golden images do not count",
    )
    for column in ("attempt", "runtime", "images", "classes", "fp32", "int8", "drop", "worst class", ""):
        table.add_column(column, justify="right" if column in ("classes", "fp32", "int8", "drop") else "left")
    for attempt in record.attempts:
        name = f"{attempt.attempt} ({len(attempt.float_layers)} in float)" if attempt.float_layers else attempt.attempt
        for row in attempt.rows:
            table.add_row(
                name,
                row.runtime,
                f"{row.count} {row.images}",
                str(len(row.class_iou)),
                percent(row.fp32),
                percent(row.int8),
                f"{row.drop_points:.2f}",
                f"{row.worst_class} {row.worst_class_drop_points:.1f}",
                attempt.verdict,
            )
        if not attempt.rows:
            table.add_row(name, "-", "-", "-", "-", "-", "-", "-", attempt.verdict)
    return table


def sqnr_table(record: Int8Record) -> Table:
    """The tensors with the most quantization noise."""
    table = Table(title="most quantization noise", caption="signal to noise of the simulated int8 model")
    table.add_column("tensor")
    table.add_column("dB", justify="right")
    for row in record.worst_sqnr:
        table.add_row(row.tensor, "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}")
    return table


def delta_table(record: Int8Record) -> Table:
    """What a device that has the parent's bundle has not got yet."""
    table = Table(title="new against the parent's int8 model", caption="bytes before compression")
    for column in ("runtime", "bytes", "new", "%", "encoder: bytes", "new", "same output"):
        table.add_column(column, justify="left" if column in ("runtime", "same output") else "right")
    for row in record.delta:
        table.add_row(
            row.runtime,
            f"{row.total_bytes:,}",
            f"{row.changed_bytes:,}",
            f"{100 * row.changed_bytes / row.total_bytes:.2f}",
            f"{row.encoder_bytes:,}",
            f"{row.encoder_changed_bytes:,}",
            {True: "yes", False: "no", None: "-"}[row.encoder_output_identical],
        )
    return table


def int8_notes(manifest: Manifest, record: Int8Record) -> list[str]:
    """How int8 came about, in sentences."""
    notes = []
    if record.taken == "weights-only":
        notes.append("int8: weights alone; the models are small, and compute in float")
    elif record.carried or record.merged:
        notes.append(
            f"int8 ranges: {record.carried} tensors keep the parent's, {record.merged} have the envelope of both, "
            f"{record.measured} are this step's own"
        )
    if record.asked == "new-only" and manifest.step.index:
        notes.append("warning: ranges from the new images alone clip what old classes need, and no new image shows it")
    if record.taken != record.asked:
        reasons = "; ".join(f"{item.attempt}: {item.reason}" for item in record.attempts if item.verdict == "refused")
        notes.append(f"warning: {record.asked} costs the old classes too much ({reasons}), so {record.taken} was taken")
    notes += unmeasured(manifest, record)
    silent = sum(record.silent_channels.values())
    if silent:
        notes.append(
            f"{silent} channels in {len(record.silent_channels)} tensors were alive on the parent's images "
            "and are silent on these: ranges of each channel, or of these images alone, would clip them"
        )
    return notes
