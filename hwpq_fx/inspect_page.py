"""The page of `hwpq-fx inspect --html`: one file that loads nothing, with its plots inside."""

import re
from collections.abc import Callable, Sequence
from html import escape
from io import BytesIO
from math import prod
from typing import Any

import torch
from torch import Tensor

from hwpq_fx.kernels.ewma import ewma

from .inspect_checkpoint import PART_BYTES, STORED, Checkpoint, InspectedLayer, Inspection, worst

# Colours by role. matplotlib writes the hex code, the page puts a variable in its place: light and dark differ.
INK, FAINT = "#010101", "#020202"
SERIES = tuple(f"#0300{number:02x}" for number in range(8))
VARIABLES = {INK: "--ink", FAINT: "--faint"} | {colour: f"--s{number}" for number, colour in enumerate(SERIES)}
MARKERS = "os^DvPX*"
SHOWN = 256
"""Kept values of a row that the plot of the threshold has room for."""


def page(inspection: Inspection, checkpoint: Checkpoint, layer: str = "") -> str:
    """HTML of a checkpoint. layer: the 2:4 one whose values are shown, the one with the largest error by default.

    Raises ImportError without matplotlib, KeyError for a layer that is not a valid 2:4 one.
    """
    sparse = {one.name: one for one in inspection.layers if one.patterns}
    chosen = sparse[layer] if layer else worst(inspection.layers)
    figures = [_errors(inspection), _sizes(inspection)]
    if chosen is not None:
        figures += _values(inspection, checkpoint, chosen)
    return PAGE.format(
        title=escape(f"{checkpoint.folder.absolute().name}, converted by hwpq_fx"),
        css=CSS,
        script=SCRIPT,
        verdict=_verdict(inspection),
        facts="".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in _facts(inspection)),
        figures="\n".join(figure for figure in figures if figure),
        head="".join(f'<th aria-sort="none"><button type="button">{name}</button></th>' for name in HEADERS),
        rows="\n".join(_row(place, one) for place, one in enumerate(inspection.layers)),
    )


def _verdict(inspection: Inspection) -> str:
    bad = [f"{one.name}: {one.problem}" for one in inspection.layers if one.problem] + inspection.problems
    if not bad:
        return '<p class="good">Valid: every packed weight was read and checked.</p>'
    items = "".join(f"<li>{escape(one)}</li>" for one in bad)
    return f'<div class="bad"><p>Not valid: {len(bad)} found wrong.</p><ul>{items}</ul></div>'


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    config, total = inspection.config, inspection.total
    return [
        ("packed layers", f"{len(inspection.packed)} of {len(inspection.layers)} known"),
        ("packed", f"{_size(total('packed_bytes'))} for {_size(total('dense_bytes'))} dense: {inspection.ratio:.3f}"),
        ("everything else", _size(inspection.rest_bytes)),
        ("errors from", inspection.report_from or "not known: no report came with the checkpoint"),
        ("conversion", f"{config.saliency}, {config.selection}, {config.compensation}, activation {config.activation}"),
        ("format version", str(inspection.format_version)),
    ]


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


HEADERS = ("#", "layer", "out x in", "stored", "error", "settled", "zeros", "stored bytes", "ratio", "patterns")


def _row(place: int, layer: InspectedLayer) -> str:
    packed = layer.status != "dense"
    ratio = layer.packed_bytes / layer.dense_bytes if packed and layer.dense_bytes else None
    size = layer.packed_bytes if packed else layer.dense_bytes
    stored = STORED[layer.status] if packed else f"dense: {layer.reason}"
    cells: list[tuple[str, Any]] = [
        (str(place + 1), place),
        (escape(layer.name), None),
        ("x".join(map(str, layer.shape)), prod(layer.shape)),
        (escape(f"bad: {layer.problem}" if layer.problem else stored), None),
        _number(layer.error if packed else None, ".3f"),
        _number(layer.settled, ".1%"),
        _number(layer.zeros if packed else None, ".1%"),
        (_size(size), size),
        _number(ratio, ".3f"),
        (_pattern_bar(layer.patterns), max(layer.patterns.values(), default=None)),
    ]
    made = "".join(f"<td>{text}</td>" if key is None else f'<td data-key="{key}">{text}</td>' for text, key in cells)
    return f"<tr{' class=bad' if layer.problem else ''}>{made}</tr>"


def _number(value: float | None, form: str) -> tuple[str, float | None]:
    return ("", None) if value is None else (format(value, form), value)


def _pattern_bar(patterns: dict[str, float]) -> str:
    """Six bars; 1/6 each, as of weights in no order, is half the height."""
    if not patterns:
        return ""
    told = ", ".join(f"{name}: {share:.1%}" for name, share in patterns.items())
    bars = "".join(
        f'<rect x="{9 * place}" y="{max(24 - 72 * share, 0):.1f}" width="7" height="{min(72 * share, 24):.1f}"/>'
        for place, share in enumerate(patterns.values())
    )
    return f'<svg class="patterns" role="img" viewBox="0 0 52 24"><title>kept, {told}</title>{bars}</svg>'


