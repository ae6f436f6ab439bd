"""What `--plan` prints: a forecast as a table for people, or as JSON."""

from __future__ import annotations

from statistics import median

import click
import msgspec
from rich.table import Table

from edge_ilseg.cli.tables import print_table
from edge_ilseg.forecast import MEASURED, Forecast

MIB = 1 << 20


def print_forecast(forecast: Forecast, *, as_json: bool) -> None:
    """Print a forecast to standard output."""
    if as_json:
        plain = {**msgspec.to_builtins(forecast), "total_s": forecast.total_s}
        click.echo(msgspec.json.format(msgspec.json.encode(plain), indent=1).decode())
    else:
        print_table(forecast_table(forecast))


def forecast_table(forecast: Forecast) -> Table:
    """One row a quantity, with what it is made of."""
    caption = f"nothing was written; times from {MEASURED} iterations of the real loop, update size by what is frozen"
    table = Table(title=f"plan of {forecast.name}", caption=caption, show_header=False)
    for row in forecast_rows(forecast):
        table.add_row(*row)
    return table


def forecast_rows(forecast: Forecast) -> tuple[tuple[str, str, str], ...]:
    """Name, value and explanation of each quantity."""
    probe, update = forecast.probe, forecast.update
    iteration_ms = 1000 * median(probe.iteration_s)
    processes = f" in each of {forecast.devices} processes" if forecast.devices > 1 else ""
    memory = "not known" if forecast.memory_bytes is None else f"{forecast.memory_bytes / MIB:.0f} MiB"
    changed = ", ".join(f"{size / 1000:.1f} kB ({runtime})" for runtime, size in update.changed_bytes.items())
    return (
        ("images", f"{forecast.images}", f"{forecast.epochs:.1f} epochs"),
        ("iterations", f"{forecast.iterations}", f"of {forecast.batch_size} images"),
        ("trainable parameters", f"{forecast.trainable_parameters:,}", f"{forecast.frozen_parameters:,} frozen"),
        ("time", duration(forecast.total_s), f"on {probe.device}"),
        ("  preparing", duration(forecast.preparing_s), "reading and hashing the images"),
        (
            "  training",
            duration(forecast.training_s),
            f"{iteration_ms:.0f} ms an iteration{processes}, {1000 * probe.new_image_s:.1f} ms to decode an image",
        ),
        (
            "  scoring",
            duration(forecast.scoring_s),
            f"{forecast.scored_images} images, {1000 * probe.scored_image_s:.0f} ms each and network",
        ),
        ("memory", memory, f"peak of the probe on {probe.device}" + _decoded(forecast)),
        ("step on the disk", f"{forecast.step_bytes / MIB:.2f} MiB", _cached(forecast)),
        ("update", changed, f"new bytes of {update.parameter_bytes / 1000:.1f} kB int8 parameters; an estimate"),
    )


def _decoded(forecast: Forecast) -> str:
    kept = (forecast.memory_bytes or 0) - (forecast.probe.peak_bytes or 0)
    return f", and {kept / MIB:.0f} MiB of decoded images" if kept else ""


def _cached(forecast: Forecast) -> str:
    cached_s = forecast.probe.cached_iteration_s
    if cached_s is None:
        return ""
    return (
        f"{forecast.cache_bytes / MIB:.1f} MiB of features until it is trained: {1000 * cached_s:.0f} ms an iteration"
    )


def duration(seconds: float) -> str:
    """`"4.2 s"`, `"12 min 5 s"`, `"3 h 20 min"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
