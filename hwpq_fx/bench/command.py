"""`hwpq-fx bench`: everything side by side on this GPU, into JSON and README."""

from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hwpq_fx.kernels.paths import PATHS
from hwpq_fx.kernels.roofline import MODELS

from .machine import describe_machine, no_gpu, slug
from .measure import CudaClock, GpuLost
from .report import ceilings_in_words, targets, write_readme
from .run import FULL, GROUPS, KEYS, PLAN, QUICK, QUICK_PLAN, Bench, results_in
from .shapes import FORMS


@click.command()
@click.option("--quick", is_flag=True, help="LLaMA-3-8B's linears at six numbers of rows, and pruning.")
@click.option("--only", type=click.Choice(GROUPS), multiple=True, help="Only this group; may be given several times.")
@click.option("--model", type=click.Choice(list(MODELS)), multiple=True, help="Only this model; may be given again.")
@click.option("--again", is_flag=True, help="Measure anew what the file in --out has from the same code.")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="Seconds after which nothing new begins.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True,
              help="Folder of the JSON, one file per GPU; goes on where a run of the same code stopped.")  # fmt: skip
@click.option("--readme", type=click.Path(path_type=Path, dir_okay=False), default=Path("README.md"), show_default=True,
              help="Where the table goes, between its markers; left alone where it has none.")  # fmt: skip
@click.option(
    "--table", "table_only", is_flag=True, help="Measure nothing: write the table from the JSON that is there."
)
@click.pass_context
def bench(
    context: click.Context,
    quick: bool,
    only: tuple[str, ...],
    model: tuple[str, ...],
    again: bool,
    budget: float | None,
    out: Path,
    readme: Path,
    table_only: bool,
) -> None:
    """Measure our kernels beside bf16, torchao's dense FP8, 2:4 and INT4 on this GPU.

    Exits with 2 where there is no GPU, and with 1 where one of our own results was wrong or the GPU was lost.
    """
    if table_only:
        # a name that is misspelt would make an empty table of the one that is there
        for place in (out, readme):
            if not place.exists():
                raise click.UsageError(f"{place} is not there")
        if quick or only or model or again or budget is not None:
            raise click.UsageError("--table measures nothing: leave --quick, --only, --model, --again and --budget out")
    else:
        if why := no_gpu():
            raise click.UsageError(f"{why}: there is nothing to measure")
        effort = QUICK if quick else FULL
        effort = effort._replace(budget=budget) if budget is not None else effort
        plan = [(group, name) for group, name in (QUICK_PLAN if quick and not only else PLAN)
                if (not only or group in only) and (not model or name in model)]  # fmt: skip
        if not plan:
            raise click.UsageError("nothing in the plan is both of these groups and of these models")
        torch.manual_seed(0)
        machine = describe_machine()
        run = Bench(CudaClock(), machine, effort, out / f"{slug(machine['device'])}.json", click.echo, again)
        try:
            result = run.run(plan)
        except GpuLost as error:
            click.echo(f"the GPU was lost ({error}); what was measured before is in {run.file}", err=True)
            context.exit(1)
        show(result, Console())
        if wrong := wrong_of_ours(result):
            click.echo(f"wrong, so without a speed: {', '.join(wrong)}", err=True)
            context.exit(1)
    if readme.exists():
        try:
            write_readme(readme, results_in(out))
        except KeyError as error:
            raise click.ClickException(f"a file in {out} is no result of this command: it has no {error}") from error
        except ValueError as error:
            if table_only:
                raise click.UsageError(str(error)) from error
            click.echo(f"{error}: no table is written", err=True)


def wrong_of_ours(result: dict[str, Any]) -> list[str]:
    """Lines of ours that failed their numeric check, in words."""
    ours = {"hwpq", "prune_pack24", *PATHS, *(f"{name} alone" for name in PATHS)}
    wrong = [(group, one) for group in GROUPS for one in result[group] if one["status"] == "wrong"]
    return [
        f"{group}: " + ", ".join(f"{name} {one[name]}" for name in KEYS if name in one)
        for group, one in wrong
        if one.get("contender", one.get("variant")) in ours
    ]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the targets and what was measured, short."""
    table = Table(title=f"{result['machine']['device']}: LLaMA-3-8B", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "target", "floor", *FORMS, "verdicts"):
        table.add_column(column, justify="right" if column else "left")
    for rows in zip(*(targets(result, form=form) for form in FORMS), strict=True):
        measured = ["" if one.measured is None else f"{one.measured:.2f}" for one in rows]
        verdicts = " / ".join(dict.fromkeys(one.said for one in rows))
        table.add_row(rows[0].what, f"{rows[0].target:g}", f"{rows[0].floor:g}", *measured, verdicts)
    console.print(table)
    if result["ceilings"]:
        console.print(ceilings_in_words(result["ceilings"]), highlight=False)
    for trouble in (result["stopped"], *result["failures"]):
        if trouble:
            console.print(trouble, highlight=False)
