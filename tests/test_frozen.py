"""Dense FP8 layers in models of which something could still be trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphs import Checked, written
from hwpq_fx import HWPQConfig, convert, plan
from hwpq_fx.float8 import dense_float8
from hwpq_fx.passes import HwpqBackend
from hwpq_fx.passes.frozen import freeze, frozen_linear
from models import llama, tokens

ACTIVATIONS = pytest.mark.parametrize("activation", ["dynamic", "none"])


def model_of(activation="dynamic"):
    """An FP8 layer, with a bias that can be trained, between layers that can."""
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    model[1].weight = nn.Parameter(dense_float8(model[1].weight.detach(), activation), requires_grad=False)
    return model


def plain_of(model):
    weight = model[1].weight.dequantize()
    return lambda x: model[3](model[2](F.linear(model[0](x), weight, model[1].bias)))


class Frozen:
    """A Dynamo backend that runs the graph after the pass and keeps both."""

    def __call__(self, gm, _):
        self.before, self.after = gm, freeze(gm)
        return Checked(self.after)


@ACTIVATIONS
@pytest.mark.parametrize("shape", [(2, 5, 48), (48,)], ids=str)
def test_gradients_are_those_of_the_dequantized_weight(activation, shape):
    model, x = model_of(activation), torch.randn(shape)
    plain_of(model)(x).square().sum().backward()
    wanted = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    model.zero_grad()
    y = torch.compile(model, backend=HwpqBackend("inductor"))(x)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=0.02, atol=0.02)
    y.square().sum().backward()
    assert len(wanted) == 5
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert error < (0.1 if activation == "dynamic" else 1e-5), name


def test_only_where_a_gradient_is_wanted():
    model, x, backend = model_of(), torch.randn(5, 48), Frozen()
    torch.compile(model, backend=backend)(x)
    targets = [node.target for node in backend.after.graph.nodes if node.op == "call_function"]
    assert targets.count(frozen_linear) == 1 and sum(target is not frozen_linear for target in targets) == 3
    assert written(backend.before.graph) != written(backend.after.graph)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    assert backend.after is backend.before
    torch._dynamo.reset()
    dense = nn.Linear(48, 8)
    torch.compile(dense, backend=backend)(x)
    assert backend.after is backend.before


@pytest.mark.parametrize("kind", ["unstructured", "planned"])
def test_converted_models_run_with_gradients_on(kind):
    batch, model = tokens(), llama()
    if kind == "unstructured":
        config, chosen = HWPQConfig(sparsity=0.5), None
    else:
        config = HWPQConfig(max_loss=10.0)
        chosen = plan(model, [batch], config)
        for layer in chosen.layers[::2]:
            layer.status = "fp8"
    model = convert(torch.compile(model), [batch], config, plan=chosen)
    with torch.no_grad():
        wanted = model(**batch).logits
    made = model(**batch).logits
    assert made.requires_grad
    torch.testing.assert_close(made, wanted, rtol=0.02, atol=0.02)
