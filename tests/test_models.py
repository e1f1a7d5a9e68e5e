"""Every promised architecture, from the dense model to compiled packed weights."""

import copy

import pytest
import torch
from torch import nn

import hwpq_fx
from hwpq_fx.layers import stacked_of
from models import MODELS, call, dequantized


@pytest.mark.parametrize("name", MODELS)
def test_converted_model_matches_dequantized_weights(name):
    build, batch_of, expected = MODELS[name]
    model = build()
    batches = [batch_of(2, 12), batch_of(3, 9), batch_of(1, 5)]
    before = call(model, batches[0])
    given = torch.compile(model)
    # without FP8 activations the two must agree to rounding
    converted = hwpq_fx.convert(given, batches, hwpq_fx.HWPQConfig(activation="none"))
    assert converted is given
    report = hwpq_fx.report(converted)
    assert len(report.converted) == expected, str(report)
    reference = call(dequantized(model), batches[0])
    eager = copy.deepcopy(model)  # torch drops compiled calls from copies
    for one in (converted, eager):
        torch.testing.assert_close(call(one, batches[0]), reference, rtol=1e-4, atol=1e-5)
    assert (reference - before).abs().max() > 1e-4, "conversion changed nothing"


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder"])
def test_fp8_activations_compiled_equal_eager(name):
    build, batch_of, _ = MODELS[name]
    model = build()
    batches = [batch_of(2, 12)]
    converted = hwpq_fx.convert(torch.compile(model), batches)
    eager = copy.deepcopy(model)  # torch drops compiled calls from copies
    assert eager._compiled_call_impl is None
    torch.testing.assert_close(call(converted, batches[0]), call(eager, batches[0]), rtol=2e-2, atol=2e-2)
    # FP8 activations move the outputs by per cents, not more
    reference = call(dequantized(model), batches[0])
    error = (call(converted, batches[0]) - reference).norm() / reference.norm()
    assert 1e-4 < error < 0.1


def test_expert_weights_are_named_in_the_report():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    again = copy.deepcopy(model)
    hwpq_fx.convert(model, [MODELS["llama"][1](2, 12)])
    lines = {line.name: line for line in hwpq_fx.report(model).layers}
    experts = [line for line in lines.values() if "matrix per expert" in line.reason]
    assert len(experts) == 2 and all(line.status == "dense" and line.shape[0] == 4 for line in experts)
    # their router has little to give and much to lose
    router = lines["model.layers.0.mlp.gate"]
    assert router.status == "dense" and "chooses among experts" in router.reason
    # but for whom asks for it
    hwpq_fx.convert(again, [MODELS["llama"][1](2, 12)], hwpq_fx.HWPQConfig(targets=["mlp.gate"]))
    assert [line.name for line in hwpq_fx.report(again).converted] == ["model.layers.0.mlp.gate"]


class _Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4, 8, 8))
        self.scale, self.row, self.column, self.single = (
            nn.Parameter(torch.ones(shape)) for shape in ((4, 1, 1), (4, 1, 8), (4, 8, 1), (1, 8, 8))
        )


def test_scales_per_head_are_no_matrices():
    assert [name for name, _ in stacked_of(_Heads())] == ["gate"]