def _errors(inspection: Inspection) -> str:
    known = [(place, one) for place, one in enumerate(inspection.packed) if one.error is not None]
    if not known:
        return ""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for place, one in known:
        kind = one.name.rpartition(".")[2]
        kind = kind if kind in kinds or len(kinds) < len(SERIES) - 1 else "others"
        kinds.setdefault(kind, []).append((place + 1, one.error or 0.0))

    def draw(axes: Any) -> None:
        for number, points in enumerate(kinds.values()):
            axes.scatter(*zip(*points, strict=True), s=16, marker=MARKERS[number], color=SERIES[number])
        _legend(axes, list(kinds), MARKERS)
        axes.set_xlabel("packed layer, in the model's order")
        axes.set_ylabel("relative output error")
        axes.set_ylim(0, 1.1 * (highest.error or 1))

    highest = max((one for _, one in known), key=lambda one: one.error or 0.0)
    alt = f"{len(known)} layers; the largest error is {highest.error:.3f}, of {highest.name}"
    return _figure(
        "Error per layer", alt, draw,
        "||X(W - W')|| / ||XW|| on the calibration inputs, as conversion found it. With cg from X^T X or sampled rows, "
        "else from sums and sums of squares alone, as if input channels were correlated by their means alone: do not "
        f"compare the one with the other. {alt}.",
    )  # fmt: skip


def _sizes(inspection: Inspection) -> str:
    parts = {name: inspection.total(what) for name, what in PART_BYTES.items()}
    rest, dense = inspection.rest_bytes, inspection.total("dense_bytes")
    if not dense:
        return ""
    labels = ["packed values", "indices", "scales", "everything else", "packed layers, were they dense"]

    def draw(axes: Any) -> None:
        for place, sizes in enumerate(([*parts.values(), rest, 0], [0, 0, 0, rest, dense])):
            left = 0.0
            for number, size in enumerate(sizes):
                axes.barh(place, size / 2**20, left=left, height=0.6, color=SERIES[number])
                left += size / 2**20
        axes.set_yticks([0, 1], ["stored", "dense"])
        axes.set_ylim(1.6, -0.6)
        axes.set_xlabel("MiB")
        _legend(axes, labels, "s" * len(labels))

    told = ", ".join(f"{name} {_size(size)}" for name, size in zip(labels, [*parts.values(), rest, dense], strict=True))
    return _figure("Size", told, draw, f"{told}.")


def _values(inspection: Inspection, checkpoint: Checkpoint, layer: InspectedLayer) -> list[str]:
    from matplotlib.ticker import LogLocator, NullFormatter

    magnitudes = kept_magnitudes(checkpoint, layer.name)
    config, first = inspection.config, magnitudes[:1, :]
    mean, dev = ewma(first, config.mean_rate, config.dev_rate)
    threshold = mean + config.lam * dev
    under = (first < threshold).float().mean().item()
    shown = [part[0, :SHOWN].tolist() for part in (first, mean, threshold)]
    some = magnitudes[magnitudes > 0].log10()
    heights, edges = torch.histogram(some, bins=60) if some.numel() else (torch.zeros(0), torch.zeros(0))

    def histogram(axes: Any) -> None:
        if len(heights):
            axes.stairs((heights / magnitudes.numel()).tolist(), (10**edges).tolist(), fill=True, color=SERIES[0])
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("|value x scale|")
        axes.set_ylabel("share of kept values")

    def moving(axes: Any) -> None:
        places = range(len(shown[0]))
        axes.scatter(places, shown[0], s=7, color=SERIES[0])
        axes.plot(places, shown[1], color=SERIES[1], linewidth=1.2)
        axes.plot(places, shown[2], color=SERIES[2], linewidth=1.2, linestyle="--")
        axes.set_xlabel("kept value of row 0, in order")
        axes.set_ylabel("|value x scale|")
        axes.set_ylim(bottom=0)
        _legend(axes, ["kept value", "moving mean", f"threshold, mean {config.lam:+g} dev"], ("o", "-", "--"))

    smallest, largest = (float(bound) for bound in magnitudes.aminmax())
    rows, kept = magnitudes.shape
    spread = f"{rows} x {kept} kept values from {smallest:.3g} to {largest:.3g}"
    lost = (
        "A checkpoint holds neither the pruned values nor the inputs, so these are not the scores that chose the masks "
        "but the sizes of what was kept, after compensation."
    )
    return [
        _figure(
            f"Kept values of {layer.name}", spread, histogram,
            f"{spread}; values that are zero in FP8 are left out. {lost}",
        ),
        _figure(
            f"EWMA threshold along a row of {layer.name}", f"{under:.1%} of the row's kept values are under it", moving,
            f"The recurrence and the rates that selection uses (mean {config.mean_rate:g}, deviation "
            f"{config.dev_rate:g}), run over the kept values of row 0, the first {len(shown[0])} of {kept} shown; "
            f"{under:.1%} of the row are under the threshold. {lost}",
        ),
    ]  # fmt: skip


