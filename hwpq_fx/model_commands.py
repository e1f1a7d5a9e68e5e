"""The commands that take a model: compress, plan, eval, export."""

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from safetensors import SafetensorError

from hwpq_fx.kernels.gpus import GPUS

from .compress import check_packing_format
from .config import HWPQConfig
from .conversion import convert
from .conversion import plan as make_plan
from .errors import HWPQError, first_line
from .evaluate import evaluate
from .export import FORMATS
from .export import export as export_model
from .folder import whole_folder
from .offload import check_for_blocks, compress_checkpoint
from .plan import DEFAULT_GPU, Plan, picture_formats
from .report import REPORT_FILE as REPORT
from .report import report
from .sizes import dry_run
from .texts import sequences, texts_of


@contextmanager
def told():
    """Errors that are the user's to mend end with their message and exit code 1."""
    try:
        yield
    except (HWPQError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except SafetensorError as error:
        raise click.ClickException(f"a safetensors file could not be read or written: {error}") from error


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{value!r}: {error}") from error
    return value


DEVICE = click.option(
    "--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, callback=_device
)


def _config(context: click.Context, parameter: click.Parameter, value: str) -> HWPQConfig:
    what = "--config"
    try:
        if not value.lstrip().startswith("{"):
            what, value = value, Path(value).read_text(encoding="utf-8-sig")
        fields = json.loads(value)
        if not isinstance(fields, dict):
            raise TypeError("it holds no JSON object")
        return HWPQConfig(**fields)
    except OSError as error:
        raise click.BadParameter(f"{value!r} is neither a JSON object nor a file: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise click.ClickException(f"{what}: {error}") from error


def calibration_options(command: Callable) -> Callable:
    for option in (
        click.option("--calib", metavar="FILE|DATASET", help="Text, JSONL with \"text\", or a dataset's name; without "
                     "it the conversion is data-free."),
        click.option("--samples", default=128, show_default=True, type=click.IntRange(1),
                     help="Sequences of calibration text."),
        click.option("--length", default=2048, show_default=True, type=click.IntRange(1),
                     help="Tokens of each, at most what the model has positions for."),
        click.option("--config", metavar="JSON|FILE", default="{}", callback=_config,
                     help="HWPQConfig's fields as JSON, or a file of that."),
        DEVICE,
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("model")
@calibration_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the new checkpoint.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path, exists=True), help="What `hwpq-fx plan` wrote.")
@click.option("--offload", is_flag=True, help="One decoder block at a time: for models larger than memory. MODEL is a "
              "local folder of safetensors.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with an --offload run that was interrupted.")
@click.option("--dry-run", "dry", is_flag=True, help="Say what would happen to each layer, and touch no weights.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def compress(model, calib, samples, length, config, device, out, plan_file, offload, resume, dry, as_json) -> None:
    """Convert MODEL, a folder or a hub id, and write it to --out."""
    with told():
        if dry:
            if plan_file:
                raise click.UsageError("--dry-run does not read plans: leave one of --plan and --dry-run out")
            check_packing_format(config, torch.device(device))
            found = dry_run(model, check_for_blocks(config) if offload else config)
            click.echo(json.dumps(found.to_dict()) if as_json else str(found))
            return
        if out is None:
            raise click.UsageError("--out says where the converted model goes (or --dry-run)")
        _elsewhere(out, model)
        progress = not as_json and sys.stderr.isatty()
        if resume and not offload:
            raise click.UsageError("--resume goes with --offload")
        if offload:
            if plan_file:
                raise click.UsageError("--plan weighs all layers at once, --offload sees one block: choose one")
            tokens = None if calib is None else _tokens(model, calib, samples, length)
            made = compress_checkpoint(model, out, tokens, config, device=device, resume=resume, progress=progress)
            click.echo(json.dumps(made.to_dict()) if as_json else f"{made}written to {out}")
            return
        plan = Plan.load(plan_file) if plan_file else None
        with whole_folder(out) as partial:  # first: it finds out whether there is a place to write to
            loaded, tokenizer = load(model, device)
            batches = calibration(loaded, tokenizer, calib, samples, length)
            convert(loaded, batches, config, plan=plan, progress=progress)
            made = report(loaded)
            loaded.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / REPORT).write_text(json.dumps(made.to_dict()))
        click.echo(json.dumps(made.to_dict()) if as_json else f"{made}written to {out}")


@click.command()
@click.argument("model")
@calibration_options
@click.option("--gpu", type=click.Choice(list(GPUS)), default=DEFAULT_GPU, show_default=True,
              help="Whose roofline gives the times.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file for `compress --plan`.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Picture of speed against error.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def plan(model, calib, samples, length, config, device, gpu, out, plot, as_json) -> None:
    """Weigh error against time for every layer of MODEL, without converting it."""
    with told():
        if plot and find_spec("matplotlib") is None:
            raise click.UsageError("--plot needs matplotlib: pip install 'hwpq_fx[plot]'")
        if plot and plot.suffix.lower().lstrip(".") not in picture_formats():
            raise click.UsageError(f"--plot {plot}: matplotlib draws no such picture; .png and .svg, for example")
        for file in (out, plot):
            if file and not file.absolute().parent.is_dir():
                raise click.UsageError(f"{file}: there is no folder {file.absolute().parent}")
        progress = not as_json and sys.stderr.isatty()
        loaded, tokenizer = load(model, device)
        batches = calibration(loaded, tokenizer, calib, samples, length)
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
@click.option("--samples", default=64, show_default=True, type=click.IntRange(1), help="Sequences.")
@click.option(
    "--length",
    default=2048,
    show_default=True,
    type=click.IntRange(2),
    help="Tokens of each, at most what the model has positions for.",
)
@DEVICE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def evaluate_command(model, text, against, samples, length, device, as_json) -> None:
    """Perplexity of MODEL on a text; with --against also the difference to the dense model, paired."""
    with told():
        loaded, tokenizer = load(model, device)
        dense = load(against, device)[0] if against else None
        if dense is not None and dense.config.vocab_size != loaded.config.vocab_size:
            raise click.UsageError(f"{against} has another vocabulary than {model}")
        tokens = sequences(tokenizer, texts_of(text), _length(loaded, length), samples)
        found = evaluate(loaded, tokens, dense)
    if as_json:
        # JSON has neither NaN nor infinity
        numbers = {
            name: value if value is not None and isfinite(value) else None for name, value in found._asdict().items()
        }
        click.echo(json.dumps(numbers))
        return
    console = Console()
    console.print(f"perplexity {found.perplexity:.3f} on {found.tokens} tokens")
    console.print(f"loss       {found.loss:.4f} ± {_text(found.loss_error)} nats a token")
    if dense is not None:
        console.print(f"dense      {found.dense_perplexity:.3f}")
        console.print(f"difference in loss {found.difference:+.4f} ± {_text(found.difference_error)}, paired")
        console.print(f"KL(dense || converted) {found.kl:.4f} ± {_text(found.kl_error)} nats a token")


def _text(error: float | None) -> str:
    return "?" if error is None else f"{error:.4f}"


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--format", "kind", type=click.Choice(FORMATS), default="dense", show_default=True,
              help="Dense weights in the model's dtype, or dense FP8 as compressed-tensors keeps it.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write.")
def export(directory, kind, out) -> None:
    """Write a converted checkpoint as an ordinary one, zeros in place, for engines that know no 2:4."""
    with told():
        _elsewhere(out, directory)
        loaded, tokenizer = load(directory, "cpu")
        export_model(loaded, out, kind)
        tokenizer.save_pretrained(out)
    click.echo(f"written to {out}")


def load(model: str, device: str) -> tuple[Any, Any]:
    """A causal language model in eval mode, in its checkpoint's dtype, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        made: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers raises whatever its parts do
        raise click.ClickException(f"{model}: {first_line(error)}") from error
    loaded, information = made
    if missing := sorted(information["missing_keys"]):
        kind, others = " or ".join(loaded.config.architectures or ["model"]), len(missing) - 1
        raise click.ClickException(
            f"{model}: {missing[0]} is not in the checkpoint{f', nor are {others} others' if others else ''}: the "
            f"checkpoint lacks something, or its {kind} is no causal language model and wants hwpq_fx.convert"
        )
    return loaded.to(device).eval(), tokenizer


def calibration(model: Any, tokenizer: Any, calib: str | None, samples: int, length: int) -> list[dict] | None:
    if calib is None:
        return None
    tokens = sequences(tokenizer, texts_of(calib), _length(model, length), samples).to(model.device)
    return [{"input_ids": part, "use_cache": False} for part in tokens.split(4)]


def _tokens(folder: str, calib: str, samples: int, length: int) -> list[dict]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer, described = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{folder}: {error}") from error
    positions = getattr(described.get_text_config(), "max_position_embeddings", None) or length
    return [
        {"input_ids": part} for part in sequences(tokenizer, texts_of(calib), min(length, positions), samples).split(4)
    ]


def _length(model: Any, length: int) -> int:
    return min(length, getattr(model.config.get_text_config(), "max_position_embeddings", None) or length)


def _elsewhere(out: Path, source: str) -> None:
    if Path(source).exists() and Path(source).resolve() == out.resolve():
        raise click.UsageError(f"--out {out} is the model itself: name another folder")


COMMANDS = (compress, plan, evaluate_command, export)
