"""Dense FP8 layers, which plans and unstructured sparsity make, where a row is all zeros."""

import pytest
import torch
from torch import nn

from hwpq_fx import HWPQConfig, convert, plan, report
from hwpq_fx.float8 import dense_float8
from models import llama, tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("activation", ["dynamic", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_zeros_give_zeros(dtype, activation, compiled):
    torch.manual_seed(0)
    layer = nn.Linear(32, 64, bias=False).to(dtype)
    x = torch.randn(6, 32, dtype=dtype)
    with torch.no_grad():
        layer.weight[3] = 0
        x[2] = 0
        x[4] *= 2**-12
        exact = layer(x)
        layer.weight = nn.Parameter(dense_float8(layer.weight, activation), requires_grad=False)
        y = (torch.compile(layer) if compiled else layer)(x)
    assert (y[2] == 0).all() and (y[:, 3] == 0).all()
    assert layer.weight.dequantize()[3].abs().max() == 0
    # of every row by itself: a small one is not lost beside the others
    error = (y - exact).float().norm(dim=1) / exact.float().norm(dim=1)
    assert error[[0, 1, 3, 4, 5]].max() < 0.06


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "unstructured"])
def test_padding_tokens_are_zeros(planned):
    """Their keys and values go into every sum of attention, with a weight of zero."""
    model, batch = llama(), tokens(2, 12)
    model.model.embed_tokens.weight.data[0] = 0
    batch["input_ids"][1, :5] = 0
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    batch["attention_mask"][0] = 1
    if planned:
        made = plan(model, [batch])
        for layer in made.layers:
            layer.status = "fp8"
        convert(model, [batch], plan=made)
    else:
        convert(model, [batch], HWPQConfig(sparsity=0.5))
    assert all(line.status == "fp8" for line in report(model).converted)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def zeroed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[0].weight[3] = 0
    return model


def test_a_row_of_zeros_does_not_lift_the_bound():
    made = plan(zeroed(), [torch.randn(64, 64)], HWPQConfig(max_loss=0.1))
    assert made.error <= 0.1
    assert {layer.status for layer in made.layers} == {"fp8"}