def kept_magnitudes(checkpoint: Checkpoint, name: str) -> Tensor:
    """|value x scale| of every kept value of a 2:4 layer, float32 [N, K/2]."""
    parts = checkpoint.parts(name if name in checkpoint.table else f"{name}.weight")
    return (parts["qdata"].float() * parts["scale"]).abs_()


def _legend(axes: Any, labels: list[str], looks: Sequence[Any]) -> None:
    """looks: a marker or a style of line for each."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SERIES[number], markersize=4, linewidth=1.2, linestyle=look if "-" in look else "none",
               marker="" if "-" in look else look)
        for number, look in enumerate(looks[: len(labels)])
    ]  # fmt: skip
    legend = axes.legend(
        handles, labels, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.24), frameon=False, labelcolor=INK,
        handletextpad=0.4, handlelength=1.6,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # names may hold dollars


def _figure(title: str, alt: str, draw: Callable[[Any], None], caption: str) -> str:
    """A plot as inline SVG with its title, alternative text and caption."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hwpq_fx", "font.size": 9}):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        axes.tick_params(which="both", colors=INK)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        written = BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W+", "-", title)
    for pattern, new in (
        (r' xmlns(:\w+)?="[^"]*"', ""),  # HTML knows them
        (r"xlink:href", "href"),
        (r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{prefix}-"),  # ids are the page's
        (r'(<svg) width="[^"]*" height="[^"]*"', r"\1"),
    ):
        svg = re.sub(pattern, new, svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    named = f"<title>{escape(title)}: {escape(alt)}</title>"
    svg = re.sub("<svg([^>]*)>", lambda found: f'<svg role="img"{found[1]}>{named}', svg, count=1)
    return f"<figure><h2>{escape(title)}</h2>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #dfe3e8; --paper: #fff; --soft: #f4f6f8; --wrong: #b3261e;
  --s0: #0b6fb8; --s1: #d0450b; --s2: #0a8f63; --s3: #b8860b; --s4: #8a8f98; --s5: #a0479a;
  --s6: #5d4bb5; --s7: #52606d }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --faint: #363c44; --paper: #14171a; --soft: #1e2226; --wrong: #ff8a80;
    --s0: #58b0f0; --s1: #ff8a5c; --s2: #3fcf9b; --s3: #e8c14a; --s4: #8d949e; --s5: #e08bd8;
    --s6: #a79bf5; --s7: #b5c0cb }
}
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere }
#layers { margin-top: 2rem }
.good, .bad { border-left: .3rem solid var(--s2); padding: .4rem .8rem; background: var(--soft);
  overflow-wrap: anywhere } div.bad { border-color: var(--wrong) } tr.bad { color: var(--wrong) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem } dt { opacity: .75 }
dd { margin: 0; overflow-wrap: anywhere }
.plots { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)) }
figure { margin: 0; padding: 1rem; background: var(--soft); border-radius: .5rem; min-width: 0 }
figure svg { display: block; width: 100%; height: auto; margin: .5rem 0 }
figure text { font-family: inherit !important }
figcaption { font-size: .85rem; opacity: .85; overflow-wrap: anywhere }
.table { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; width: 100% }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint) }
th:nth-child(2), td:nth-child(2), th:nth-child(4), td:nth-child(4) { text-align: left }
td:nth-child(2), td:nth-child(4) { white-space: normal; overflow-wrap: anywhere; min-width: 11rem }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid var(--s0) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
svg.patterns { height: 1.2rem; width: 2.6rem; fill: var(--s0) }
"""

SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0];
const key = (row, column) => { const cell = row.cells[column];
  return "key" in cell.dataset ? Number(cell.dataset.key) : cell.textContent; };
table.querySelectorAll("th").forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  table.querySelectorAll("th").forEach(one => one.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const order = (a, b) => { const x = key(a, column), y = key(b, column);
    if (x === "" || y === "") return (x === "") - (y === "");  // what is not known comes last, either way
    return sign * (typeof x === "number" && typeof y === "number" ? x - y
      : String(x).localeCompare(String(y), undefined, { numeric: true })); };
  body.append(...[...body.rows].sort(order));
}));
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<h1>{title}</h1>
{verdict}
<dl>{facts}</dl>
<div class="plots">
{figures}
</div>
<h2 id="layers">Layers</h2>
<p>A click on a heading sorts. Patterns: how often a group of four keeps 01, 02, 03, 12, 13 and 23.</p>
<div class="table" role="region" aria-labelledby="layers" tabindex="0">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<script>{script}</script>
</body>
</html>
"""
