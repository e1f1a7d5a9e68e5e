"""benchmarks/quantizers.py at a small size: every contender quantizes what it says, the file tells who could not."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from models import llama

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ENERGY, CG, FP8 = "ours, 2:4 + FP8, energy", "ours, 2:4 + FP8, cg", "ours, FP8 alone"
GPTQ, AWQ = "GPTQ, int8, without its two CUDA lines", "AWQ, int8"
RUN = {ENERGY, CG, FP8, GPTQ, AWQ, "AWQ, int4 in groups of 32, bfloat16", "SmoothQuant, int8, activations too"}
REFUSED = {"GPTQ, int8", "GPTQ, int4"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quantizers")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama()


TOKENS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


def first_error(script, model: nn.Module, made: nn.Module) -> float:
    """Of the first layer's output on the calibration tokens: its input is the same whatever the others became."""
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    hook.remove()
    with torch.no_grad():
        return (made.model.layers[0].self_attn.q_proj(seen[0]) - layer(seen[0])).norm().item()


def test_every_contender_quantizes_all_but_the_head(script, model):
    contenders = script.OURS | script.THEIRS
    assert contenders.keys() == RUN | REFUSED
    dense = logits(model)
    bounds = {"2:4": 0.8, "FP8": 0.1, "int4": 0.2, "int8": 0.05}
    for name in RUN:
        made, seconds = script.quantized(model, TOKENS.split(4), contenders[name])
        bound = next(bound for what, bound in bounds.items() if what in name)
        error = ((logits(made) - dense).norm() / dense.norm()).item()
        assert 1e-4 < error < bound, (name, error)
        kinds = {type(layer.weight) for layer in script.linears(made).values()}
        assert len(kinds) == 1 and nn.Parameter not in kinds, (name, kinds)
        assert type(made.lm_head.weight) is nn.Parameter
        assert min(seconds) > 0 and seconds[2] == pytest.approx(seconds[0] + seconds[1])
    assert torch.equal(logits(model), dense)


def test_calibration_reaches_the_contenders(script, model):
    """On the tokens they saw, those that fit their weights do better than those that only round or rescale."""
    from torchao.quantization import Int8WeightOnlyConfig

    rounding = script.torchaos(lambda base_config, step: base_config, Int8WeightOnlyConfig, "")
    rounding = rounding._replace(prepare=lambda model: None)
    error = {
        name: first_error(script, model, script.quantized(model, TOKENS.split(4), contender)[0])
        for name, contender in {**script.OURS, **script.THEIRS, "rounding": rounding}.items()
        if name in (GPTQ, AWQ, ENERGY, CG, "rounding")
    }
    assert error[GPTQ] < 0.95 * error["rounding"]
    assert error[AWQ] <= error["rounding"]
    assert error[CG] < 0.9 * error[ENERGY]


def _check(script, content: dict) -> None:
    refused = content["not run"]
    assert "CUDA" in refused["GPTQ, int8"] and refused.keys() == REFUSED
    assert ("CUDA" if find_spec("mslk") else "mslk") in refused["GPTQ, int4"]
    theirs = RUN - {ENERGY, CG, FP8}
    assert content["perplexity"].keys() == {"dense"} | RUN
    for phase in script.PHASES:
        lines = content[phase]
        assert lines.keys() == RUN
        for name in (ENERGY, CG, FP8):
            assert lines[name]["ms"] > 0 and all(lines[name][f"{one} / this"]["median"] > 0 for one in theirs)
    assert content[script.DENSE]["ms"] > 0


def test_measure_reports_every_contender(script, model):
    content = script.measure(model, TOKENS, TOKENS, runs=2, progress=lambda line: None)
    _check(script, content)


def test_a_layer_left_as_it_was_is_an_error(script):
    """Ours, where the format cannot hold 84 input channels."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    odd = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=84, num_hidden_layers=1, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(odd).eval()
    with pytest.raises(RuntimeError, match=r"energy leaves 1 layers as they were: model\.layers\.0\.mlp\.down_proj"):
        script.measure(model, TOKENS, TOKENS, runs=2, progress=lambda line: None)


def test_the_file_in_results(script):
    content = json.loads((BENCHMARKS / "results" / "quantizers.json").read_text())
    _check(script, content)
    assert {"cpu", "threads", "torch", "torchao"} <= content["machine"].keys()
    dense = content["perplexity"]["dense"]
    assert all(0.99 * dense < one < 1.5 * dense for one in content["perplexity"].values())
