"""`hwpq-fx kernels`: what the compiler made of our kernels, for GPUs that are not here, and the floors of a roofline
model."""

import json
import re
import sys
from collections.abc import Mapping, Sequence

import click
from rich import box
from rich.console import Console
from rich.table import Table

from .kernels.cubin import ARCHS
from .kernels.gpus import GPUS, LIMITS, Gpu
from .kernels.roofline import DENSE_FP8, MODELS, OURS, ROWS, Floor, best, layer, ratios
from .kernels.survey import Finding, kernel_modules, survey

MODEL_NOTE = "a model from datasheet figures, not a measurement"
COLUMNS = ("bf16", *DENSE_FP8, "int4_weight_only", *OURS)
ON_WEIGHTS = ("prune_pack24", "select24")


@click.command("kernels")
@click.option(
    "--arch",
    "archs",
    multiple=True,
    type=click.Choice([*map(str, ARCHS), "all"]),
    help="Compute capability to compile for, 90 for sm_90; may be given more than once.",
)
@click.option("--sass", metavar="NAME", help="Print the SASS of the specimens of this name.")
@click.option("--roofline", "gpu", type=click.Choice(list(GPUS)), help="Print the floors of a roofline model instead.")
@click.option("--model", type=click.Choice(list(MODELS)), help="With --roofline: whose decoder layer.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def kernels(archs: tuple[str, ...], sass: str | None, gpu: str | None, model: str | None, as_json: bool) -> None:
    """Compile every Triton kernel, without a GPU, and show registers, spills, shared memory and instructions; or the
    least time a GPU could take (--roofline).

    Exits with 1 where a kernel does not compile, spills, or does not fit a multiprocessor.
    """
    if bool(archs) == bool(gpu) or (gpu and sass) or (model and not gpu):
        raise click.UsageError("give --arch (and --sass), or --roofline (and --model)")
    if gpu:
        show_roofline(GPUS[gpu], [model] if model else list(MODELS), as_json)
        return
    chosen = list(ARCHS) if "all" in archs else sorted({int(arch) for arch in archs})
    findings = compile_all(chosen, sass)
    if as_json:
        click.echo(json.dumps([_to_dict(one, with_sass=sass is not None) for one in findings], indent=1))
    elif sass is not None:
        for one in findings:
            click.echo(f"// {one.kernel}, {one.specimen}, sm_{one.arch}\n{one.sass or one.error}")
    else:
        show_findings(findings, _console())
    sys.exit(0 if all(one.passed for one in findings) else 1)


def compile_all(archs: Sequence[int], name: str | None = None) -> list[Finding]:
    """Every specimen of our kernels (or those of one name), sorted, with progress on stderr."""
    findings = []
    with Console(stderr=True).status("starting compilers") as status:
        try:
            for one in survey(archs, kernel_modules(), name or ""):
                findings.append(one)
                status.update(f"{len(findings)} compiled: {one.specimen} for sm_{one.arch}")
        except RuntimeError as error:
            if "No module named 'triton'" in str(error):
                raise click.UsageError("compiling kernels needs triton (pip install triton)") from error
            raise click.ClickException(str(error)) from error
    if not findings:
        raise click.UsageError(f"no specimen is called {name!r}")
    return sorted(findings, key=lambda one: (one.arch, one.module, one.kernel, one.specimen))


def _console() -> Console:
    """As wide as the tables: a pipe has no width, and a narrow terminal may break lines, but is not to cut numbers."""
    console = Console()
    console.width = max(console.width, 100) if console.is_terminal else 150
    return console


def _to_dict(one: Finding, with_sass: bool) -> dict[str, object]:
    fields = one._asdict() | {"passed": one.passed, "shared_limit": LIMITS[one.arch].program_shared}
    return fields if with_sass else {name: value for name, value in fields.items() if name != "sass"}


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """One table per arch, then what failed."""
    for arch in sorted({one.arch for one in findings}):
        limits = LIMITS[arch]
        title = f"sm_{arch}: a multiprocessor holds {limits.warps} warps; {limits.program_shared // 1024} KiB a program"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("kernel", "specimen"):
            table.add_column(name, overflow="fold")
        names = ("registers", "spilled", "shared", "warps", "programs", "loads", "LDS", "STS", "PRMT", "matrix", "loop")
        for name in names:
            table.add_column(name, justify="right")
        for one in findings:
            if one.arch == arch:
                table.add_row(*_cells(one), style=None if one.passed else "red")
        console.print(table)
    console.print(
        "spilled: bytes a thread moves to and from local memory; programs: how many a multiprocessor holds at once;\n"
        "loads: global loads by bits a thread (x how often); loop: instructions of the longest innermost loop\n"
    )
    failed = [one for one in findings if not one.passed]
    for one in failed:
        why = one.error or (f"{one.spills} bytes spilled" if one.spills else "no program fits on a multiprocessor")
        console.print(f"[red]{one.kernel}, {one.specimen}, sm_{one.arch}[/]: ", end="")
        console.print(why, markup=False, highlight=False)
    console.print(f"{len(findings) - len(failed)} of {len(findings)} passed")


def _cells(one: Finding) -> list[str]:
    if one.error:
        return [one.kernel, one.specimen, "does not compile"]
    numbers = (one.registers, one.spills, one.shared, one.warps, one.programs)
    counts = one.instructions
    return [
        one.kernel,
        one.specimen,
        *map(str, numbers),
        loads(counts),
        *(str(_sum(counts, name)) for name in (r"LDS\.\d+", r"STS\.\d+", "PRMT")),
        " ".join(f"{name} {count}" for name, count in counts.items() if re.fullmatch(r"\w+MMA", name)),
        str(sum(one.loop.values())),
    ]


def loads(counts: Mapping[str, int]) -> str:
    """Global loads of a kernel, widest first: "128x4 16x2"; "TMA" for tiles a copy engine fetches."""
    widths: dict[int, int] = {}
    for name, count in counts.items():
        found = re.fullmatch(r"(?:LDG|LDGSTS)\.(\d+)", name)
        if found:
            widths[int(found[1])] = widths.get(int(found[1]), 0) + count
    by_engine = [f"TMAx{counts['UTMALDG']}"] if "UTMALDG" in counts else []
    return " ".join(by_engine + [f"{width}x{widths[width]}" for width in sorted(widths, reverse=True)])


def _sum(counts: Mapping[str, int], pattern: str) -> int:
    return sum(count for name, count in counts.items() if re.fullmatch(pattern, name))


def show_roofline(gpu: Gpu, models: Sequence[str], as_json: bool) -> None:
    """Floors of every op over the linears of a decoder layer, by rows of x."""
    if as_json:
        click.echo(
            json.dumps({"note": MODEL_NOTE, "gpu": gpu._asdict(), "models": {m: _floors(gpu, m) for m in models}})
        )
        return
    console = _console()
    heads = [name.replace("_", "\n", 1).replace("weight_only", "w-only").replace("dynamic", "dyn") for name in COLUMNS]
    for model in models:
        title = f"{model} on {gpu.name}: us over the linears of a decoder layer,\n{MODEL_NOTE}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("M", *heads, "vs\nbf16", "vs\nFP8"):
            table.add_column(name, justify="right", no_wrap=True)
        for m in ROWS:
            vs_bf16, vs_fp8 = ratios(m, model, gpu)
            cells = (_cell(layer(op, m, model, gpu)) for op in COLUMNS)
            table.add_row(str(m), *cells, f"{vs_bf16:.2f}x", f"{vs_fp8:.2f}x")
        console.print(table)
        for op in ON_WEIGHTS:
            console.print(f"{op}, bf16 weights: {_cell(layer(op, 1, model, gpu))}", highlight=False)
        fits = layer("gemv", 1, model, gpu).bytes < gpu.l2
        console.print("the packed layer fits the L2 cache: warm, it can be faster than this\n" if fits else "")
    console.print(
        "m: waits for memory, t: for tensor cores, i: for slots to issue instructions; last columns: how many times\n"
        "faster than bf16, and than the better dense FP8, the fastest of ours for each linear could be",
        highlight=False,
    )


def _cell(floor: Floor) -> str:
    us = floor.seconds * 1e6
    return f"{us:.{1 if us < 100 else 0}f}{'t' if floor.bound == 'math' else floor.bound[0]}"


def _floors(gpu: Gpu, model: str) -> list[dict[str, object]]:
    return [
        {
            "m": m,
            "floors": {op: layer(op, m, model, gpu)._asdict() for op in (*COLUMNS, *ON_WEIGHTS)},
            "ours": best(OURS, m, model, gpu)._asdict(),
            **dict(zip(("vs_bf16", "vs_dense_fp8"), ratios(m, model, gpu), strict=True)),
        }
        for m in ROWS
    ]
