"""The Dynamo backend "hwpq": our passes, then the backend the user asked for (Inductor unless told otherwise)."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from .frozen import freeze
from .inline import inline_attention, inline_nested
from .lower import lower
from .merge import MERGE, bound, example_inputs, merge

Pass = Callable[..., fx.GraphModule]

# in order, each on a copy of the graph; `merge` is shown its inputs as well
PASSES: tuple[Pass, ...] = (inline_nested, inline_attention, merge, lower, freeze)


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], passes: Sequence[Pass] | None = None) -> fx.GraphModule:
    """What the passes (`PASSES` unless told otherwise) make of one of Dynamo's graphs."""
    for run in PASSES if passes is None else passes:
        gm = run(gm, inputs) if run is merge else run(gm)
    return gm


# what Dynamo asks of a backend beside the call: the inner one's answers hold
ASKED_OF_A_BACKEND = ("reset", "get_compiler_config", "backend_ctx_ctor")


class HwpqBackend:
    """Run `PASSES`, then `inner`: a backend's name or (gm, example_inputs) -> callable."""

    def __init__(self, inner: str | Callable[..., Any], passes: Sequence[Pass] | None = None):
        self.inner = torch._dynamo.lookup_backend(inner)
        self.passes = passes
        self.__name__ = "hwpq"

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        after = rewrite(gm, inputs, self.passes)
        if after is gm:
            return self.inner(gm, list(inputs))
        _as_from_dynamo(after, gm)

        @cache
        def unmerged() -> Callable[..., Any]:
            backend = HwpqBackend(self.inner, [run for run in PASSES if run is not merge])
            return torch.compile(gm, backend=backend)

        return bound(self.inner(after, example_inputs(after, inputs)), after, unmerged)

    def __eq__(self, other: object) -> bool:
        # models of a class whose backends are equal share what Dynamo compiled, and one count of recompiles
        return isinstance(other, HwpqBackend) and (self.inner, self.passes) == (other.inner, other.passes)

    __hash__ = None  # type: ignore[assignment]  # as torch's own: its Inductor wrapper compares, and has no hash

    def __getattr__(self, name: str) -> Any:
        if name in ASKED_OF_A_BACKEND:
            return getattr(self.inner, name)
        raise AttributeError(name)


def _as_from_dynamo(after: fx.GraphModule, gm: fx.GraphModule) -> None:
    """Give a rewritten graph what a copy of Dynamo's loses, and what AOTAutograd tells parameters by: without it CUDA
    graphs would copy every weight at every call. Tried on torch 2.11 and 2.13."""
    if not hasattr(gm, "_param_name_to_source"):
        return
    after._param_name_to_source = gm._param_name_to_source
    sources = [getattr(node, "_dynamo_source", None) for node in gm.graph.find_nodes(op="placeholder")]
    kept = after.meta[MERGE].kept if MERGE in after.meta else range(len(sources))
    nodes = after.graph.find_nodes(op="placeholder")
    for place, node in enumerate(nodes):
        node._dynamo_source = sources[kept[place]] if place < len(kept) else None


def hwpq(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="hwpq")`: Inductor behind our passes, with its usual `mode` and `options`."""
    settings = torch._inductor.list_mode_options(mode) if mode else {}

    def inductor(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        return torch._inductor.compile(graph, list(inputs), options=settings | (options or {}))

    return HwpqBackend(inductor)(gm, example_inputs)
