"""The merge pass: products of one input with several packed weights become one product with their rows.

before   %q = linear(%x, %wq, %bq)     %k = linear(%x, %wk, %bk)     %v = linear(%x, %wv, %bv)
after    %b = cat((%bq, %bk, %bv))                                   where there are biases
         %y = linear(%x, %merged_0, %b)                              %merged_0: a new input of the graph
         %q = %y[..., :Nq]     %k = %y[..., Nq : Nq + Nk]     %v = %y[..., Nq + Nk :]

`bound` gives the calls of the rewritten graph their new inputs. They are the memory of %wq, %wk and %wv themselves
(`kernels.adjoin`), looked up at every call: weights that were replaced, moved or loaded since are the ones used.
"""

import gc
import logging
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch._guards import TracingContext
from torch._subclasses import FakeTensor

from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.kernels.adjoin import HELD, joined, stacked, why_apart

from .products import Product, match, products
from .values import SOURCE, as_traced, copy_of, give_value, memory, op_name, rewritten, value_of

MERGE = "hwpq_merge"  # in the meta of a merged graph: its `Merge`
logger = logging.getLogger("hwpq_fx")

# what reads a tensor by its values, whatever its strides, and gives a tensor of its own
READERS = {
    *(
        "add",
        "sub",
        "mul",
        "truediv",
        "div",
        "neg",
        "pow",
        "maximum",
        "minimum",
        "where",
        "clamp",
        "abs",
        "sqrt",
        "rsqrt",
    ),
    *("silu", "gelu", "relu", "sigmoid", "tanh", "softmax", "exp", "square", "mean", "sum", "amax"),
    *("cat", "scaled_dot_product_attention"),
    *("size", "shape", "dim", "dtype", "device"),
}
# what gives a tensor of its own, or the same again where it is of that dtype already
CASTS = {"to", "float", "half", "bfloat16", "type_as"}
# what shows the memory of a tensor once more, or raises where its strides do not allow it
VIEWS = {"view", "reshape", "unflatten", "transpose", "permute", "unsqueeze", "getitem", "expand", "narrow"}


class Siblings(NamedTuple):
    """Weights that became one."""

    names: tuple[str, ...]
    """As modules call them."""
    places: tuple[int, ...]
    """Among the inputs of the graph before."""
    rows: tuple[int, ...]


class Merge(NamedTuple):
    """What the inputs of a merged graph are: those at the places in `kept` of the inputs before, then one weight for
    each of `merged`."""

    kept: tuple[int, ...]
    merged: tuple[Siblings, ...]


