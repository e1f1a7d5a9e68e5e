"""Derivatives that torch.func and forward mode take of products with packed weights."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from hwpq_fx import HWPQConfig, convert
from hwpq_fx.kernels import quantize_rows

COMPILED = {"eager": lambda f: f, "inductor": torch.compile, "hwpq": lambda f: torch.compile(f, backend="hwpq")}


def mlp():
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).eval()


def pair(activation, layout="fastest"):
    """A converted model, and a dense one with its weights."""
    packed = convert(mlp(), None, HWPQConfig(activation=activation, layout=layout))
    dense = mlp()
    with torch.no_grad():
        for one, other in zip(dense.parameters(), packed.parameters(), strict=True):
            one.copy_(other.dequantize() if hasattr(other, "qdata") else other)
    return packed, dense


def total(model):
    return lambda x: model(x).square().sum()


TAKEN = {
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x.flip(0),))[1],
    "vjp": lambda model, x: torch.func.vjp(model, x)[1](x)[0],
    "jacfwd": lambda model, x: torch.func.jacfwd(model)(x[0]),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x[0]),
    "grad": lambda model, x: torch.func.grad(total(model))(x),
    "grad of each": lambda model, x: torch.vmap(torch.func.grad(total(model)))(x),
    "hessian": lambda model, x: torch.func.hessian(total(model))(x[0]),
}


@pytest.mark.parametrize(("how", "layout"), [*((how, "fastest") for how in COMPILED), ("eager", "packed")])
@pytest.mark.parametrize("taken", TAKEN)
def test_they_are_those_of_the_dense_weights(taken, how, layout):
    if taken == "jacrev" and how != "eager" and torch.__version__ < "2.12":
        pytest.skip("Inductor of torch 2.11 gives zeros, for dense layers as well")
    packed, dense = pair("none", layout)
    x = torch.randn(5, 16)
    found = COMPILED[how](lambda x: TAKEN[taken](packed, x))(x)
    torch.testing.assert_close(found, TAKEN[taken](dense, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", COMPILED)
def test_straight_through_the_rounding_of_activations(how):
    model = convert(nn.Sequential(nn.Linear(16, 24)).eval())
    x, v = torch.randn(5, 16), torch.randn(5, 16)
    weight, bias = model[0].weight.dequantize(), model[0].bias
    value, tangent = COMPILED[how](lambda x, v: torch.func.jvp(model, (x,), (v,)))(x, v)
    values, scale = quantize_rows(x)
    torch.testing.assert_close(value, values.float() * scale @ weight.t() + bias)
    torch.testing.assert_close(tangent, v @ weight.t())
    gradient = COMPILED[how](torch.func.grad(lambda x: model(x).sum()))(x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(5, -1))


@pytest.mark.parametrize("activation", ["dynamic", "none"])
def test_forward_mode(activation):
    model = convert(nn.Sequential(nn.Linear(16, 24)).eval(), None, HWPQConfig(activation=activation))
    x, v = torch.randn(5, 16), torch.randn(5, 16)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, v @ model[0].weight.dequantize().t())


def test_a_weight_that_shows_its_transpose():
    weight = convert(nn.Sequential(nn.Linear(16, 24)).eval(), None, HWPQConfig(activation="none"))[0].weight.t()
    x = torch.randn(5, 16)
    torch.testing.assert_close(torch.func.jacrev(lambda x: x @ weight)(x[0]), weight.dequantize().t())
