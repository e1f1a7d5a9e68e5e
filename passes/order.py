"""The order of rows: where batch and sequence of what a graph is given have changed places on the way to a product.

    %q = transpose(%x, 1, 0)                     x [B, L, K], q [L, B, K]
    %y = linear(%q, %w)                          sequence first
    %o = reshape(permute(%a, ...), [L * B, K])   a [B, H, L, K / H]
    %z = linear(%o, %v)                          sequence first, and no shape that tells

So does nn.MultiheadAttention(batch_first=True). The graph is followed on the numbers of the tokens in the place of
values, at the sizes it was traced with; a graph of which a size is fixed at 1 has but one order.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx

from .values import memory_of, op_name, value_of

# what moves rows about, by `op_name`; of anything else, a result of an input's leading shape is row by row from it
MOVES = {
    *("T", "H", "mT", "mH", "t", "transpose", "swapaxes", "swapdims", "permute", "adjoint", "movedim", "moveaxis"),
    *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
    *("getitem", "select", "slice", "narrow", "unbind", "chunk", "split", "split_with_sizes", "tensor_split"),
}


class _Tokens(NamedTuple):
    numbers: torch.Tensor
    """int32 [B, L], of an input of the graph, counted batch first."""
    value: Any
    """Of each entry of a node's value, the number of the token it is of; or a tuple of such tensors."""

    def sequence_first(self) -> bool:
        rows = self.value[..., 0].flatten()
        return rows.equal(self.numbers.t().flatten()) and not rows.equal(self.numbers.flatten())


def sequence_first(graph: fx.Graph, asked: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of the nodes whose rows are all the tokens of an input [B, L] or [B, L, ...] of the graph, in the order of
    [L, B]. What cannot be followed (rows chosen by the data, a graph break on the way) is not among them."""
    asked = set(asked)
    last = {one: node for node in graph.nodes for one in node.all_input_nodes}
    known: dict[fx.Node, _Tokens] = {}
    found = set()
    for node in graph.nodes:
        tokens = _given(node) if node.op == "placeholder" else _followed(node, known)
        if tokens is not None:
            known[node] = tokens
            if node in asked and tokens.sequence_first():
                found.add(node)
        for one in node.all_input_nodes:
            if last[one] is node:  # numbers are as large as activations where a reshape copied them
                known.pop(one, None)
    return found


def _given(node: fx.Node) -> _Tokens | None:
    sizes = _sizes(node)
    if sizes is None or len(sizes) < 2 or isinstance(value_of(node), torch.nn.Parameter):
        return None
    batch, length, *rest = sizes
    numbers = torch.arange(batch * length, dtype=torch.int32, device="cpu").view(batch, length)
    return _Tokens(numbers, numbers.view(batch, length, *[1] * len(rest)).expand(sizes))


def _followed(node: fx.Node, known: dict[fx.Node, _Tokens]) -> _Tokens | None:
    inputs = [known[one] for one in node.all_input_nodes if one in known]
    if not inputs:
        return None
    if op_name(node) in MOVES:
        return _moved(node, known)
    sizes = _sizes(node)
    for numbers, value in inputs:
        if sizes is None or isinstance(value, tuple):
            continue
        if value.shape == sizes:
            return _Tokens(numbers, value)
        if value.shape[:-1] == sizes[:-1]:
            return _Tokens(numbers, value[..., :1].expand(sizes))
        if value.shape == sizes[:-1]:  # an embedding
            return _Tokens(numbers, value.unsqueeze(-1).expand(sizes))
    return None


def _moved(node: fx.Node, known: dict[fx.Node, _Tokens]) -> _Tokens | None:
    first = node.all_input_nodes[0]
    if first is not node.args[0] or first not in known:
        return None
    if any(memory_of(one) is not None for one in node.all_input_nodes[1:]):  # rows chosen by the data
        return None
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda one: known[one].value if one is first else _hint(value_of(one))
    )
    target: Any = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
    if op_name(node) in ("view", "_unsafe_view"):  # the numbers may have other strides
        target = torch.Tensor.reshape
    try:
        moved = target(*args, **kwargs)
    except Exception:  # of a kind that was not thought of
        return None
    if isinstance(moved, torch.Tensor):
        return _Tokens(known[first].numbers, moved) if moved.shape == _sizes(node) else None
    return _Tokens(known[first].numbers, tuple(moved)) if isinstance(moved, (tuple, list)) else None


def _sizes(node: fx.Node) -> tuple[int, ...] | None:
    """Of a plain tensor that has rows, as the graph was traced."""
    if memory_of(node) is None:
        return None
    sizes = tuple(map(_hint, value_of(node).shape))
    return sizes if sizes and all(sizes) else None


def _hint(value: Any) -> Any:
    """The number that a symbolic size was traced with; None where it depends on data. Adds no guard."""
    return value.node.hint if isinstance(value, torch.SymInt) else value
