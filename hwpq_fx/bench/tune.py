"""`hwpq-fx tune`: measure every way to multiply by a packed weight on this GPU; the dispatcher goes by the times."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from hwpq_fx.kernels.cusparselt24 import export_algorithms
from hwpq_fx.kernels.paths import PATHS
from hwpq_fx.kernels.roofline import MODELS
from hwpq_fx.kernels.table import DENSE_NAMES, Table, load_table, save_table, user_table_file

from ..errors import ConfigError
from .contenders import COMPILING, Contender, dense_contenders, path_contenders
from .linears import Shape
from .machine import no_gpu
from .measure import Clock, CudaClock, GpuLost
from .shapes import MERGED, SEPARATE, decoder

ROWS = tuple(2**power for power in range(15))
QUICK_ROWS = ROWS[::2]
# A path that takes this much longer than the best with the same kind of activation is not tried with more rows: a
# kernel for few rows would take seconds at thousands
HOPELESS = 6.0
SECONDS, QUICK_SECONDS = 0.03, 0.01

Times = dict[int, dict[str, float]]


class Tuned(NamedTuple):
    """One shape: microseconds of each path by rows, and what was refused a place, in words."""

    n: int
    k: int
    us: Times
    refused: list[str]


def tune_shapes(
    clock: Clock,
    shapes: Iterable[tuple[int, int]],
    rows: Sequence[int],
    seconds: float,
    peers: Sequence[Contender] = (),
) -> Iterator[Tuned]:
    """Time the paths that serve, at every number of rows, for each weight (N, K), and beside them `peers`: dense
    products, which `hwpq_fx.plan` weighs ours against.

    Activations quantized by a path are part of its time. A path whose result is wrong, or that fails, gets no entry
    and no further try at this shape.
    """
    for n, k in shapes:
        shape = Shape(clock, (n, k), [*path_contenders(ROWS[-1]), *peers])
        tuned = Tuned(n, k, {}, [])
        left = list(shape.contenders)
        for m in sorted(rows):
            times: dict[str, float] = {}
            for line, contender in zip(shape.lines(m, seconds, left), list(left), strict=True):
                if line["status"] == "ok":
                    times[contender.name] = line["median_us"]
                    continue
                left.remove(contender)
                # a peer that fails here leaves plans to the roofline, and is no fault of ours
                if line["status"] != "unserved" and contender.name in PATHS:
                    tuned.refused.append(f"{contender.name} at M = {m}: {line['status']}, {line['error']}")
            if times:
                tuned.us[m] = times
            left = [one for one in left if one.name not in PATHS or not _hopeless(one, times)]
        yield tuned


def _hopeless(contender: Contender, times: dict[str, float]) -> bool:
    ours = {name: us for name, us in times.items() if name in PATHS}
    alike = [us for name, us in ours.items() if PATHS[name].fp8 == PATHS[contender.name].fp8]
    return times[contender.name] > HOPELESS * min(alike)


def earlier(file: Path, device: str, warn: Callable[[str], None]) -> Table:
    """The table to add to; an empty one, with a warning, where the file is broken or of another GPU or version."""
    if not file.exists():
        return Table()
    try:
        return load_table(file, device)
    except ValueError as error:
        warn(f"{file} {error}: it is made anew")
        return Table()


@click.command()
@click.option("--model", "models", multiple=True, metavar="NAME|FILE.json",
              help=f"Whose linears to measure: {', '.join(MODELS)}, or a config.json; several times for several.  "
              "[default: all that have names]")  # fmt: skip
@click.option("--quick", is_flag=True, help="Half of the numbers of rows, fewer samples.")
@click.option("--no-peers", is_flag=True, help="Leave out the dense products, by which only plans go: they take most "
              "of the time. What is known of them stays.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the table as one JSON object and nothing else.")
@click.pass_context
def tune(context: click.Context, models: tuple[str, ...], quick: bool, no_peers: bool, as_json: bool) -> None:
    """Measure which kernel is fastest at which size on this GPU; products run by that from then on.

    Shapes measured before stay in the table. Exits with 2 where there is no GPU, with 1 where a kernel's result was
    wrong (it gets no place in the table) or the GPU was lost.
    """
    try:
        decoders = [decoder(name) for name in models or MODELS]
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    if why := no_gpu():
        raise click.UsageError(f"{why}: there is nothing to tune")
    # merged first, as they run in a converted model
    shapes = list(
        dict.fromkeys(shape for form in (MERGED, SEPARATE) for one in decoders for shape in one.shapes([form]))
    )
    device = torch.cuda.get_device_name()
    file = user_table_file(device)
    say = (lambda text: None) if as_json else click.echo
    try:
        refused = run_tune(
            CudaClock(), device, file, shapes, QUICK_ROWS if quick else ROWS, QUICK_SECONDS if quick else SECONDS,
            say, () if no_peers else dense_contenders(),
        )  # fmt: skip
    except GpuLost as error:
        click.echo(f"the GPU was lost ({error}); shapes measured before are in {file}", err=True)
        context.exit(1)
    for one in refused:
        click.echo(one, err=True)
    if not file.exists():
        click.echo("no kernel was right at any size: there is no table", err=True)
        context.exit(1)
    say(f"written to {file}")
    if as_json:
        click.echo(file.read_text())
    context.exit(1 if refused else 0)


def run_tune(
    clock: Clock,
    device: str,
    file: Path,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    seconds: float,
    say: Callable[[str], Any],
    peers: Sequence[Contender] = (),
) -> list[str]:
    """Measure, writing the table after every shape; returns what was refused a place in it."""
    table = earlier(file, device, lambda text: click.echo(text, err=True))
    entries, refused = dict(table.entries), []
    with torch.no_grad(), torch._dynamo.config.patch(COMPILING):
        for at, tuned in enumerate(tune_shapes(clock, shapes, rows, seconds, peers), 1):
            if tuned.us:
                before = {} if peers else entries.get((tuned.n, tuned.k), {})
                entries[tuned.n, tuned.k] = _with_peers_of(before, tuned.us)
                save_table(Table(entries, {**table.algorithms, **export_algorithms()}), device, file)
            refused += [f"{tuned.n} x {tuned.k}, {one}" for one in tuned.refused]
            say(f"{at} of {len(shapes)}: {tuned.n} x {tuned.k}  {summary(tuned.us)}")
    return refused


def _with_peers_of(before: Mapping[int, Mapping[str, float]], us: Times) -> Times:
    dense = {m: {name: before[m][name] for name in DENSE_NAMES if name in before.get(m, {})} for m in us}
    return {m: times | dense[m] for m, times in us.items()}


def summary(us: Times) -> str:
    """The fastest path by rows, as "gemv 1-8, tiles 16-64"."""
    ours = {m: {name: time for name, time in times.items() if name not in DENSE_NAMES} for m, times in us.items()}
    best = [(m, min(times, key=times.__getitem__)) for m, times in sorted(ours.items()) if times]
    spans: list[list[Any]] = []
    for m, name in best:
        if spans and spans[-1][0] == name:
            spans[-1][2] = m
        else:
            spans.append([name, m, m])
    return ", ".join(f"{name} {first}-{last}" if first < last else f"{name} {first}" for name, first, last in spans)
