"""The lower pass: products with a packed weight become activation quantization and one custom op.

before   %y = linear(%x, %w, %b)                             %w: Float8Sparse24Tensor
after    %scale = clamp(div(float(amax(abs(%x))), 448))      once for each distinct %x
         %values = to(clamp(div(float(%x), %scale)), e4m3)
         %y = hwpq_fx.linear24(%values, %scale, %w.qdata, %w.sparse_metadata, %w.scale, %b, %w.prepacked, ...)

On a GPU, where the number of rows is known, what runs is fixed here: a path that wants no FP8 activation gets none,
and an op that Inductor can see through stands in the graph itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from hwpq_fx.kernels import Float8Sparse24Tensor, quantize_rows
from hwpq_fx.kernels.packed_products import fits_hp
from hwpq_fx.kernels.paths import EITHER, HP, Path, chosen, target_of
from hwpq_fx.kernels.transforms import is_transformed

from .products import Product, products
from .values import as_traced, copy_of, give_value, rewritten, value_of

LINEAR24 = torch.ops.hwpq_fx.linear24.default


def lower(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite every product with a packed weight in a copy of `gm`; `gm` itself where there is none.

    A product that the format cannot serve (a weight packed along the other side) stays as it is: the tensor
    subclass answers it by dequantizing.
    """
    graph = copy_of(gm)
    found = {product.node: product for product in products(graph) if _packed_along_input(product)}
    if not found:
        return gm
    inputs: dict[tuple, Input] = {}
    with as_traced(graph) as follow:
        for node in list(graph.nodes):
            follow(node)
            if node in found:
                with graph.inserting_before(node):
                    _write(graph, found[node], inputs)
    return rewritten(gm, graph)


class Input(NamedTuple):
    """The activation as `linear24` takes it."""

    x: fx.Node
    scale: fx.Node | None
    x_hp: fx.Node | None


def _packed_along_input(product: Product) -> bool:
    weight, x = value_of(product.weight), value_of(product.x)
    # inside torch.func's transforms the weight answers itself: the op has no derivative that they see
    packed = isinstance(weight, Float8Sparse24Tensor) and not is_transformed(x)
    return packed and weight.transposed != product.linear


def _write(graph: fx.Graph, product: Product, inputs: dict[tuple, Input]) -> None:
    """Turn the product's node into the op. The node itself stays, with its name and metadata: whoever reads it need
    not change."""
    weight, out = value_of(product.weight), value_of(product.node)
    wants_grad = value_of(product.x).requires_grad and out.requires_grad
    path = _fixed_path(value_of(product.x), weight, out.dtype)
    fp8 = weight.activation == "dynamic" and (path is None or path.fp8)
    # which forms of x the op is given: both where only the run will tell how many rows there are
    keeps_hp = fp8 and (wants_grad or (path is None and target_of(weight.device) is not None))
    # made at its first user's place, and shared by those to whom it is the same
    key = (product.x, product.epoch, out.dtype, fp8, keeps_hp, wants_grad)
    if key not in inputs:
        inputs[key] = _input(graph, product.x, out.dtype, fp8, keeps_hp, wants_grad)
    x, x_scale, x_hp = inputs[key]
    names = ["qdata", "sparse_metadata", "scale"]
    if weight.prepacked is not None and (fp8 or fits_hp(weight, out.dtype)):
        names.append("prepacked")
    parts = {name: give_value(graph.call_function(getattr, (product.weight, name))) for name in names}
    prepacked = parts.pop("prepacked", None)
    node = product.node
    if path is not None and path.inline is not None and not out.requires_grad:
        rows = give_value(graph.call_method("reshape", (x, (-1, value_of(x).shape[-1]))))
        row_scale = None if x_scale is None else give_value(graph.call_method("reshape", (x_scale, (-1, 1))))
        y = _inline(graph, path.inline, rows, row_scale, *parts.values(), product.bias, prepacked, out.dtype)
        node.op, node.target, node.args, node.kwargs = "call_method", "view", (y, tuple(out.shape)), {}
        return
    name = weight.prepacked_for if prepacked is not None else ""
    arguments = (x, x_scale, *parts.values(), product.bias, prepacked, x_hp, out.dtype, name)
    node.op, node.target, node.args, node.kwargs = "call_function", LINEAR24, arguments, {}


def _fixed_path(x: torch.Tensor, weight: Float8Sparse24Tensor, dtype: torch.dtype) -> Path | None:
    """What a GPU will run, where the number of rows is known already."""
    target = target_of(weight.device)
    if target is None or any(type(size) is not int for size in x.shape):
        return None
    activation = EITHER if weight.activation == "dynamic" else HP
    return chosen(target, x, weight.qdata.shape[0], dtype, activation, weight.prepacked_for)


def _input(graph: fx.Graph, x: fx.Node, dtype: torch.dtype, fp8: bool, keeps_hp: bool, wants_grad: bool) -> Input:
    if value_of(x).dtype != dtype:
        # under autocast a product casts its input; the custom op does not
        x = give_value(graph.call_method("to", (x, dtype)))
    if not fp8:
        return Input(x, None, None)
    # gradients go straight through the rounding, by `x_hp`
    source = give_value(graph.call_method("detach", (x,))) if wants_grad else x
    values, scale = _inline(graph, quantize_rows, source)
    return Input(values, scale, x if keeps_hp else None)


def _inline(graph: fx.Graph, function: Callable, *args: Any) -> Any:
    """Write the torch calls that `function` makes of `args` into the graph."""
    nodes = [arg for arg in args if isinstance(arg, fx.Node)]
    traced, made = fx.Graph(), {}
    tracer = fx.proxy.GraphAppendingTracer(traced)
    for node in nodes:
        made[node] = traced.placeholder(node.name)
    proxies = [fx.Proxy(made[arg], tracer) if isinstance(arg, fx.Node) else arg for arg in args]
    traced.output(fx.map_arg(_unwrapped(function(*proxies)), lambda node: node))
    copied = {made[node]: node for node in nodes}
    results = graph.graph_copy(traced, copied)
    for node, copy in copied.items():
        if node.op != "placeholder":
            give_value(copy)
    return results


def _unwrapped(result: Any) -> Any:
    return tuple(one.node for one in result) if isinstance(result, tuple) else result.node
