"""Dynamo's graphs: copies of them, and the fake value that a node of theirs carries in `meta["example_value"]`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from hwpq_fx.kernels.transforms import is_transformed

SOURCE = "hwpq_fx_source"


def copy_of(gm: fx.GraphModule) -> fx.Graph:
    """A copy of a Dynamo graph, to be changed.

    Dynamo takes its weak references to the real inputs off its own graph when it is done. On a copy they would live on,
    and `model.to(...)` can put no other tensor in the place of one that has any: the copy keeps the name of where an
    input was found, in `meta[SOURCE]`, in their place. Tried on torch 2.11 and 2.13.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.find_nodes(op="placeholder"):
        if (known := node.meta.pop("grapharg", None)) is not None:
            node.meta[SOURCE] = known.source.name
    return graph


def rewritten(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """`gm` with `graph`, which is checked, in place of its own."""
    result = fx.GraphModule(gm, graph)
    result.meta.update(gm.meta)
    graph.lint()
    return result


def value_of(node: fx.Node) -> Any:
    """A fake tensor, a number, a tuple of these, ... or None."""
    return node.meta.get("example_value")


def memory_of(node: fx.Node) -> int | None:
    """Identity of the memory behind a node's tensor, which its views share."""
    return memory(value_of(node))


def memory(value: object) -> int | None:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not is_transformed(value)
    return value.untyped_storage()._cdata if plain else None  # type: ignore[attr-defined]


def give_value(node: fx.Node) -> fx.Node:
    """Run a new node on the values of its arguments (inside `as_traced`), so that later passes know it like others."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    if node.op == "call_method":
        node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    elif callable(node.target):
        node.meta["example_value"] = node.target(*args, **kwargs)
    return node


def leaves(value: Any) -> Iterator[Any]:
    """What a node gives, one by one: the parts of a tuple or list, or the value itself; nothing for None."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    elif value is not None:
        yield value


def op_name(node: fx.Node) -> str:
    """The short name of what a node does, the same for function, method and aten op; for an attribute, its name. What
    is not torch's own has its namespace or module before it: mylib.silu may be anything."""
    if node.target is getattr:
        return str(node.args[1])
    target = getattr(node.target, "overloadpacket", node.target)
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", str(target))
    return name if _is_torchs(target) or isinstance(target, HigherOrderOperator) else f"{_home(target)}.{name}"


def written(node: fx.Node) -> set[int | None]:
    """The memory that a node may write to: what it takes and gives back (what only shows it once more counts too), or
    all that it takes: where it gives nothing, where its schema marks an argument, and where it is not torch's own."""
    inputs = {memory(part) for one in node.all_input_nodes for part in leaves(value_of(one))}
    target, value = node.target, value_of(node)
    if value is None:
        return inputs
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        if _marks_a_written(target, node.kwargs):
            return inputs
    elif node.op == "call_function" and not _is_torchs(target):
        return inputs
    return inputs & {memory(part) for part in leaves(value)}


def _marks_a_written(op: OpOverload | OpOverloadPacket, given: dict[str, Any]) -> bool:
    overloads = [op] if isinstance(op, OpOverload) else [getattr(op, name) for name in op.overloads()]
    arguments = (argument for overload in overloads for argument in overload._schema.arguments)
    return any(
        argument.alias_info is not None
        and argument.alias_info.is_write
        and (not argument.kwarg_only or argument.name in given)  # out=
        for argument in arguments
    )


def _is_torchs(target: Any) -> bool:
    """Whether a function or op is torch's or Python's own, and not one that only bears the name."""
    home = _home(target)
    if isinstance(target, OpOverloadPacket):
        return home in ("aten", "prims")
    if home.split(".")[0] not in ("torch", "_operator", "math", "builtins"):
        return False
    # functools.wraps copies the names
    return isinstance(target, BuiltinFunctionType) or getattr(sys.modules.get(home), target.__name__, None) is target


def _home(target: Any) -> str:
    """An op's namespace, a function's module."""
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name.split("::")[0]
    return getattr(target, "__module__", None) or ""


@contextmanager
def as_traced(graph: fx.Graph) -> Iterator[Callable[[fx.Node], None]]:
    """Run nodes as Dynamo did, on fake tensors. Call what is yielded with every node of the graph in turn: autocast
    and grad mode are then as the graph sets them there."""
    regions: dict[fx.Node, Any] = {}

    def follow(node: fx.Node) -> None:
        if node.target is torch._C._set_grad_enabled:
            torch._C._set_grad_enabled(*node.args)
        elif node.target is _enter_autocast:
            regions[node] = _enter_autocast(*node.args)
        elif node.target is _exit_autocast:
            _exit_autocast(regions.pop(node.args[0]))  # type: ignore[arg-type]

    with ExitStack() as stack:
        # Dynamo's own mode: torch knows another one by now, for the backend
        fakes = (value for value in map(value_of, graph.nodes) if isinstance(value, FakeTensor))
        stack.enter_context(next((fake.fake_mode for fake in fakes), nullcontext()))
        # without it, composite ops in C++ take symbolic sizes for the numbers they stand for
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        stack.callback(lambda: [_exit_autocast(mode) for mode in reversed(regions.values())])
        yield follow
