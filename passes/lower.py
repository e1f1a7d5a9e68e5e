"""The lower pass: products with a packed weight become activation quantization and one custom op.

before   %y = linear(%x, %w, %b)                             %w: Float8Sparse24Tensor
after    %scale = clamp(div(float(amax(abs(%x))), 448))      once for each distinct %x
         %values = to(clamp(div(float(%x), %scale)), e4m3)
         %y = hwpq_fx.linear24(%values, %scale, %w.qdata, %w.sparse_metadata, %w.scale, %b, %w.dense, ...)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from hwpq_fx.kernels import Float8Sparse24Tensor, quantize_rows

from .products import Product, products
from .values import as_traced, give_value, value_of

LINEAR24 = torch.ops.hwpq_fx.linear24.default


def lower(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite every product with a packed weight in a copy of `gm`; `gm` itself where there is none.

    A product that the format cannot serve (a weight packed along the other side) stays as it is: the tensor
    subclass answers it by dequantizing.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    found = {product.node: product for product in products(graph) if _packed_along_input(product)}
    if not found:
        return gm
    inputs: dict[tuple, Input] = {}
    with as_traced(graph) as follow:
        for node in list(graph.nodes):
            follow(node)
            if node in found:
                with graph.inserting_before(node):
                    arguments = _arguments(graph, found[node], inputs)
                # the node itself stays, with its name and metadata, and whoever reads it need not change
                node.op, node.target, node.args, node.kwargs = "call_function", LINEAR24, arguments, {}
    lowered = fx.GraphModule(gm, graph)
    lowered.meta.update(gm.meta)
    graph.lint()
    return lowered


class Input(NamedTuple):
    """The activation as `linear24` takes it."""

    x: fx.Node
    scale: fx.Node | None
    x_grad: fx.Node | None


def _packed_along_input(product: Product) -> bool:
    weight = value_of(product.weight)
    return isinstance(weight, Float8Sparse24Tensor) and weight.transposed != product.linear


def _arguments(graph: fx.Graph, product: Product, inputs: dict[tuple, Input]) -> tuple:
    weight, out = value_of(product.weight), value_of(product.node)
    wants_grad = value_of(product.x).requires_grad and out.requires_grad
    # made at its first user's place, and shared by those to whom it is the same
    key = (product.x, product.epoch, out.dtype, weight.activation, wants_grad)
    if key not in inputs:
        inputs[key] = _input(graph, product.x, out.dtype, weight.activation, wants_grad)
    x, x_scale, x_grad = inputs[key]
    names = ["qdata", "sparse_metadata", "scale"]
    # a dense layout made for another dtype (autocast) does not fit an input that is not quantized
    if weight.dense is not None and (x_scale is not None or weight.dense.dtype == out.dtype):
        names.append("dense")
    parts = {name: give_value(graph.call_function(getattr, (product.weight, name))) for name in names}
    qdata, metadata, scale = (parts[name] for name in names[:3])
    return x, x_scale, qdata, metadata, scale, product.bias, parts.get("dense"), x_grad, out.dtype


def _input(graph: fx.Graph, x: fx.Node, dtype: torch.dtype, activation: str, wants_grad: bool) -> Input:
    if value_of(x).dtype != dtype:
        # under autocast a product casts its input; the custom op does not
        x = give_value(graph.call_method("to", (x, dtype)))
    if activation == "none":
        return Input(x, None, None)
    # gradients go straight through the rounding, by `x_grad`
    source = give_value(graph.call_method("detach", (x,))) if wants_grad else x
    values, scale = _inline(graph, quantize_rows, source)
    return Input(values, scale, x if wants_grad else None)


def _inline(graph: fx.Graph, function: Callable, x: fx.Node) -> Any:
    """Write the torch calls of `function` into the graph."""
    traced = fx.symbolic_trace(function).graph
    copied = {node: x for node in traced.nodes if node.op == "placeholder"}
    results = graph.graph_copy(traced, copied)
    for node, copy in copied.items():
        if node.op != "placeholder":
            give_value(copy)
    return results
