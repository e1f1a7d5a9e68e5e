"""The observe pass: an observer node before every product with a parameter.

    before   %y = linear(%x, %w, %b)          %z = linear(%x, %v)
    after    %_ = observer(%x, (%w, %v), (Use(...), Use(...)))
             %y = linear(%x, %w, %b)          %z = linear(%x, %v)

One observer node for each distinct input, whoever shares it. The observer is handed the weights themselves, not
their names: Dynamo runs one graph for many modules of a class when graph breaks cut the model into pieces, and
only the call tells whose turn it is.
"""

from typing import NamedTuple, Protocol

import torch
from torch import fx

from .inline import inline_attention
from .products import match, value_of

OBSERVER = "hwpq_observer"


class Use(NamedTuple):
    """How a product reads a parameter: output rows start..stop of it, [N, K], or of its transpose where the
    parameter is kept as [K, N]."""

    transposed: bool
    start: int
    stop: int


class Recorder(Protocol):
    """What the observer nodes call. `tensors` are parameters, the objects the model holds."""

    def observe(self, x: torch.Tensor, weights: tuple[torch.Tensor, ...], uses: tuple[Use, ...]) -> None: ...

    def block(self, weight: torch.Tensor, reason: str) -> None: ...


class _Observer(torch.nn.Module):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def forward(self, x, weights, uses):
        self.recorder.observe(x, weights, uses)


class Observed(NamedTuple):
    """The rewritten graph and, by place among its inputs, the parameters that no observer can speak for."""

    gm: fx.GraphModule
    blocked: dict[int, str]
    observers: int
    products: int


def observe(gm: fx.GraphModule, recorder: Recorder) -> Observed:
    """Insert observer nodes into a copy of `gm`, a Dynamo graph whose parameters are placeholders."""
    gm = inline_attention(gm)
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    owner = {_storage(node): node for node in placeholders if _is_weight(node)}

    by_input: dict[fx.Node, list[tuple[fx.Node, Use, fx.Node]]] = {}
    served: set[tuple[fx.Node, fx.Node]] = set()
    for node in list(graph.nodes):
        product = match(node)
        weight = owner.get(_storage(product.weight)) if product else None
        if product is None or weight is None or _storage(product.x) == _storage(weight):
            continue
        if use := _use(weight, product.weight, product.linear):
            by_input.setdefault(product.x, []).append((weight, use, node))
            served.add((product.weight, node))

    root = torch.nn.Module()
    for name in {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}:
        _attach(root, name, gm)
    root.add_module(OBSERVER, _Observer(recorder))
    for x, users in by_input.items():
        unique = dict.fromkeys((weight, use) for weight, use, _ in users)
        weights, uses = zip(*unique, strict=True)
        with graph.inserting_before(users[0][2]):
            graph.call_module(OBSERVER, (x, weights, uses))

    blocked = {}
    for place, weight in enumerate(placeholders):
        if _is_weight(weight) and (reason := _other_use(graph, weight, served)):
            blocked[place] = reason
    observed = fx.GraphModule(root, graph)
    graph.lint()
    return Observed(observed, blocked, len(by_input), len(served))


def _is_weight(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.nn.Parameter) and value.dim() == 2 and value.is_floating_point()


def _storage(node: fx.Node) -> int | None:
    """Identity of the memory behind a node's fake tensor, which views share."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:  # inside vmap a tensor is a wrapper without memory of its own
        return None


def _use(weight: fx.Node, view: fx.Node, linear: bool) -> Use | None:
    """Which rows of the parameter the product reads through `view`, told by the view's strides and offset."""
    base, seen = value_of(weight), value_of(view)
    assert isinstance(base, torch.Tensor) and isinstance(seen, torch.Tensor)
    rows, cols = base.shape
    if base.stride() != (cols, 1):
        return None
    flipped = not linear  # whether `seen` is [K, N]
    if seen.stride() == (1, cols) and seen.shape[0] == cols and cols > 1:
        flipped, first, count = not flipped, seen.storage_offset() - base.storage_offset(), seen.shape[1]
    elif seen.stride() == (cols, 1) and seen.shape[1] == cols:
        first, count = seen.storage_offset() - base.storage_offset(), seen.shape[0]
    else:
        return None
    if first % cols:
        return None
    # `flipped` now tells whether the parameter itself is kept as [K, N]; then a slice of it would cut K
    if flipped:
        return Use(True, 0, cols) if count == rows else None
    return Use(False, first // cols, first // cols + count)


def _other_use(graph: fx.Graph, weight: fx.Node, served: set[tuple[fx.Node, fx.Node]]) -> str | None:
    """Why an observer cannot speak for this parameter: the first use that is not a product it serves."""
    storage = _storage(weight)
    for node in graph.nodes:
        if _storage(node) != storage:
            continue
        for user in node.users:
            value = value_of(user)
            is_view = isinstance(value, torch.Tensor) and _storage(user) == storage
            is_list_of_views = isinstance(value, (tuple, list)) and all(isinstance(v, torch.Tensor) for v in value)
            is_metadata = value is not None and not isinstance(value, (torch.Tensor, tuple, list))
            if user.target == OBSERVER or (node, user) in served or is_view or is_list_of_views or is_metadata:
                continue
            target = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", user.target)
            return f"also used by {target}, which is not a product with a 2-D weight"
    return None


def _attach(root: torch.nn.Module, name: str, source: torch.nn.Module) -> None:
    """Give `root` what `source` has under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        source = getattr(source, part)
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    setattr(root, last, getattr(source, last))
