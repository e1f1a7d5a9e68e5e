"""The command line, `hwpq-fx`."""

import json
import logging
import sys

import click
from rich.console import Console

from .bench.command import bench
from .bench.tune import tune
from .inspect_command import inspect
from .kernel_table import kernels
from .model_commands import COMMANDS


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hwpq_fx")
def main() -> None:
    """2:4 sparse FP8 for models that use torch.compile."""
    # transformers imports parts of torchao that make torch talk of enums
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


for command in (bench, inspect, kernels, tune, *COMMANDS):
    main.add_command(command)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.option(
    "--compensation",
    type=click.Choice(["none", "energy", "cg"]),
    default="cg",
    show_default=True,
    help="What is done for what pruning took.",
)
def demo(as_json: bool, compensation: str) -> None:
    """Convert all-MiniLM-L6-v2 on this machine and compare it with the dense model.

    Needs no GPU and no download beyond the demo extra. Exits with 1 where the agreement is under the floor, with 2
    where the demo extra is missing.
    """
    from .config import HWPQConfig
    from .demo import run_demo, show

    try:
        result = run_demo(HWPQConfig(compensation=compensation), progress=not as_json)
    except ModuleNotFoundError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(result.to_dict()))
    else:
        show(result, Console())
    sys.exit(0 if result.passed else 1)
