"""The observe pass: an observer node before every product with a parameter.

    before   %y = linear(%x, %w, %b)          %z = linear(%x, %v)
    after    %_ = observer(%x, (%w, %v), (Use(...), Use(...)))
             %y = linear(%x, %w, %b)          %z = linear(%x, %v)

One observer node for each distinct input, whoever shares it. The observer is handed the weights themselves, not
their names: Dynamo runs one graph for many modules of a class when graph breaks cut the model into pieces, and
only the call tells whose turn it is.
"""

from collections import defaultdict
from typing import NamedTuple, Protocol

import torch
from torch import fx
from torch._subclasses import FakeTensor

from .inline import inline_attention, inline_regions, may_hold_packed
from .order import sequence_first
from .products import on_the_left, products
from .values import copy_of, leaves, memory, memory_of, op_name, value_of

OBSERVER = "hwpq_observer"
# what a packed weight answers, by `op_name`, on the way from the parameter to its product
VIEWS = {
    *("T", "H", "mT", "mH", "t", "transpose", "swapaxes", "swapdims", "permute", "adjoint"),
    *("getitem", "slice", "narrow", "chunk", "split", "split_with_sizes", "tensor_split"),
    *("detach", "_get_data_attr", "contiguous", "to", "type_as", "float", "double", "half", "bfloat16"),
}
# how reasons begin: of other uses, of products
USED, MULTIPLIED = "also used by ", "multiplied "
OTHERWISE = MULTIPLIED + "through a view that is neither rows of it nor its transpose"


class Use(NamedTuple):
    """How a product reads a parameter: output rows start..stop of it, [N, K], or of its transpose where the
    parameter is kept as [K, N]."""

    transposed: bool
    start: int
    stop: int


class Recorder(Protocol):
    """What the observer nodes call. `tensors` are parameters, the objects the model holds."""

    def observe(
        self,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, ...],
        uses: tuple[Use, ...],
        sequence_first: bool = False,
    ) -> None: ...

    def block(self, weight: torch.Tensor, reason: str) -> None: ...


class _Observer(torch.nn.Module):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def forward(self, x, weights, uses, sequence_first=False):
        self.recorder.observe(x, weights, uses, sequence_first)


class Observed(NamedTuple):
    """The rewritten graph and, by place among its inputs, the parameters that no observer can speak for."""

    gm: fx.GraphModule
    blocked: dict[int, str]
    observers: int
    products: int


def observe(gm: fx.GraphModule, recorder: Recorder) -> Observed:
    """Insert observer nodes into a copy of `gm`, a Dynamo graph whose parameters are placeholders."""
    gm = inline_attention(inline_regions(gm, may_hold_packed))
    graph = copy_of(gm)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    owner = {memory_of(node): node for node in placeholders if _is_weight(node)}

    by_input: dict[tuple[fx.Node, int], list[tuple[fx.Node, Use, fx.Node]]] = {}
    served: set[tuple[fx.Node, fx.Node]] = set()
    otherwise: set[fx.Node] = set()
    for product in products(graph):
        weight = owner.get(memory_of(product.weight))
        if weight is None or memory_of(product.x) == memory_of(weight):
            continue
        if use := _use(weight, product.weight, product.linear):
            by_input.setdefault((product.x, product.epoch), []).append((weight, use, product.node))
            served.add((product.weight, product.node))
        else:
            otherwise.add(weight)

    turned = sequence_first(graph, {x for x, _ in by_input})
    observed = fx.GraphModule(gm, graph)
    observed.add_submodule(OBSERVER, _Observer(recorder))
    for (x, _), users in by_input.items():
        unique = dict.fromkeys((weight, use) for weight, use, _ in users)
        weights, uses = zip(*unique, strict=True)
        with graph.inserting_before(users[0][2]):
            graph.call_module(OBSERVER, (x, weights, uses), {"sequence_first": True} if x in turned else {})

    same_memory = defaultdict(list)
    for node in graph.nodes:
        same_memory[memory_of(node)].append(node)
    blocked = {}
    for place, weight in enumerate(placeholders):
        if _is_weight(weight) and (reason := _other_use(weight, same_memory[memory_of(weight)], served)):
            blocked[place] = OTHERWISE if weight in otherwise and reason.startswith(USED) else reason
    graph.lint()
    observed.recompile()
    return Observed(observed, blocked, len(by_input), len(served))


def _is_weight(node: fx.Node) -> bool:
    value = value_of(node)
    # a plain one: whatever else a parameter may be (quantized by someone else) is not ours to read
    plain = isinstance(value, torch.nn.Parameter) and isinstance(value, FakeTensor)
    return plain and value.dim() == 2 and value.is_floating_point()


def _use(weight: fx.Node, view: fx.Node, linear: bool) -> Use | None:
    """Which rows of the parameter the product reads through `view`."""
    rows, cols = value_of(weight).shape
    if not (seen := _rows(weight, value_of(view))):
        return None
    turned, start, stop = seen
    if linear != turned:
        return Use(False, start, stop)
    # the parameter is kept as [K, N]; a part of its rows would cut K
    return Use(True, 0, cols) if stop - start == rows else None


def _rows(weight: fx.Node, seen: torch.Tensor) -> tuple[bool, int, int] | None:
    """Whether a view shows the parameter transposed, and which rows of it; told by the strides and the offset."""
    base = value_of(weight)
    rows, cols = base.shape
    turned = seen.stride() == (1, cols) and seen.shape[0] == cols and cols > 1
    straight = seen.stride() == (cols, 1) and seen.shape[1] == cols
    first = seen.storage_offset() - base.storage_offset()
    if base.stride() != (cols, 1) or not (turned or straight):
        return None
    start, stop = first // cols, first // cols + seen.shape[1 if turned else 0]
    return (turned, start, stop) if 0 <= start <= stop <= rows else None


def _other_use(weight: fx.Node, same_memory: list[fx.Node], served: set[tuple[fx.Node, fx.Node]]) -> str | None:
    """Why an observer cannot speak for this parameter: the first use that is not a product it serves."""
    if not value_of(weight).is_contiguous():
        return "not contiguous in memory: give it memory of its own, weight.data = weight.data.contiguous()"
    others = [node for node in same_memory if node.op == "placeholder" and node is not weight]
    apart = [other for other in others if not _overlap(value_of(weight), value_of(other))]
    if any(_is_weight(other) for other in others if other not in apart):
        return "shares its memory with another parameter"
    if apart:
        return "in one buffer with another parameter: give it memory of its own, weight.data = weight.data.clone()"
    for node in same_memory:
        for user in node.users:
            if user.target == OBSERVER or (node, user) in served or _is_view(weight, user):
                continue
            if on_the_left(node, user):
                return f"{MULTIPLIED}by {op_name(user)} on its left (W @ x)"
            return f"{USED}{op_name(user)}, which is not a product with a 2-D weight"
    return None


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous views of one storage have numbers in common."""
    if one.dtype != other.dtype or not other.is_contiguous():
        return True  # not looked into
    starts = one.storage_offset(), other.storage_offset()
    return starts[0] < starts[1] + other.numel() and starts[1] < starts[0] + one.numel()


def _is_view(weight: fx.Node, user: fx.Node) -> bool:
    seen = list(leaves(value_of(user)))
    if op_name(user) not in VIEWS or not seen:
        return False
    return all(memory(view) == memory_of(weight) and _rows(weight, view) for view in seen)
