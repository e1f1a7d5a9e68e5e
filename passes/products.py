"""Find the products with a 2-D weight in a graph of torch or aten calls: linear, addmm, mm, matmul."""

import operator
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from hwpq_fx.kernels.transforms import is_transformed

from .values import memory_of, value_of, written

aten = torch.ops.aten
LINEAR = {F.linear, torch._C._nn.linear, aten.linear}
MM = {torch.mm, aten.mm, "mm"}
MATMUL = {torch.matmul, torch.linalg.matmul, operator.matmul, operator.imatmul, aten.matmul, "matmul", "__matmul__"}
ADDMM = {torch.addmm, aten.addmm, "addmm"}


class Product(NamedTuple):
    """y = x @ weight (+ bias), or x @ weight.t() (+ bias) where `linear`."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    linear: bool
    epoch: int = 0
    """How often x may have been written to before: two products read the same input only in the same epoch."""


def match(node: fx.Node) -> Product | None:
    """`node` as a product with a 2-D right operand and a 1-D bias or none, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = getattr(node.target, "overloadpacket", node.target)
    bias, linear = None, target in LINEAR
    if linear:
        x, weight, bias, *others = _arguments(node, "input", "weight", "bias")
    elif target in MM or target in MATMUL:
        x, weight, *others = _arguments(node, "input", "mat2" if target in MM else "other")
    elif target in ADDMM:
        bias, x, weight, beta, alpha, *others = _arguments(node, "input", "mat1", "mat2", "beta", "alpha")
        if bias is None or beta not in (None, 1) or alpha not in (None, 1):
            return None
    else:
        return None
    if any(other is not None for other in others):  # out=, out_dtype=
        return None
    weight_shape, x_shape = _shape(weight), _shape(x)
    if weight_shape is None or len(weight_shape) != 2 or not x_shape:
        return None
    if bias is not None and _shape(bias) != (weight_shape[:1] if linear else weight_shape[1:]):
        return None
    return Product(node, x, weight, bias, linear)


def on_the_left(weight: fx.Node, user: fx.Node) -> bool:
    """Whether `user` is weight @ something."""
    target = getattr(user.target, "overloadpacket", user.target)
    return (target in MM or target in MATMUL) and bool(user.args) and user.args[0] is weight


def products(graph: fx.Graph) -> Iterator[Product]:
    """Every product in the graph, in order."""
    touched: Counter[int | None] = Counter()
    for node in graph.nodes:
        if found := match(node):
            yield found._replace(epoch=touched[memory_of(found.x)])
        else:
            touched.update(written(node))


def _arguments(node: fx.Node, *names: str) -> list:
    """The arguments under these names, in order, and then those beyond."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [*(given.pop(name, None) for name in names), *given.values(), *node.args[len(names) :]]


def _shape(node: object) -> torch.Size | None:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, torch.Tensor) and not is_transformed(value) else None
