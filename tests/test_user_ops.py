"""Ops that users bring: what they write to, and that a name alone says nothing about them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hwpq_fx
from hwpq_fx.passes import stages
from hwpq_fx.passes.observe import observe
from hwpq_fx.passes.products import products

K = 64


@torch.library.custom_op("hwpq_fx_tests::bump", mutates_args={"x"})
def bump(x: torch.Tensor) -> torch.Tensor:
    x.mul_(3)
    return x.sum(-1, keepdim=True)


@bump.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], 1)


@torch.library.custom_op("hwpq_fx_tests::silu", mutates_args=())
def silu(x: torch.Tensor) -> torch.Tensor:
    assert x.is_contiguous(), "eager torch never gives it a strided tensor"
    return F.silu(x)


@silu.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("hwpq_fx_tests::add", mutates_args=())
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y


@add.register_fake
def _(x, y):
    return torch.empty_like(x)


@torch._dynamo.allow_in_graph
@functools.wraps(torch.mul)
def mul(x, y):
    assert x.is_contiguous(), "eager torch never gives it a strided tensor"
    return x * y


@torch._dynamo.allow_in_graph
def bump_in_graph(x):
    x.mul_(3)
    return x.sum(-1, keepdim=True)


class Nobody:
    def observe(self, x, weights, uses):
        pass

    def block(self, weight, reason):
        pass


class Twice(nn.Module):
    """Two layers of one input, and what comes between."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
        self.written = forward
        self.eval()

    def forward(self, x):
        return self.written(self, x)


def between(op):
    def forward(self, x):
        x = x + 0
        a = self.a(x)
        return torch.cat((a, op(x), self.b(x)), -1)

    return forward


WRITES = {"custom op": bump, "its packet": torch.ops.hwpq_fx_tests.bump, "allowed in the graph": bump_in_graph}
READS = {"custom op": silu, "torch": F.silu, "aten": torch.ops.aten.silu.default, "its packet": torch.ops.aten.silu}


@pytest.mark.parametrize(
    ("op", "differ"), [*((op, True) for op in WRITES.values()), *((op, False) for op in READS.values())]
)
def test_the_input_is_another_one_after_an_op_that_writes_to_it(op, differ):
    epochs = []

    def backend(gm, _):
        epochs.extend(product.epoch for product in products(gm.graph))
        return gm

    with torch.no_grad():
        torch.compile(Twice(between(op)), backend=backend)(torch.randn(8, K))
    assert (epochs[0] != epochs[1]) == differ


@pytest.mark.parametrize("activation", ["dynamic", "none"])
@pytest.mark.parametrize("name", WRITES)
def test_layers_on_both_sides_of_a_write(name, activation):
    model, x = Twice(between(WRITES[name])), torch.randn(8, K)
    hwpq_fx.convert(model, [x], hwpq_fx.HWPQConfig(activation=activation))
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend=hwpq_fx.passes.HwpqBackend("eager"))
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    "op", [silu, torch.ops.hwpq_fx_tests.silu, lambda x: mul(x, x)], ids=["custom op", "packet", "allowed in the graph"]
)
def test_a_merged_part_is_contiguous_for_an_op_that_bears_a_name_of_torch(op):
    model, x = Twice(lambda self, x: op(self.a(x)) * self.b(x)), torch.randn(8, K)
    hwpq_fx.convert(model, [x])
    assert [graph.merged for graph in hwpq_fx.explain(model, x).graphs] != [()]
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend=hwpq_fx.passes.HwpqBackend("eager"))
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    ("op", "residuals"),
    [
        (lambda self, x, y: x + y, 1),
        (lambda self, x, y: add(y, x), 0),
        (lambda self, x, y: x + silu(y), 0),
        (lambda self, x, y: x + (bump(x), y)[1], 0),
    ],
    ids=["torch's add", "an op named add", "through an op", "written to"],
)
def test_residuals_of_a_product(op, residuals):
    found = []

    def forward(self, x):
        x = x + 0
        return op(self, x, self.b(torch.relu(self.a(x))))

    def backend(gm, _):
        found.extend(stages(observe(gm, Nobody())).stages)
        return gm

    with torch.no_grad():
        torch.compile(Twice(forward), backend=backend)(torch.randn(2, 4, K))
    _, second = found
    (known,) = second.residuals.values()
    assert len(known) == residuals
