"""Find the products with a 2-D weight in a graph of torch or aten calls: linear, addmm, mm, matmul."""

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten
LINEAR = {F.linear, torch._C._nn.linear, aten.linear.default}
MM = {torch.mm, torch.Tensor.mm, aten.mm.default}
MATMUL = {torch.matmul, operator.matmul, torch.Tensor.matmul, aten.matmul.default}
ADDMM = {torch.addmm, torch.Tensor.addmm, aten.addmm.default}
MATMUL_METHODS = {"matmul", "mm", "__matmul__"}


class Product(NamedTuple):
    """y = x @ weight (+ bias), or x @ weight.t() (+ bias) where `linear`."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    linear: bool


def value_of(node: fx.Node) -> object:
    """What Dynamo saw at this node: a fake tensor, a number, ... or None."""
    return node.meta.get("example_value")


def match(node: fx.Node) -> Product | None:
    """`node` as a product with a 2-D right operand, or None."""
    found = None
    arguments = list(node.args)
    if node.op == "call_function" and node.target in LINEAR:
        x, weight, bias = _named(node, "input", "weight", "bias")
        found = Product(node, x, weight, bias, True)
    elif node.op == "call_function" and node.target in MATMUL | MM:
        x, weight = _named(node, "input", "mat2" if node.target in MM else "other")
        found = Product(node, x, weight, None, False)
    elif node.op == "call_method" and node.target in MATMUL_METHODS and len(arguments) == 2:
        found = Product(node, arguments[0], arguments[1], None, False)
    elif (node.op == "call_function" and node.target in ADDMM) or (node.op == "call_method" and node.target == "addmm"):
        bias, x, weight = _named(node, "input", "mat1", "mat2")
        plain = node.kwargs.get("beta", 1) == 1 and node.kwargs.get("alpha", 1) == 1
        if plain and isinstance(bias, fx.Node) and _dim(bias) == 1:
            found = Product(node, x, weight, bias, False)
    if found is None or not isinstance(found.x, fx.Node) or not isinstance(found.weight, fx.Node):
        return None
    return found if _dim(found.weight) == 2 and (_dim(found.x) or 0) >= 1 else None


def products(graph: fx.Graph) -> Iterator[Product]:
    """Every product in the graph, in order."""
    for node in graph.nodes:
        if found := match(node):
            yield found


def _named(node: fx.Node, *names: str) -> list:
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in names]


def _dim(node: object) -> int | None:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None
