"""`hwpq-fx demo`: a real pretrained model, converted on this machine, and what it cost."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from .config import HWPQConfig
from .conversion import convert
from .kernels import Float8Sparse24Tensor
from .minilm import MiniLM, embed, sentences
from .report import Report, report

# Mean cosine of the held-out embeddings with the dense model's, by compensation. 2:4 without retraining costs this
# small model a lot: see "Limits" in README. Lower than this, something is broken.
FLOORS = {"none": 0.70, "energy": 0.72, "cg": 0.88}


@dataclass
class Sizes:
    """Bytes of a whole model."""

    disk: int
    memory: int


@dataclass
class DemoResult:
    """Everything the demo shows."""

    agreement_mean: float
    agreement_min: float
    floor: float
    sentences: int
    dense: Sizes
    converted: Sizes
    seconds: dict[str, float]
    report: Report

    @property
    def passed(self) -> bool:
        return self.agreement_mean >= self.floor

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def run_demo(config: HWPQConfig | None = None, progress: bool = True) -> DemoResult:
    """Load MiniLM, calibrate, convert, compile and compare embeddings of held-out sentences with the dense model's."""
    config = config or HWPQConfig()
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with phase("load"):
        minilm = MiniLM()
        calib, heldout = minilm.batches(sentences("calibration")), minilm.batches(sentences("heldout"))
    with phase("dense embeddings, eager"):
        expected = embed(minilm.model, heldout)
    dense = sizes(minilm.model)
    model = convert(torch.compile(minilm.model), calib, config, progress=progress)
    made = report(model)
    seconds |= made.seconds
    with phase("compile and first batch"):
        embed(model, heldout[:1])
    with phase("converted embeddings, compiled"):
        agreement = (embed(model, heldout) * expected).sum(1)
    return DemoResult(
        agreement_mean=agreement.mean().item(),
        agreement_min=agreement.min().item(),
        floor=FLOORS[config.compensation],
        sentences=len(agreement),
        dense=dense,
        converted=sizes(minilm.model),
        seconds=seconds,
        report=made,
    )


def sizes(model: nn.Module) -> Sizes:
    """What `torch.save(model.state_dict())` writes, and what the parameters and buffers hold in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        torch.save(model.state_dict(), path)
        disk = os.path.getsize(path)
    memory = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, Float8Sparse24Tensor):
            memory += tensor.packed_nbytes() + tensor.layout_nbytes()
        else:
            memory += tensor.nbytes
    return Sizes(disk, memory)


def show(result: DemoResult, console: Console) -> None:
    """Print the per-layer table, sizes, agreement and seconds."""
    console.print(result.report.table())
    table = Table(title="the whole model", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "dense", "converted", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for label, name in (("MiB on disk", "disk"), ("MiB in memory", "memory")):
        before, after = getattr(result.dense, name), getattr(result.converted, name)
        table.add_row(label, f"{before / 2**20:.1f}", f"{after / 2**20:.1f}", f"{after / before:.2f}")
    console.print(table)
    layout = result.report.total("layout_bytes")
    console.print(f"of it, {layout / 2**20:.1f} MiB are a dense layout for the CPU's products, never saved\n")
    for name, taken in result.seconds.items():
        console.print(f"{taken:7.1f} s  {name}", highlight=False)
    verdict = "[green]passed[/]" if result.passed else "[red]FAILED[/]"
    console.print(
        f"\nembeddings of {result.sentences} held-out sentences, cosine with the dense model's:\n"
        f"{result.agreement_mean:.4f} on average, {result.agreement_min:.4f} at worst; "
        f"floor {result.floor} on average: {verdict}"
    )
