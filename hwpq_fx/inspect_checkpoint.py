"""What is in a converted checkpoint, read from its files layer by layer: no model is built, no dense weight made."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from hwpq_fx.kernels.pack24 import PATTERNS

from .checkpoint import (
    COMPONENT,
    FP8,
    PARTS,
    SPARSE24,
    Stored,
    check_version,
    component,
    dtype_named,
    join,
    table_from_json,
)
from .config import HWPQConfig
from .errors import CheckpointError, ConfigError
from .report import REPORT_FILE, REPORT_METADATA, LayerReport


@dataclass
class InspectedLayer:
    """One layer of the checkpoint. What conversion found is None where no report came with the checkpoint."""

    name: str
    shape: tuple[int, ...]
    """[out_features, in_features], however the module keeps it."""
    status: str
    """"sparse24_fp8", "fp8" (dense FP8, perhaps with zeros anywhere) or "dense"."""
    reason: str = ""
    """Why it is dense, as conversion said."""
    problem: str = ""
    """What is wrong with the stored weight."""
    patterns: dict[str, float] = field(default_factory=dict)
    """Share of the groups of four that keep "01", "02", "03", "12", "13", "23"."""
    zeros: float = 0.0
    """Share of weights that are zero: pruned, or too small for FP8."""
    dense_bytes: int = 0
    """In the model's dtype."""
    values_bytes: int = 0
    indices_bytes: int = 0
    scales_bytes: int = 0
    rows: int | None = None
    """Rows of input that calibration saw, 0 for none."""
    settled: float | None = None
    """Share of groups that the EWMA threshold settled."""
    error: float | None = None
    """Relative output error, as in `LayerReport`."""
    compensation: str = ""

    @property
    def packed_bytes(self) -> int:
        return self.values_bytes + self.indices_bytes + self.scales_bytes


@dataclass
class Inspection:
    """A checkpoint. Prints as a table; `to_dict` is for machines."""

    layers: list[InspectedLayer]
    problems: list[str]
    """What is wrong with the checkpoint as a whole; see also the layers'."""
    rest_bytes: int
    """Tensors that are not packed: embeddings, norms, dense layers."""
    config: HWPQConfig
    format_version: int
    report_from: str
    """Where errors come from: "the checkpoint", the report's file name, or ""."""

    @property
    def packed(self) -> list[InspectedLayer]:
        return [layer for layer in self.layers if layer.status != "dense"]

    @property
    def valid(self) -> bool:
        return not self.problems and not any(layer.problem for layer in self.layers)

    def total(self, what: str) -> int:
        """Sum of a size ("dense_bytes", "packed_bytes", "values_bytes", ...) over the packed layers."""
        return sum(getattr(layer, what) for layer in self.packed)

    @property
    def ratio(self) -> float:
        """Bytes of the packed layers over what they take dense."""
        return self.total("packed_bytes") / max(self.total("dense_bytes"), 1)

    @property
    def patterns(self) -> dict[str, float]:
        """Share of each pattern over all 2:4 layers, by their size."""
        known = [layer for layer in self.layers if layer.patterns]
        groups = sum(layer.values_bytes for layer in known)
        return {
            name: sum(layer.patterns[name] * layer.values_bytes for layer in known) / groups for name in NAMES if known
        }

    def to_dict(self) -> dict[str, Any]:
        totals = {name: self.total(name) for name in ("dense_bytes", "packed_bytes", *PART_BYTES.values())}
        layers = [asdict(layer) | {"packed_bytes": layer.packed_bytes} for layer in self.layers]
        derived = {"valid": self.valid, "ratio": self.ratio, "patterns": self.patterns}
        return asdict(self) | derived | totals | {"layers": layers}

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("layer", overflow="fold", min_width=22)
        for column in ("out x in", "stored", "zeros", "error", "KiB"):
            table.add_column(column, justify="right", no_wrap=column != "stored")
        for layer in self.layers:
            # Text: names and reasons may hold brackets, which a plain string would lose as markup
            name, size = Text(layer.name), "x".join(map(str, layer.shape))
            stored = Text(f"dense: {layer.reason}" if layer.status == "dense" else STORED[layer.status])
            if layer.problem:
                stored = Text(f"BAD: {layer.problem}")
            error = "" if layer.error is None or layer.status == "dense" else f"{layer.error:.3f}"
            kib = f"{layer.dense_bytes / 1024:.0f}"
            if layer.status != "dense":
                kib += f" > {layer.packed_bytes / 1024:.0f}"
            table.add_row(name, size, stored, f"{layer.zeros:.1%}" if layer.status != "dense" else "", error, kib)
        text = StringIO()
        # plain text, also in a notebook or under FORCE_COLOR
        console = Console(file=text, width=110, color_system=None, force_terminal=False, force_jupyter=False)
        console.print(table)
        console.print(self.summary(), highlight=False, markup=False, soft_wrap=True)
        return text.getvalue()

    def summary(self) -> str:
        """Totals, patterns, where errors come from, and whether all is well."""
        parts = ", ".join(f"{self.total(size) / 2**20:.2f} {name}" for name, size in PART_BYTES.items())
        before, after, rest = (size / 2**20 for size in (self.total("dense_bytes"), self.total("packed_bytes"),
                                                         self.rest_bytes))  # fmt: skip
        lines = [
            f"packed layers: {before:.2f} MiB dense, {after:.2f} MiB stored, ratio {self.ratio:.3f} (MiB of {parts})",
            f"everything else: {rest:.2f} MiB",
        ]
        if self.patterns:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in self.patterns.items())
            lines.append(f"kept of every four: {shares}")
        lines.append(f"errors: {self.report_from or 'not known, no report came with the checkpoint'}")
        bad = sum(bool(layer.problem) for layer in self.layers)
        lines += [f"BAD: {problem}" for problem in self.problems]
        lines.append("valid" if self.valid else f"NOT valid: {bad} of {len(self.packed)} packed layers are bad")
        return "\n".join(lines)


