"""The Dynamo backend "hwpq": our passes, then the backend the user asked for (Inductor unless told otherwise)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .inline import inline_attention
from .lower import lower

Pass = Callable[[fx.GraphModule], fx.GraphModule]

# in order, each on a copy of the graph
PASSES: tuple[Pass, ...] = (inline_attention, lower)


# what Dynamo asks of a backend beside the call: the inner one's answers hold
ASKED_OF_A_BACKEND = ("reset", "get_compiler_config", "backend_ctx_ctor")


class HwpqBackend:
    """Run `PASSES`, then `inner`: a backend's name or (gm, example_inputs) -> callable."""

    def __init__(self, inner: str | Callable[..., Any]):
        self.inner = torch._dynamo.lookup_backend(inner)
        self.__name__ = "hwpq"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        for run in PASSES:
            gm = run(gm)
        return self.inner(gm, list(example_inputs))

    def __eq__(self, other: object) -> bool:
        # models of a class whose backends are equal share what Dynamo compiled, and one count of recompiles
        return isinstance(other, HwpqBackend) and self.inner == other.inner

    __hash__ = None  # type: ignore[assignment]  # as torch's own: its Inductor wrapper compares, and has no hash

    def __getattr__(self, name: str) -> Any:
        if name in ASKED_OF_A_BACKEND:
            return getattr(self.inner, name)
        raise AttributeError(name)


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