def merge(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Merge products in a copy of `gm`; `gm` itself where none can be. inputs: those of the graph, with the real
    weights, which are only looked at. What was merged stands in the meta of the result under `MERGE`."""
    graph = copy_of(gm)
    placeholders = graph.find_nodes(op="placeholder")
    place = {node: number for number, node in enumerate(placeholders)}

    groups = list(_groups(graph))
    reasons = _reasons([[inputs[place[product.weight]] for product in group] for group in groups])
    for group, reason in zip(groups, reasons, strict=True):
        if reason:
            logger.info("not merged, %s: %s", reason, ", ".join(_layer(product.weight) for product in group))
    groups = [group for group, reason in zip(groups, reasons, strict=True) if not reason]
    if not groups:
        return gm
    merged: dict[tuple[fx.Node, ...], fx.Node] = {}
    first = {group[0].node: group for group in groups}
    with as_traced(graph) as follow:
        for node in list(graph.nodes):
            follow(node)
            if node in first:
                group = first[node]
                weights = tuple(product.weight for product in group)
                if weights not in merged:
                    merged[weights] = _new_input(graph, f"merged_{len(merged)}", weights)
                with graph.inserting_before(node):
                    _write(graph, group, merged[weights])
    siblings = tuple(
        Siblings(tuple(map(_layer, weights)), tuple(place[one] for one in weights), tuple(map(_rows, weights)))
        for weights in merged
    )
    for weight in (weight for weights in merged for weight in weights if not weight.users):
        graph.erase_node(weight)
    kept = tuple(place[node] for node in graph.find_nodes(op="placeholder") if node in place)
    result = rewritten(gm, graph)
    result.meta[MERGE] = Merge(kept, siblings)
    for one in siblings:
        logger.debug("merged, rows %s: %s", one.rows, ", ".join(one.names))
    return result


def merged_of(gm: fx.GraphModule) -> tuple[Siblings, ...]:
    """What `merge` made one, in this graph or in what later passes made of it."""
    return gm.meta[MERGE].merged if MERGE in gm.meta else ()


def example_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Inputs to compile `gm` with: those of the graph before, and fake ones in place of the new, with static sizes,
    in the mode that the compiler traces with."""
    if MERGE not in gm.meta:
        return list(inputs)
    context = TracingContext.try_get()
    mode = context.fake_mode if context else None
    kept = gm.meta[MERGE].kept
    made = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")[len(kept) :]]
    return [*(inputs[place] for place in kept), *(_fake(one, mode) for one in made)]


def bound(
    compiled: Callable[..., Any], gm: fx.GraphModule, apart: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    """`compiled`, made of the merged `gm`, as a function of the inputs before. apart: makes the same unmerged, which is
    called where weights cannot be joined any more."""
    if MERGE not in gm.meta:
        return compiled
    kept, merged = gm.meta[MERGE]

    def call(*args: Any) -> Any:
        weights = []
        for siblings in merged:
            weight = joined([args[place] for place in siblings.places])
            if weight is None:
                logger.info("not merged in this call: %s", ", ".join(siblings.names))
                return apart()(*args)
            weights.append(weight)
        return compiled(*(args[place] for place in kept), *weights)

    return call


def _groups(graph: fx.Graph) -> Iterator[list[Product]]:
    """Products that multiply the same input alike, two or more, in order."""
    alike: dict[tuple, list[Product]] = {}
    for product in products(graph):
        if _plain(product):
            weight, out = value_of(product.weight), value_of(product.node)
            traits = (weight.activation, weight.dtype, weight.prepacked_for, out.dtype, out.requires_grad)
            bias = None if product.bias is None else value_of(product.bias).dtype
            alike.setdefault((product.x, product.epoch, *traits, bias), []).append(product)
    # a weight that is used again has to have the same siblings then: it can lie beside one only
    rows = {id(group): tuple(product.weight for product in group) for group in alike.values()}
    together = Counter(weight for weights in set(rows.values()) for weight in weights)
    for group in alike.values():
        if len(group) > 1 and all(together[weight] == 1 for weight in rows[id(group)]):
            yield group


def _plain(product: Product) -> bool:
    """Whether it is a linear of a packed weight and a bias, or none, that come in as they are, and that the graph
    only multiplies with."""
    weight, inputs = value_of(product.weight), [product.weight]
    if product.bias is not None:
        inputs.append(product.bias)
    return (
        product.linear
        and isinstance(weight, Float8Sparse24Tensor)
        and not weight.transposed
        and all(one.op == "placeholder" and all(match(user) for user in one.users) for one in inputs)
    )


def _reasons(groups: Sequence[Sequence[Any]]) -> list[str]:
    if any(isinstance(weight.qdata, FakeTensor) for weights in groups for weight in weights):
        return ["there are no real weights here"] * len(groups)
    if HELD in (reasons := [why_apart(weights) for weights in groups]):
        gc.collect()  # perhaps by what nobody can reach: torch 2.11 leaves copies of a converted weight in cycles
        reasons = [why_apart(weights) for weights in groups]
    return reasons


def _new_input(graph: fx.Graph, name: str, weights: Sequence[fx.Node]) -> fx.Node:
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["example_value"] = stacked([value_of(one) for one in weights], _empty_rows)
    # as a parameter, which CUDA graphs read where it lies
    node.meta["tensor_dict"] = dict(weights[0].meta.get("tensor_dict", {}))
    return node


def _empty_rows(column: Sequence[torch.Tensor]) -> torch.Tensor:
    return column[0].new_empty((sum(part.shape[0] for part in column), *column[0].shape[1:]))


def _write(graph: fx.Graph, group: Sequence[Product], weight: fx.Node) -> None:
    biases = [product.bias for product in group if product.bias is not None]
    bias = give_value(graph.call_function(torch.cat, (biases,))) if biases else None
    y = graph.call_function(F.linear, (group[0].x, weight, bias))
    y.meta |= {key: value for key, value in group[0].node.meta.items() if key != "example_value"}
    out = value_of(group[0].node)
    whole = out.new_empty((*out.shape[:-1], _rows(weight)))
    y.meta["example_value"] = whole.requires_grad_(out.requires_grad)
    start = 0
    for product in group:
        node, stop = product.node, start + _rows(product.weight)
        rows: Any = (Ellipsis, slice(start, stop))
        # the nodes stay, with their names and metadata, and whoever reads them need not change
        if _any_strides(node, whole[rows]):
            node.op, node.target, node.args = "call_function", operator.getitem, (y, rows)
        else:
            part = give_value(graph.call_function(operator.getitem, (y, rows)))
            node.op, node.target, node.args = "call_method", "contiguous", (part,)
        node.kwargs = {}
        start = stop


def _any_strides(node: fx.Node, value: torch.Tensor) -> bool:
    """Whether everything that reads `node` does the same for `value`, which has other strides."""
    return all(_reads_any_strides(user, node, value) for user in node.users)


def _reads_any_strides(user: fx.Node, node: fx.Node, value: torch.Tensor) -> bool:
    name = op_name(user)
    if name in READERS:
        return True
    if name not in VIEWS | CASTS:
        return False
    args, kwargs = fx.map_arg((user.args, user.kwargs), lambda one: value if one is node else value_of(one))
    target: Any = getattr(torch.Tensor, name) if user.op == "call_method" else user.target
    try:
        seen = target(*args, **kwargs)
    except (RuntimeError, ValueError):
        return False
    if memory(seen) != memory(value):
        return name in CASTS  # a reshape that copies is a view no more
    return _any_strides(user, seen)


def _fake(value: Any, mode: Any) -> Any:
    if mode is None:
        return value
    with mode:
        return stacked([value], lambda parts: torch.empty(parts[0].shape, dtype=parts[0].dtype, device=parts[0].device))


def _rows(weight: fx.Node) -> int:
    return value_of(weight).shape[0]


def _layer(weight: fx.Node) -> str:
    """The module's name, read from where Dynamo found the weight."""
    name = weight.meta.get(SOURCE, weight.name)
    path = re.findall(r"_(?:modules|parameters)\['(.+?)'\]", name)
    return ".".join(part for part in path if part != "_orig_mod").removesuffix(".weight") or name
