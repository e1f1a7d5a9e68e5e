"""The lower pass: products with a packed weight become activation quantization and one custom op.

before   %y = linear(%x, %w, %b)                             %w: Float8Sparse24Tensor
after    %scale = clamp(div(float(amax(abs(%x))), 448))      once for each distinct %x
         %values = to(clamp(div(float(%x), %scale)), e4m3)
         %y = hwpq_fx.linear24(%values, %scale, %w.qdata, %w.sparse_metadata, %w.scale, %b, %w.dense, ...)
"""

import torch
from torch import fx

from hwpq_fx.kernels import Float8Sparse24Tensor, quantize_rows

from .products import Product, match, value_of

# what may stand between a weight and its product, and is left over once the product is gone
VIEWS = {"t", "transpose", "permute", torch.t, torch.transpose, torch.permute, getattr}
LINEAR24 = torch.ops.hwpq_fx.linear24.default


def lower(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite every product with a packed weight in a copy of `gm`; `gm` itself where there is none.

    A product that the format cannot serve (a weight packed along the other side) stays as it is: the tensor
    subclass answers it by dequantizing.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    quantized: dict[tuple[fx.Node, torch.dtype], tuple[fx.Node, fx.Node]] = {}
    rewritten = 0
    for node in list(graph.nodes):
        # matched one by one: the x of this product may be a product that was just replaced
        product = match(node)
        if product is None or not _packed_along_input(product):
            continue
        with graph.inserting_before(node):
            y = _lowered(graph, product, quantized)
        y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        rewritten += 1
    if not rewritten:
        return gm
    graph.eliminate_dead_code(is_impure_node=lambda node: node.target not in VIEWS)
    lowered = fx.GraphModule(gm, graph)
    lowered.meta.update(gm.meta)
    graph.lint()
    return lowered


def _packed_along_input(product: Product) -> bool:
    weight = value_of(product.weight)
    return isinstance(weight, Float8Sparse24Tensor) and weight.transposed != product.linear


def _lowered(graph: fx.Graph, product: Product, quantized: dict) -> fx.Node:
    weight, out = value_of(product.weight), value_of(product.node)
    x = _in_dtype(graph, product.x, out.dtype)
    values, scale, x_grad = x, None, None
    if weight.activation == "dynamic":
        # the quantized x is shared, but by the first user's place in the graph: that one comes first
        key = (product.x, out.dtype)
        wants_grad = torch.is_grad_enabled() and value_of(product.x).requires_grad
        if key not in quantized:
            # gradients go straight through the rounding, by `x_grad`
            quantized[key] = _inline(graph, quantize_rows, graph.call_method("detach", (x,)) if wants_grad else x)
        values, scale = quantized[key]
        x_grad = x if wants_grad else None
    parts = [graph.call_function(getattr, (product.weight, name)) for name in ("qdata", "sparse_metadata", "scale")]
    dense = None
    if weight.dense is not None and (scale is not None or weight.dense.dtype == out.dtype):
        dense = graph.call_function(getattr, (product.weight, "dense"))
    return graph.call_function(LINEAR24, (values, scale, *parts, product.bias, dense, x_grad, out.dtype))


def _in_dtype(graph: fx.Graph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Under autocast a product casts its input; the custom op does not."""
    return x if value_of(x).dtype == dtype else graph.call_method("to", (x, dtype))


def _inline(graph: fx.Graph, function, x: fx.Node):
    """Write the torch calls of `function` into the graph."""
    traced = fx.symbolic_trace(function).graph
    (argument,) = [node for node in traced.nodes if node.op == "placeholder"]
    return graph.graph_copy(traced, {argument: x})