NAMES = {f"{nibble & 3}{nibble >> 2}": nibble for nibble in PATTERNS}
PART_BYTES = {"values": "values_bytes", "indices": "indices_bytes", "scales": "scales_bytes"}
PART_OF = {"qdata": "values_bytes", "sparse_metadata": "indices_bytes", "scale": "scales_bytes"}
STORED = {SPARSE24: "2:4 fp8", FP8: "fp8"}


class Checkpoint:
    """The files of a converted model: which weights are packed, and their parts when asked for."""

    def __init__(self, directory: str | os.PathLike[str]):
        """Raises CheckpointError where there is no checkpoint of this package, or it is incomplete."""
        self.folder = Path(directory)
        described = _json(self.folder / "config.json")
        quantization = described.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "hwpq_fx":
            raise CheckpointError(f"{self.folder} is no checkpoint of hwpq_fx: its config.json does not say so")
        check_version(quantization.get("format_version"))
        self.version: int = quantization["format_version"]
        try:
            self.config = HWPQConfig(**quantization["config"])
            self.table = table_from_json(quantization["layers"])
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"quantization_config: {type(error).__name__}: {error}") from error
        self.dtype = dtype_named(described.get("dtype") or "float32")
        index = self._index()
        files = [self.folder / name for name in sorted(set(index.values()) or {"model.safetensors"})]
        self.metadata: dict[str, str] = {}
        self.places: dict[str, Path] = {}
        self.bytes = 0
        for path in files:
            self._look_into(path)
        self.problems = [
            f"{name} is not in {file}, where the index has it"
            for name, file in index.items()
            if self.places.get(name) != self.folder / file
        ]
        self._find_renamed()

    def _index(self) -> dict[str, str]:
        """File by tensor, where the checkpoint is in shards; a single file goes before them, as in transformers."""
        path = self.folder / "model.safetensors.index.json"
        if (self.folder / "model.safetensors").exists() or not path.exists():
            return {}
        index = _json(path).get("weight_map")
        if not isinstance(index, dict) or not all(Path(str(file)).name == file for file in index.values()):
            raise CheckpointError(f"{path} has no weight_map of files beside it")
        return index

    def _look_into(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata |= file.metadata() or {}
                self.places |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        with path.open("rb") as raw:  # the header's length, the header, and then the tensors, without a gap
            self.bytes += path.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")

    def _find_renamed(self) -> None:
        """Packed weights that the files call by other names than the model (transformers renames some) come last,
        under the files' names; the table's names are dropped for them."""
        found: dict[str, set[str]] = {}
        for key in self.places:
            if match := COMPONENT.fullmatch(key):
                found.setdefault(match["owner"] + match["attribute"], set()).add(match["part"])
        others = {name: parts for name, parts in found.items() if name not in self.table and "qdata" in parts}
        lost = [name for name in self.table if name not in found]
        if len(others) > len(lost):
            self.problems.append(f"{next(iter(others))} is not among the packed weights that config.json tells of")
        for name in lost[: len(others)]:
            del self.table[name]
        for name, parts in others.items():
            self.table[name] = Stored(SPARSE24 if "sparse_metadata" in parts else FP8, self.config.activation)

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The parts of one weight. Raises CheckpointError, with the part's name."""
        made = {}
        for part in PARTS[self.table[name].format]:
            key = component(name, part)
            if key not in self.places:
                raise CheckpointError(f"{key} is missing from the checkpoint")
            try:
                with safe_open(self.places[key], framework="pt") as file:
                    made[part] = file.get_tensor(key)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{key}: {error}") from error
        if made["qdata"].dim() != 2:
            raise CheckpointError(f"{component(name, 'qdata')} is {made['qdata'].dim()}-D, not 2-D")
        return made

    def report(self) -> tuple[dict[str, LayerReport], str]:
        """Lines of the conversion's report by layer, and where they come from: the checkpoint's files themselves, or
        else what `hwpq-fx compress` wrote beside them, which may outlive the weights. Raises CheckpointError."""
        if REPORT_METADATA in self.metadata:
            text, source = self.metadata[REPORT_METADATA], "the checkpoint"
        elif (path := self.folder / REPORT_FILE).exists():
            text, source = path.read_text(encoding="utf-8"), REPORT_FILE
        else:
            return {}, ""
        try:
            lines = [_line(line) for line in json.loads(text)["layers"]]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"the report in {source} cannot be read: {error}") from error
        return {line.name: line for line in lines}, source


