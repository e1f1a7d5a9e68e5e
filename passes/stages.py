"""The stages pass: an observed graph made ready to be run from observer to observer, with weights changed on the way.

    before   %v = t(%w)                          after   %_ = observer(%x, (%w,), (Use(...),))
             %_ = observer(%x, (%w,), ...)               %v = t(%w)
             %y = matmul(%x, %v)                         %y = matmul(%x, %v)
             %h = add(%r, %y)                            %h = add(%r, %y)       %r is a residual of %w

A stage is an observer: the weights whose products share its input. What a product's result is only added to, and what
was there before the stage, is called a residual of its weight.
"""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from .observe import OBSERVER, VIEWS, Observed, Use
from .products import products
from .values import memory_of, op_name, value_of, written

ADD = {"add", "iadd", "add_"}
# between a product and the sum; they keep what belongs to a row of the input together where the shape says so
TRANSPARENT = {"view", "reshape", "contiguous", "to", "dropout"}


class Stage(NamedTuple):
    """An observer's node; weights and residuals by the weight's place among the graph's inputs."""

    observer: fx.Node
    uses: dict[int, list[Use]]
    residuals: dict[int, tuple[fx.Node, ...]]
    autocast: bool
    """Whether the graph is inside an autocast region there."""
    sequence_first: bool
    """Of the input's rows, as the observer is told."""


class Staged(NamedTuple):
    gm: fx.GraphModule
    stages: list[Stage]
    last_uses: dict[fx.Node, list[fx.Node]]
    """By node, the values that no later node reads."""


def stages(observed: Observed) -> Staged:
    """Find the stages of the graph, in order, and put the views of their weights after the observer, in place."""
    gm = observed.gm
    graph = gm.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    place = {node: number for number, node in enumerate(placeholders)}
    observers = [node for node in graph.nodes if node.target == OBSERVER]
    times_seen = Counter(weight for node in observers for weight in set(node.args[1]))
    for node in observers:
        for weight in dict.fromkeys(node.args[1]):
            if times_seen[weight] == 1 and place[weight] not in observed.blocked:
                _put_views_after(node, weight)
    by_weight = defaultdict(list)
    for product in products(graph):
        by_weight[memory_of(product.weight)].append(product.node)
    order = {node: number for number, node in enumerate(graph.nodes)}
    found, regions = [], 0
    for node in graph.nodes:
        regions += (node.target is _enter_autocast) - (node.target is _exit_autocast)
        if node.target == OBSERVER:
            uses: dict[int, list[Use]] = {}
            residuals = {}
            for weight, use in zip(*node.args[1:], strict=True):
                uses.setdefault(place[weight], []).append(use)
                multiplied = by_weight[memory_of(weight)]
                residuals[place[weight]] = _residuals(multiplied[0], node, order) if len(multiplied) == 1 else ()
            found.append(Stage(node, uses, residuals, regions > 0, "sequence_first" in node.kwargs))
    graph.lint()
    gm.recompile()
    return Staged(gm, found, _last_uses(graph))


def _put_views_after(observer: fx.Node, weight: fx.Node) -> None:
    """The one observer of the weight speaks for it, so what reads the weight before is a view."""
    views, after = {weight}, observer
    for node in list(observer.graph.nodes):
        if node is observer:
            return
        if views & set(node.all_input_nodes) and node.target != OBSERVER:
            views.add(node)
            after.append(node)
            after = node


def _residuals(product: fx.Node, observer: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node, ...]:
    found, node = [], product
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) in ADD and len(user.args) == 2 and not user.kwargs:
            other = user.args[user.args[0] is node]
            if not isinstance(other, fx.Node) or _shape(other) != _shape(node):
                break
            if order[other] < order[observer] and not _written(other, observer, user):
                found.append(other)
            if op_name(user) != "add":  # others may read the sum under its first operand's name
                break
        elif not (op_name(user) in TRANSPARENT and user.args[0] is node) or _drops(user):
            break
        node = user
    return tuple(found)


def _shape(node: fx.Node) -> list[str] | None:
    value = value_of(node)
    # as text: comparing symbolic sizes would have Dynamo's shape environment decide on them
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else None


def _drops(node: fx.Node) -> bool:
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return op_name(node) == "dropout" and training is not False


def _written(value: fx.Node, start: fx.Node, stop: fx.Node) -> bool:
    """Whether a node between the two may write to the memory of `value`."""
    node = start.next
    while node is not stop:
        if memory_of(value) in written(node) and op_name(node) not in VIEWS | {OBSERVER}:
            return True
        node = node.next
    return False


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    last = {}
    for node in reversed(graph.nodes):
        last[node] = [one for one in node.all_input_nodes if one not in seen]
        seen.update(last[node])
    return last


class Steps(fx.Interpreter):
    """A run of a staged graph, from observer to observer. Without gradients; the arguments are its own to write to."""

    def __init__(self, staged: Staged, args: tuple[Any, ...]):
        super().__init__(staged.gm, garbage_collect_values=False)
        self._last_uses = staged.last_uses
        self._placeholders = [node for node in staged.gm.graph.nodes if node.op == "placeholder"]
        self.env = dict(zip(self._placeholders, args, strict=True))
        self._ahead = (node for node in staged.gm.graph.nodes if node.op != "placeholder")

    @torch.no_grad()
    def advance(self, stage: Stage) -> torch.Tensor:
        """Run all before this stage, later than those so far; the input that its observer is shown."""
        for node in self._ahead:
            if node is stage.observer:
                break
            if node.target != OBSERVER:
                value = self.run_node(node)
                if node.users:
                    self.env[node] = value
            for done in self._last_uses[node]:
                self.env.pop(done, None)
        return self.env[stage.observer.args[0]]  # type: ignore[index]

    def replace(self, place: int, weight: torch.Tensor) -> None:
        """From here on, `weight` is the input of the graph at `place`."""
        self.env[self._placeholders[place]] = weight

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # what the graph sets would outlive the step
        return None if target is torch._C._set_grad_enabled else super().call_function(target, args, kwargs)
