"""`edge-ilseg card`: a model card of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edge_ilseg.errors import ConfigError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where it goes; printed if left out.")
@click.option("--replace", is_flag=True, help="Replace a file that is there.")
@click.option(
    "--license",
    "license_id",
    default="unknown",
    show_default=True,
    metavar="ID",
    help="Of the model's weights, such as apache-2.0; a bundle does not record it.",
)
def card(bundle: Path, out: Path | None, replace: bool, license_id: str) -> None:
    """Make the model card of BUNDLE: Markdown with the YAML header that model hubs read, from its manifest alone.

    Classes by step, method, scores old / new / all, int8 against fp32, ranges, sizes, intended use and limits.

    \b
    edge-ilseg card boat.bundle
    edge-ilseg card boat.bundle --out README.md --license apache-2.0
    """
    from edge_ilseg.bundle import read_manifest
    from edge_ilseg.files import write_bytes
    from edge_ilseg.report.model_card import model_card

    manifest = read_manifest(bundle)
    text = model_card(manifest, license_id=license_id)
    if out is None:
        click.echo(text, nl=False)
        return
    if out.resolve().is_relative_to(bundle.resolve()):
        hint = "put it beside the bundle: one with a file more than its manifest lists is refused"
        raise ConfigError("a card cannot lie in its bundle", where="--out", found=out, hint=hint)
    check_place(out, replace=replace)
    write_bytes(out, text.encode("utf-8", errors="replace"))
    click.echo(f"written: {out}")


def check_place(out: Path, *, replace: bool) -> None:
    """Raise `ConfigError` unless a file can be written there: no folder, none that is there already."""
    if out.is_dir() or (out.exists() and not replace):
        hint = "name a file" if out.is_dir() else "choose another name, or replace it with --replace"
        raise ConfigError("the file is there already", where="--out", found=out, hint=hint)
    if not out.parent.is_dir():
        raise ConfigError("the folder for the file is missing", where="--out", found=out.parent, hint="make it")
