"""`explain`: the graphs of a model before and after our passes, to read."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hwpq_fx.passes import Siblings, merged_of, rewrite
from hwpq_fx.passes.dynamo import Observation
from hwpq_fx.passes.undo import undone_after

from .calibration import as_call
from .layers import module_of


@dataclass
class GraphChange:
    """One of Dynamo's graphs, before and after."""

    before: fx.GraphModule
    after: fx.GraphModule

    @property
    def counts_before(self) -> Counter[str]:
        return op_counts(self.before)

    @property
    def counts_after(self) -> Counter[str]:
        return op_counts(self.after)

    @property
    def merged(self) -> tuple[Siblings, ...]:
        """Layers that share their input and run as one product."""
        return merged_of(self.after)


@dataclass
class Explanation:
    """Every graph that one call of the model makes. Prints as code with a line of what changed above each."""

    graphs: list[GraphChange] = field(default_factory=list)

    @property
    def rewritten(self) -> int:
        """Products with packed weights, those that were merged counted as one."""
        return sum(graph.counts_after["hwpq_fx.linear24"] for graph in self.graphs)

    def __str__(self) -> str:
        parts = [f"{len(self.graphs)} graph(s), {self.rewritten} product(s) on packed weights"]
        for number, graph in enumerate(self.graphs):
            before, after = graph.counts_before, graph.counts_after
            changed = [f"{op} {before[op]} -> {after[op]}" for op in sorted(before | after) if before[op] != after[op]]
            parts.append(f"graph {number}: {', '.join(changed) or 'unchanged'}")
            parts.extend(f"merged: {', '.join(siblings.names)}" for siblings in graph.merged)
            parts.append("before\n" + graph.before.print_readable(print_output=False).strip())
            parts.append("after\n" + graph.after.print_readable(print_output=False).strip())
        return "\n\n".join(parts)


def op_counts(gm: fx.GraphModule) -> Counter[str]:
    """How often each operation stands in a graph, by its short name."""
    return Counter(
        _name(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method", "call_module")
    )


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def explain(model: Callable[..., Any], example: Any) -> Explanation:
    """Trace one call of `model` and show what our passes make of its graphs.

    example: a batch as for `convert`: a tensor, a tuple of arguments or a mapping. Runs the model once, eagerly, and
    leaves it as it was; what Dynamo had compiled for its class is compiled again at the next call. Raises TypeError for
    what is no module.
    """
    explanation = Explanation()

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
        explanation.graphs.append(GraphChange(gm, rewrite(gm, example_inputs)))
        return gm

    module_of(model)
    args, kwargs = as_call(example, "example")
    observation = Observation(model, collect, lambda *_: None)
    with undone_after(observation.remove), torch.no_grad():
        model(*args, **kwargs)
    return explanation