def inspect_checkpoint(directory: str | os.PathLike[str]) -> Inspection:
    """Read and check every packed weight in `directory`, one after the other.

    What is wrong with a weight is said in its line. Raises CheckpointError where it is no checkpoint of this package,
    a file is missing or cannot be read, or the format is newer than this version.
    """
    checkpoint = Checkpoint(directory)
    lines, source = checkpoint.report()
    layers = [_layer(checkpoint, name, stored, lines) for name, stored in checkpoint.table.items()]
    found = {layer.name for layer in layers}
    layers += [_dense(line) for line in lines.values() if line.status == "dense" and line.name not in found]
    order = {name: place for place, name in enumerate(lines)}
    layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    rest = checkpoint.bytes - sum(layer.packed_bytes for layer in layers)
    return Inspection(layers, checkpoint.problems, rest, checkpoint.config, checkpoint.version, source)


def _layer(checkpoint: Checkpoint, name: str, stored: Stored, lines: dict[str, LayerReport]) -> InspectedLayer:
    layer = InspectedLayer(name.removesuffix(".weight"), (), stored.format)
    try:
        parts = checkpoint.parts(name)
    except CheckpointError as error:
        layer.problem = str(error)
        return layer
    qdata = parts["qdata"]
    rows, cols = qdata.shape
    cols *= 2 if stored.format == SPARSE24 else 1
    layer.shape = (rows, cols)
    for part, tensor in parts.items():
        setattr(layer, PART_OF[part], tensor.nbytes)
    layer.dense_bytes = rows * cols * (dtype_named(stored.dtype) if stored.dtype else checkpoint.dtype).itemsize
    try:
        join(name, parts, stored, (cols, rows) if stored.transposed else (rows, cols), checkpoint.dtype)
    except CheckpointError as error:
        layer.problem = str(error)
        return layer
    kept = int((qdata.view(torch.uint8) & 0x7F).count_nonzero())
    layer.zeros = 1 - kept / max(rows * cols, 1)
    if stored.format == SPARSE24:
        layer.patterns = pattern_shares(parts["sparse_metadata"])
    line = lines.get(layer.name)
    if line is not None and line.status == stored.format:
        layer.rows, layer.settled, layer.error = line.rows, line.settled, line.error
        layer.compensation = line.compensation
    return layer


def _line(line: dict[str, Any]) -> LayerReport:
    """A line of the report, its numbers being numbers. Raises ValueError, KeyError, TypeError or OverflowError."""
    shape = tuple(int(size) for size in line["shape"])
    numbers = {name: float(line[name]) for name in ("error", "settled")}
    if not all(isfinite(number) for number in numbers.values()):
        raise ValueError(f"{line['name']}: {numbers}")
    sizes = {name: int(line[name]) for name in ("rows", "dense_bytes")}
    return LayerReport(**line | {"shape": shape} | numbers | sizes)


def _dense(line: LayerReport) -> InspectedLayer:
    return InspectedLayer(line.name, line.shape, "dense", line.reason, dense_bytes=line.dense_bytes, rows=line.rows)


def pattern_shares(sparse_metadata: torch.Tensor) -> dict[str, float]:
    """Share of each of the six patterns in valid metadata, uint8 [N, K/8], by the indices kept: "01" to "23"."""
    counts = torch.bincount(sparse_metadata.flatten().int(), minlength=256).view(16, 16)
    nibbles = counts.sum(0) + counts.sum(1)
    return {name: nibbles[nibble].item() / max(2 * sparse_metadata.numel(), 1) for name, nibble in NAMES.items()}


def worst(layers: Iterable[InspectedLayer]) -> InspectedLayer | None:
    """The valid 2:4 layer with the largest error, the first one where none is known; None where there is none."""
    sparse = [layer for layer in layers if layer.patterns]
    return max(sparse, key=lambda layer: layer.error or 0.0, default=None)


def _json(path: Path) -> dict[str, Any]:
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(made, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return made
