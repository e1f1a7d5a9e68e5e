"""What a conversion did, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from hwpq_fx.passes.dynamo import unwrap

ATTRIBUTE = "_hwpq_report"
REPORT_FILE = "hwpq_report.json"
"""What `hwpq-fx compress` writes beside a checkpoint."""
REPORT_METADATA = "hwpq_fx.report"
"""Where a checkpoint's safetensors keep it."""


@dataclass
class LayerReport:
    """One layer. Sizes are in bytes; a layer that stayed dense says why in `reason`."""

    name: str
    shape: tuple[int, ...]
    """[out_features, in_features], however the module keeps it."""
    status: str
    """"sparse24_fp8", "fp8" (unstructured zeros) or "dense"."""
    reason: str = ""
    rows: int = 0
    """Rows of input that calibration saw; 0 for a data-free conversion."""
    pruned: float = 0.0
    """Share of weights that are gone."""
    settled: float = 0.0
    """Share of groups of four (unstructured: of weights) that the EWMA threshold settled."""
    error: float = 0.0
    """Relative output error ||X(W - W')|| / ||XW|| on the calibration inputs, FP8 rounding of W included, of
    activations not. With "cg" from X^T X or the sampled rows, an eighth of which are not fitted to and stand for all
    that are not in the sample; else from sums and sums of squares alone: what it would be were the input channels
    correlated by their means alone. Do not compare the one with the other. With sequential it is measured against the
    dense layer on the dense model's inputs, and may exceed 1 where the layer makes up for those before it."""
    compensation: str = ""
    """What was done for the pruned weights: "none", "energy", "cg, X^T X", "cg, 4096 rows", or with
    sequential "cg, in order, X^T X"."""
    dense_bytes: int = 0
    packed_bytes: int = 0
    """What is saved: values, indices, scales."""
    layout_bytes: int = 0
    """What is kept in memory beside it to compute with."""
    paths: str = ""
    """What runs at how many rows of input: "dense" on the CPU, "gemv to 8 rows, tiles to 64, cusparselt above"."""


@dataclass
class Report:
    """What `hwpq_fx.convert` did. Prints as a table; `to_dict` is for machines."""

    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the phases."""
    one_by_one: str = ""
    """Why layers were converted one by one, each on the dense model's inputs, where `HWPQConfig.sequential` would have
    had them in order."""

    @property
    def converted(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.status != "dense"]

    def total(self, what: str) -> int:
        """Sum of a size ("dense_bytes", "packed_bytes", "layout_bytes") over the converted layers."""
        return sum(getattr(layer, what) for layer in self.converted)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """Of what `to_dict` gave, through JSON or not. Raises KeyError or TypeError for anything else."""
        lines = [LayerReport(**line | {"shape": tuple(line["shape"])}) for line in content["layers"]]
        return cls(lines, dict(content["seconds"]), content["one_by_one"])

    def table(self) -> Table:
        table = Table(
            title=f"{len(self.converted)} of {len(self.layers)} layers converted",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("layer", overflow="fold", min_width=22)
        table.add_column("out x in", justify="right", no_wrap=True)
        table.add_column("became", overflow="fold", min_width=8)
        for column in ("rows", "settled", "error", "KiB"):
            table.add_column(column, justify="right", no_wrap=True)
        for layer in self.layers:
            # Text: names and reasons may hold brackets, which a plain string would lose as markup
            name, size = Text(layer.name), "x".join(map(str, layer.shape))
            if layer.status == "dense":
                table.add_row(name, size, Text(f"dense: {layer.reason}"), str(layer.rows or ""))
                continue
            table.add_row(
                name,
                size,
                "2:4 fp8" if layer.status == "sparse24_fp8" else f"fp8 -{layer.pruned:.0%}",
                str(layer.rows),
                f"{layer.settled:.1%}",
                f"{layer.error:.3f}",
                f"{layer.dense_bytes / 1024:.0f} > {layer.packed_bytes / 1024:.0f}",
            )
        return table

    def summary(self) -> str:
        """The totals, what runs, and the seconds."""
        before, packed, layout = (self.total(f"{part}_bytes") / 2**20 for part in ("dense", "packed", "layout"))
        sizes = f"converted layers: {before:.1f} MiB before, {packed:.1f} MiB packed"
        if layout:
            sizes += f" (and {layout:.1f} MiB in memory to compute with, never saved)"
        lines = [sizes]
        for paths, count in Counter(layer.paths for layer in self.converted if layer.paths).items():
            lines.append(f"{count} {'layer runs' if count == 1 else 'layers run'} as: {paths}")
        done = Counter(layer.compensation for layer in self.converted if layer.compensation)
        lines.append("; ".join(f"compensation of {_layers(count)}: {what}" for what, count in done.items()))
        if self.one_by_one:
            lines.append(f"converted one by one, not in order: {self.one_by_one}")
        lines.append(", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()))
        return "\n".join(line for line in lines if line)

    def __str__(self) -> str:
        text = StringIO()
        # plain text, also in a notebook or under FORCE_COLOR
        console = Console(file=text, width=110, color_system=None, force_terminal=False, force_jupyter=False)
        console.print(self.table())
        console.print(self.summary(), highlight=False, soft_wrap=True)
        return text.getvalue()


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def report(model: Callable[..., Any]) -> Report:
    """The report of the conversion that made `model`, compiled or not. Raises ValueError where there was none."""
    found = getattr(unwrap(model), "__dict__", {}).get(ATTRIBUTE)
    if found is None:
        raise ValueError("this model was not converted by hwpq_fx.convert")
    return found


def attach_report(model: nn.Module, made: Report) -> None:
    """Keep the report with the model."""
    unwrap(model).__dict__[ATTRIBUTE] = made
