"""`hwpq-fx inspect`: what is in a converted checkpoint, and whether it is whole."""

import json
import sys
from pathlib import Path

import click

from .errors import CheckpointError


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Write one page with plots, self-contained."
)
@click.option("--layer", default="", help="Whose values the page shows; by default the one with the largest error.")
def inspect(directory: Path, as_json: bool, html: Path | None, layer: str) -> None:
    """Layers, patterns, sizes and errors of the checkpoint in DIRECTORY, whose packed weights are all read and checked.

    Builds no model. Exits with 1 where it is no checkpoint or something in it is wrong.
    """
    from .inspect_checkpoint import Checkpoint, inspect_checkpoint

    try:
        found = inspect_checkpoint(directory)
        if html is not None:
            from .inspect_page import page

            html.write_text(page(found, Checkpoint(directory), layer), encoding="utf-8")
    except (CheckpointError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except KeyError as error:
        raise click.UsageError(f"--layer: the checkpoint has no valid 2:4 layer {error}") from error
    except ImportError as error:
        raise click.ClickException(f"--html draws with matplotlib: pip install 'hwpq_fx[plot]' ({error})") from error
    click.echo(json.dumps(found.to_dict()) if as_json else str(found), nl=as_json)
    if html is not None and not as_json:
        click.echo(f"written to {html}")
    sys.exit(0 if found.valid else 1)
