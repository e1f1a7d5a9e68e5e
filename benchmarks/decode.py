"""Decoding on the CPU, batch 1: `python benchmarks/decode.py` writes results/decode.json.

A LLaMA of random bfloat16 weights with a static cache, one token after the other: dense compiled, dense compiled and
frozen (Inductor lays its weights out for the products, and keeps both copies), and converted. All in turn in one
process, same threads. The converted ones' logits are checked against float64 first.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rounds import machine, rounds, summary
from torch._inductor import config as inductor_config
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import hwpq_fx
from hwpq_fx.kernels import Float8Sparse24Tensor, cpu24

RESULTS = Path(__file__).parent / "results"
DENSE, FROZEN = "dense, compiled", "dense, compiled and frozen"
LENGTH = 128
# what rounding to bfloat16, and to FP8, at the input of every layer may do to the logits
LIMITS = {"dynamic": 0.25, "none": 0.03}


def llama(hidden: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    """Random weights, bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def decoder(model: Any, config: LlamaConfig) -> Callable[[], torch.Tensor]:
    """A call that runs one token, at the next place of a static cache of `LENGTH`: logits [1, 1, vocabulary]."""
    cache = StaticCache(config=config, max_cache_len=LENGTH)
    place = 0

    def step() -> torch.Tensor:
        nonlocal place
        if place == LENGTH:
            cache.reset()
            place = 0
        at = torch.tensor([[place]])
        place += 1
        with torch.no_grad():
            return model(input_ids=at % config.vocab_size, position_ids=at, past_key_values=cache).logits

    return step


def frozen(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same, compiled with constant weights at the first call."""
    with inductor_config.patch(freezing=True):
        step()
        step()
    return step


def check(converted: Any, dense: LlamaForCausalLM, limit: float) -> float:
    """Error of the compiled converted model's logits, in norm over their norm, next to the dense model's in the same
    weights and float64 with no activation rounded. Raises where it is above `limit`; a wrong product gives above 1."""
    same = copy.deepcopy(dense).double()
    packed = dict(converted._orig_mod.named_parameters())
    with torch.no_grad():
        for name, parameter in same.named_parameters():
            if isinstance(packed[name], Float8Sparse24Tensor):
                parameter.copy_(packed[name].dequantize(torch.float64))
    got, want = decoder(converted, dense.config), decoder(same, dense.config)
    errors = [((got().double() - exact).norm() / exact.norm()).item() for exact in (want() for _ in range(3))]
    if max(errors) > limit:
        raise click.ClickException(f"converted logits are off by {max(errors)}: no speed is reported")
    return max(errors)


def contest(hidden: int, layers: int, vocabulary: int, runs: int) -> dict[str, Any]:
    """The sizes, what runs, and the times."""
    base = llama(hidden, layers, vocabulary)
    config = base.config
    steps = {DENSE: decoder(torch.compile(copy.deepcopy(base)), config)}
    steps[DENSE]()
    steps[FROZEN] = frozen(decoder(torch.compile(copy.deepcopy(base)), config))
    errors, reports = {}, {}
    for activation, limit in LIMITS.items():
        name = f"converted, activation {activation}"
        model = hwpq_fx.convert(
            torch.compile(copy.deepcopy(base)),
            [torch.randint(0, vocabulary, (1, LENGTH // 2))],
            hwpq_fx.HWPQConfig(activation=activation, compensation="none"),
        )
        errors[name] = check(model, base, limit)
        reports[name] = hwpq_fx.report(model)
        steps[name] = decoder(model, config)
    converted = reports[name].converted
    return {
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "of these converted": sum(line.shape[0] * line.shape[1] for line in converted),
        "why the packed weight is not read as it is": cpu24.why_not(0, torch.bfloat16, hidden, hidden),
        "relative error of logits against float64": errors,
        **summary(rounds(steps, runs, warmup=5), (DENSE, FROZEN)),
    }


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--hidden", default=1024, show_default=True)
@click.option("--layers", default=12, show_default=True)
@click.option("--vocabulary", default=32000, show_default=True)
@click.option("--runs", default=100, show_default=True, type=click.IntRange(2))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "decode.json", show_default=True)
def main(threads: int, hidden: int, layers: int, vocabulary: int, runs: int, out: Path) -> None:
    """Measure and write the JSON."""
    torch.set_num_threads(threads)
    result = {
        "what": f"one token of a random bfloat16 LLaMA, batch 1, static cache; medians of {runs} rounds",
        "machine": machine(),
        **contest(hidden, layers, vocabulary, runs),
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
