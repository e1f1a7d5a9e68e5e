"""What a conversion would do to a model's layers, from its config alone: no weight is read."""

from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hwpq_fx.kernels.roofline import packed_bytes

from .compress import cannot_compress, shape_of
from .config import HWPQConfig, check_for_model
from .curvature import CurvatureBudget
from .errors import ModelError
from .layers import STACKED, check_patterns, layers_of, left_out, stacked_of
from .shards import Shards
from .skeleton import on_meta


@dataclass
class LayerSize:
    """One layer: what it would become and why, and its bytes now and then."""

    name: str
    shape: tuple[int, ...]
    status: str
    reason: str
    dense_bytes: int
    bytes: int


@dataclass
class DryRun:
    """Every layer that a conversion would look at. Prints as a table."""

    layers: list[LayerSize]
    model_bytes: int
    """All parameters and buffers, now."""
    statistics_bytes: int
    """What calibration would gather, at most: sums, sums of squares, and with "cg" X^T X or samples of rows."""

    bounded: bool
    """Whether the config has bounds, which may leave layers dense that are named converted here."""

    @property
    def converted_bytes(self) -> int:
        """All parameters and buffers, then."""
        return self.model_bytes - sum(layer.dense_bytes - layer.bytes for layer in self.layers)

    @property
    def memory_bytes(self) -> int:
        """What `convert` takes at its fullest, activations and second layouts left out: dense and packed weights and
        the statistics."""
        packed = sum(layer.bytes for layer in self.layers if layer.status != "dense")
        return self.model_bytes + packed + self.statistics_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"converted_bytes": self.converted_bytes, "memory_bytes": self.memory_bytes}

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("layer", "out x in", "becomes", "MiB"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            becomes = layer.status + (f": {layer.reason}" if layer.reason else "")
            before, after = layer.dense_bytes / 2**20, layer.bytes / 2**20
            size = f"{before:.1f} > {after:.1f}" if layer.status != "dense" else f"{before:.1f}"
            table.add_row(Text(layer.name), "x".join(map(str, layer.shape)), Text(becomes), size)
        text = StringIO()
        console = Console(file=text, width=110, color_system=None, force_terminal=False, force_jupyter=False)
        console.print(table)
        gib = (self.model_bytes / 2**30, self.converted_bytes / 2**30, self.memory_bytes / 2**30)
        console.print("model {:.2f} GiB > {:.2f} GiB; converting takes {:.2f} GiB and the activations".format(*gib))
        if self.bounded:
            console.print("the config's bounds need calibration to say which layers stay dense: see hwpq-fx plan")
        return text.getvalue()


def _stored_dtype(source: str) -> torch.dtype:
    try:
        return Shards(Path(source)).dtype
    except ModelError:  # of a hub, or not written yet
        return torch.float32


def dry_run(source: str, config: HWPQConfig) -> DryRun:
    """Look at a causal language model, a folder or a hub id, on the meta device.

    Raises ConfigError for a pattern that matches nothing, ModelError where there is no such model.
    """
    config = check_for_model(config)
    model = on_meta(source, lambda: _stored_dtype(source))
    layers = layers_of(model)
    check_patterns(layers, config)
    budget = CurvatureBudget(config.gathered_bytes)
    found, statistics = [], 0
    for layer in layers:
        use = layer.static_use
        if use is None:
            continue
        rows, cols = shape_of(layer.parameter, [use])
        reason = left_out(layer, config) or cannot_compress(layer, [use], config)
        dense = layer.parameter.nbytes
        if reason:
            found.append(LayerSize(layer.name, (rows, cols), "dense", reason, dense, dense))
            continue
        status, size = ("sparse24_fp8", packed_bytes(rows, cols)) if config.sparsity == "2:4" else ("fp8", 0)
        size = size or rows * cols + 4 * rows
        curvature = budget.grant(cols, torch.device("meta"))
        statistics += 2 * 8 * cols
        statistics += curvature.nbytes if curvature is not None else 0
        found.append(LayerSize(layer.name, (rows, cols), status, "", dense, size))
    for name, parameter in stacked_of(model):
        found.append(LayerSize(name, tuple(parameter.shape), "dense", STACKED, parameter.nbytes, parameter.nbytes))
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return DryRun(found, total, statistics, config.bounded)
