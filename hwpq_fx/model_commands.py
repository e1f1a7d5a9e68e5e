"""The commands that take a model: compress, plan, eval, export."""

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from .config import HWPQConfig
from .conversion import convert
from .conversion import plan as make_plan
from .errors import HWPQError
from .evaluate import evaluate
from .export import FORMATS
from .export import export as export_model
from .folder import whole_folder
from .plan import DEFAULT_GPU, Plan
from .report import report
from .sizes import dry_run
from .texts import sequences, texts_of

REPORT = "hwpq_report.json"


@contextmanager
def told():
    """Errors that are the user's to mend end with their message and exit code 1."""
    try:
        yield
    except (HWPQError, OSError) as error:
        raise click.ClickException(str(error)) from error


def calibration_options(command: Callable) -> Callable:
    for option in (
        click.option("--calib", metavar="FILE|DATASET", help="Text, JSONL with \"text\", or a dataset's name; without "
                     "it the conversion is data-free."),
        click.option("--samples", default=128, show_default=True, help="Sequences of calibration text."),
        click.option("--length", default=2048, show_default=True, help="Tokens of each."),
        click.option("--config", "config_file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
                     help="HWPQConfig's fields as JSON."),
        click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("model")
@calibration_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the new checkpoint.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path, exists=True), help="What `hwpq-fx plan` wrote.")
@click.option("--dry-run", "dry", is_flag=True, help="Say what would happen to each layer, and touch no weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def compress(model, calib, samples, length, config_file, device, out, plan_file, dry, as_json) -> None:
    """Convert MODEL, a folder or a hub id, and write it to --out."""
    with told():
        config = read_config(config_file)
        if dry:
            found = dry_run(model, config)
            click.echo(json.dumps(found.to_dict()) if as_json else str(found))
            return
        if out is None:
            raise click.UsageError("--out says where the converted model goes (or --dry-run)")
        loaded, tokenizer = load(model, device)
        batches = calibration(tokenizer, calib, samples, length, device)
        plan = Plan.load(plan_file) if plan_file else None
        convert(loaded, batches, config, plan=plan, progress=not as_json and sys.stderr.isatty())
        made = report(loaded)
        with whole_folder(out) as partial:
            loaded.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / REPORT).write_text(json.dumps(made.to_dict()))
        click.echo(json.dumps(made.to_dict()) if as_json else f"{made}written to {out}")


@click.command()
@click.argument("model")
@calibration_options
@click.option("--gpu", default=DEFAULT_GPU, show_default=True, help="Whose roofline gives the times.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for `compress --plan`.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Picture of speed against error.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def plan(model, calib, samples, length, config_file, device, gpu, out, plot, as_json) -> None:
    """Weigh error against time for every layer of MODEL, without converting it."""
    with told():
        loaded, tokenizer = load(model, device)
        batches = calibration(tokenizer, calib, samples, length, device)
        config, progress = read_config(config_file), not as_json and sys.stderr.isatty()
        made = make_plan(loaded, batches, config, gpu=gpu, progress=progress)
        if out:
            made.save(out)
        if plot:
            made.plot(plot)
        click.echo(json.dumps(made.to_dict()) if as_json else str(made))


@click.command("eval")
@click.argument("model")
@click.option("--text", required=True, metavar="FILE|DATASET", help="Text to predict, as compress's --calib.")
@click.option("--against", metavar="MODEL", help="The dense model: pairs with it, adds KL.")
@click.option("--samples", default=64, show_default=True, help="Sequences.")
@click.option("--length", default=2048, show_default=True, help="Tokens of each.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def evaluate_command(model, text, against, samples, length, device, as_json) -> None:
    """Perplexity of MODEL on a text; with --against also the difference to the dense model, paired."""
    with told():
        loaded, tokenizer = load(model, device)
        dense = load(against, device)[0] if against else None
        tokens = sequences(tokenizer, texts_of(text), length, samples)
        found = evaluate(loaded, tokens, dense)
    if as_json:
        click.echo(json.dumps(found._asdict()))
        return
    console = Console()
    console.print(f"perplexity {found.perplexity:.3f} on {found.tokens} tokens")
    console.print(f"loss       {found.loss:.4f} ± {found.loss_error:.4f} nats a token")
    if dense is not None:
        console.print(f"dense      {found.dense_perplexity:.3f}")
        console.print(f"difference in loss {found.difference:+.4f} ± {found.difference_error:.4f}, paired")
        console.print(f"KL(dense || converted) {found.kl:.4f} ± {found.kl_error:.4f} nats a token")


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--format", "kind", type=click.Choice(FORMATS), default="dense", show_default=True,
              help="Dense weights in the model's dtype, or dense FP8 as compressed-tensors keeps it.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write.")
def export(directory, kind, out) -> None:
    """Write a converted checkpoint as an ordinary one, zeros in place, for engines that know no 2:4."""
    with told():
        loaded, tokenizer = load(directory, "cpu")
        export_model(loaded, out, kind)
        tokenizer.save_pretrained(out)
    click.echo(f"written to {out}")


def load(model: str, device: str) -> tuple[Any, Any]:
    """A causal language model in eval mode, in its checkpoint's dtype, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        return loaded.to(device).eval(), tokenizer
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{model}: {error}") from error


def calibration(tokenizer: Any, calib: str | None, samples: int, length: int, device: str) -> list[dict] | None:
    if calib is None:
        return None
    tokens = sequences(tokenizer, texts_of(calib), length, samples).to(device)
    return [{"input_ids": part, "use_cache": False} for part in tokens.split(4)]


def read_config(file: Path | None) -> HWPQConfig:
    if file is None:
        return HWPQConfig()
    try:
        return HWPQConfig(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise click.ClickException(f"{file}: {error}") from error


COMMANDS = (compress, plan, evaluate_command, export)
