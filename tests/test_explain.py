"""`explain`: what the passes make of a model's graphs, and nothing changed by looking."""

import copy

import pytest
import torch
from torch import nn

import hwpq_fx
from hwpq_fx.passes.dynamo import unwrap

K = 16


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(K, K) for _ in range(3))

    def forward(self, x):
        return self.o(torch.relu(self.q(x) * self.k(x)))


@pytest.fixture
def x():
    return torch.randn(4, K)


def converted(x, compiled=False, **config):
    model = Net().eval()
    given = torch.compile(model, backend="eager") if compiled else model
    return hwpq_fx.convert(given, [x], hwpq_fx.HWPQConfig(**config))


@pytest.mark.parametrize("compiled", [False, True])
def test_counts_of_a_converted_model(compiled, x):
    model = converted(x, compiled)
    explanation = hwpq_fx.explain(model, x)
    (graph,) = explanation.graphs
    assert graph.counts_before["linear"] == 3 and graph.counts_before["hwpq_fx.linear24"] == 0
    assert graph.counts_after["linear"] == 0 and graph.counts_after["hwpq_fx.linear24"] == 2
    assert graph.counts_after["amax"] == 2
    assert explanation.rewritten == 2
    assert [(one.names, one.rows) for one in graph.merged] == [(("q", "k"), (K, K))]
    graph.after.graph.lint()


def test_counts_of_an_unconverted_model(x):
    explanation = hwpq_fx.explain(Net().eval(), x)
    (graph,) = explanation.graphs
    assert explanation.rewritten == 0 and graph.counts_before == graph.counts_after and not graph.merged
    assert graph.counts_before["linear"] == 3
    assert "unchanged" in str(explanation)


def test_reads_as_code_under_what_changed(x):
    text = str(hwpq_fx.explain(converted(x), x))
    assert text.startswith("1 graph(s), 2 product(s) on packed weights")
    assert (
        "linear 3 -> 0" in text
        and "hwpq_fx.linear24 0 -> 2" in text
        and "merged: q, k" in text
        and "amax 0 -> 2" in text
    )
    before, after = text.split("after\n")
    assert before.count("torch._C._nn.linear(") == 3 and "linear24(" not in before
    assert after.count("torch.ops.hwpq_fx.linear24.default(") == 2 and "_nn.linear(" not in after


def test_a_graph_for_each_piece(x):
    class Broken(Net):
        def forward(self, x):
            x = self.q(x)
            torch._dynamo.graph_break()
            return self.o(x)

    model = hwpq_fx.convert(Broken().eval(), [x])
    explanation = hwpq_fx.explain(model, x)
    assert [graph.counts_after["hwpq_fx.linear24"] for graph in explanation.graphs] == [1, 1]
    assert explanation.rewritten == 2 and "graph 1:" in str(explanation)


@pytest.mark.parametrize("kind", ["plain", "compiled", "unconverted"])
def test_the_model_is_as_it_was(kind, x):
    model = Net().eval() if kind == "unconverted" else converted(x, kind == "compiled")
    inner = unwrap(model)
    with torch.no_grad():
        before = model(x)
        state = copy.deepcopy(inner.state_dict())
        attributes, outer = dict(inner.__dict__), dict(model.__dict__)
        parameters = {name: id(parameter) for name, parameter in inner.named_parameters()}
        assert hwpq_fx.explain(model, x).graphs
        assert dict(inner.__dict__) == attributes and dict(model.__dict__) == outer
        assert {name: id(parameter) for name, parameter in inner.named_parameters()} == parameters
        assert inner.state_dict().keys() == state.keys()
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_examples_of_every_kind(x):
    model = converted(x)
    for example in (x, (x,), [x], {"x": x}):
        assert hwpq_fx.explain(model, example).rewritten == 2
    with pytest.raises(TypeError, match="example is int"):
        hwpq_fx.explain(model, 3)


def test_what_is_no_module(x):
    for model in (lambda x: x, torch.compile(lambda x: x), converted(x).forward):
        with pytest.raises(TypeError, match=r"model is \w+: an nn.Module or torch.compile\(module\) is wanted"):
            hwpq_fx.explain(model, x)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_example_that_the_model_refuses(compiled, x):
    model = converted(x, compiled)
    with torch.no_grad():
        before = model(x)
        with pytest.raises(Exception, match=r"shape|channels|fit"):
            hwpq_fx.explain(model, torch.randn(4, 3))
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert hwpq_fx.explain(model, x).rewritten == 2


def test_shows_inference(x):
    explanation = hwpq_fx.explain(converted(x), x.requires_grad_())
    assert explanation.rewritten == 2 and explanation.graphs[0].counts_after["detach"] == 0


def test_without_fp8_activations(x):
    explanation = hwpq_fx.explain(converted(x, activation="none"), x)
    assert explanation.rewritten == 2 and explanation.graphs[0].counts_after["amax"] == 0


def test_of_a_prepared_model_it_is_not_calibration(x):
    model = hwpq_fx.prepare(Net().eval())
    hwpq_fx.explain(model, x)
    with pytest.raises(hwpq_fx.CalibrationError, match="no batch"):
        hwpq_fx.convert(model)
