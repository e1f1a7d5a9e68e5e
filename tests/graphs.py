"""Running the graphs that passes made, and what Dynamo makes of an autocast region."""

import pytest
import torch
from torch import fx

from hwpq_fx.passes.values import value_of

BOTH_WAYS = pytest.mark.parametrize("inside", [True, False], ids=["region in the graph", "region around the call"])


def written(graph):
    """All that a pass could change in a graph, to be compared."""
    return [(node.name, node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


class Checked(fx.Interpreter):
    """Runs a graph and compares every tensor with what its metadata promised."""

    def __init__(self, gm):
        super().__init__(gm)
        self.known = {node: value_of(node) for node in gm.graph.nodes if node.op.startswith("call")}

    def __call__(self, *args):
        return self.run(*args)

    def run_node(self, node):
        result = super().run_node(node)
        if node in self.known and isinstance(result, torch.Tensor):
            promised = self.known[node]
            assert isinstance(promised, torch.Tensor), f"{node} carries no value"
            assert promised.dtype == result.dtype and promised.dim() == result.dim(), node
            assert promised.requires_grad == result.requires_grad, node
            sizes = [(a, b) for a, b in zip(promised.shape, result.shape, strict=True) if isinstance(a, int)]
            assert all(a == b for a, b in sizes), node
        return result


def autocast(model, x, backend, inside):
    """`model(x)` in bfloat16, compiled with the region in the graph or around the call, and eager."""

    def region(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    expected = region(x)
    if inside:
        return torch.compile(region, backend=backend)(x), expected
    compiled = torch.compile(model, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        return compiled(x), expected
