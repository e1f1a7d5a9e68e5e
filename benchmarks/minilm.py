"""How far 2:4 + FP8 moves MiniLM's sentence embeddings, method by method: `python benchmarks/minilm.py` writes
benchmarks/results/minilm.json.

all-MiniLM-L6-v2, pretrained, from the package of the demo extra. All 37 linear layers are pruned to 2:4 and packed,
activations become FP8 too; the methods are those of accuracy.py and see the same X^T X of the calibration sentences,
but for "in order", the library's own call. Agreement is the cosine of a held-out sentence's embedding with the dense
model's; seconds are medians of rounds in which every method has its turn.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import click
import torch
from accuracy import IN_ORDER, in_order
from methods import METHODS, dense_fp8, inputs_of, linears, pruned, where
from torch import nn

from hwpq_fx.minilm import MiniLM, embed, sentences

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "minilm.json", show_default=True)
def main(threads: int, device: str, out: Path) -> None:
    """Measure and write the JSON."""
    torch.set_num_threads(threads)
    minilm = MiniLM()
    model = minilm.model.to(device)
    calib, heldout = (
        [{what: tensor.to(device) for what, tensor in batch.items()} for batch in minilm.batches(sentences(name))]
        for name in ("calibration", "heldout")
    )
    expected = embed(model, heldout)

    def agreement(converted: nn.Module) -> dict[str, float]:
        cosine = (embed(converted, heldout) * expected).sum(1)
        return {"mean": cosine.mean().item(), "lowest": cosine.min().item()}

    inputs = inputs_of(model, calib)
    agreements: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in (*METHODS, IN_ORDER)}
    for _ in range(ROUNDS):
        for name in seconds:
            converted, taken = pruned(model, inputs, METHODS[name]) if name in METHODS else in_order(model, calib)
            seconds[name].append(taken)
            agreements[name] = agreement(converted)
            click.echo(f"{name}: {agreements[name]['mean']:.4f}, {taken:.2f} s")
    result: dict[str, Any] = {
        "what": "cosine of held-out sentences' embeddings with the dense model's; seconds of choosing and compensating",
        "model": {
            "name": "all-MiniLM-L6-v2",
            "layers": len(linears(model)),
            "calibration sentences": sum(len(batch["input_ids"]) for batch in calib),
            "calibration tokens": sum(int(batch["attention_mask"].sum()) for batch in calib),
            "held-out sentences": len(expected),
        },
        "machine": where(model.device),
        "dense FP8": {"agreement": agreement(dense_fp8(model))},
        "methods": {
            name: {"agreement": agreements[name], "seconds": statistics.median(taken)}
            for name, taken in seconds.items()
        },
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
