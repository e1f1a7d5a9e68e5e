"""The inline passes: what Dynamo keeps as one node becomes what it does, so that the products inside can be seen.

`F.multi_head_attention_forward` becomes its aten ops:

before   %y = multi_head_attention_forward(%q, %k, %v, ..., %in_proj_weight, ..., %out_proj_weight, ...)
after    %s = split_with_sizes(%in_proj_weight, [64, 128])     %a = linear(%q, %s[0])     ...
         %y = linear(%o, %out_proj_weight, %out_proj_bias)

A region of `torch.utils.checkpoint` or `nested_compile_region`, becomes its body:

before   %y = invoke_subgraph(%subgraph_0, "subgraph_0", %x, %w, %b)[0]
after    %a = linear(%x, %w, %b)     %y = relu(%a)
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

from hwpq_fx.kernels import Float8Sparse24Tensor

from .values import as_traced, copy_of, give_value, rewritten, value_of

ATTENTION: Any = F.multi_head_attention_forward
CHECKPOINT, NESTED = torch.ops.higher_order.tag_activation_checkpoint, torch.ops.higher_order.invoke_subgraph
# by what calls a region, where its operands begin; the body comes first
OPERANDS = {CHECKPOINT: 1, NESTED: 2}


def inline_nested(gm: fx.GraphModule) -> fx.GraphModule:
    """`inline_regions` for nested ones that take a packed weight, which torch does not compile. Others stay: who asks
    for a region wants it compiled once."""
    return inline_regions(gm, _takes_packed)


def may_hold_packed(node: fx.Node) -> bool:
    """Whether Dynamo traces a region once its weights are packed: nested ones with tensor subclasses not before torch
    2.13, where one body serves several calls (tried on 2.11 and 2.13)."""
    return node.target is CHECKPOINT or TorchVersion(torch.__version__) >= "2.13"


def inline_regions(gm: fx.GraphModule, wanted: Callable[[fx.Node], bool] = lambda node: True) -> fx.GraphModule:
    """Inline every region, where `wanted`, into a copy of `gm`; `gm` itself where there is none."""
    found = [node for node in gm.graph.nodes if _is_region(node, gm) and wanted(node)]
    if not found:
        return gm
    names = {node.name for node in found}
    graph = copy_of(gm)
    with as_traced(graph) as follow:
        for node in list(graph.nodes):
            follow(node)
            if node.name in names:
                with graph.inserting_before(node):
                    results = _written_out(graph, _body(node, gm), node.args[OPERANDS[node.target] :], follow)
                body = node.args[0]
                _replace(graph, node, results)
                if not body.users:
                    graph.erase_node(body)
    return rewritten(gm, graph)


def _is_region(node: fx.Node, gm: Any) -> bool:
    """Whether it calls a region whose body can be written out."""
    if node.target not in OPERANDS or any(user.target is not operator.getitem for user in node.users):
        return False
    body = _body(node, gm)
    return all(_can_be_written(inner, body) for inner in body.graph.nodes)


def _can_be_written(inner: fx.Node, body: fx.GraphModule) -> bool:
    if inner.op == "get_attr":  # the bodies of further regions only
        return all(user.target in OPERANDS for user in inner.users)
    return _is_region(inner, body) if inner.target in OPERANDS else inner.op != "call_module"


def _takes_packed(node: fx.Node) -> bool:
    values = [value_of(one) for one in node.all_input_nodes]
    return node.target is NESTED and any(isinstance(value, Float8Sparse24Tensor) for value in values)


def _body(node: fx.Node, gm: Any) -> fx.GraphModule:
    place: Any = node.args[0]
    return getattr(gm, place.target)


def _written_out(graph: fx.Graph, body: fx.GraphModule, operands: Any, follow: Callable[[fx.Node], None]) -> Any:
    """Write the nodes of a region's body into the graph; what it gives back."""
    env: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    *inside, output = body.graph.nodes
    for inner in inside:
        if inner.op in ("placeholder", "get_attr"):
            continue
        given: Any = fx.map_arg(inner.args, env.get)
        if inner.target in OPERANDS:
            env[inner] = _written_out(graph, _body(inner, body), given[OPERANDS[inner.target] :], follow)
        elif inner.target is operator.getitem and isinstance(given[0], (tuple, list)):
            env[inner] = given[0][given[1]]
        else:
            env[inner] = graph.node_copy(inner, env.__getitem__)
            follow(env[inner])
            # one body may serve many calls, each with values of its own
            if value_of(inner) is not None:
                give_value(env[inner])
    return fx.map_arg(output.args[0], env.__getitem__)


def inline_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """Inline every attention node into a copy of `gm`; `gm` itself where there is none."""
    if not any(node.target is ATTENTION for node in gm.graph.nodes):
        return gm
    graph = copy_of(gm)
    with as_traced(graph) as follow:
        for node in list(graph.nodes):
            follow(node)
            if node.target is ATTENTION:
                _inline(graph, node)
    return rewritten(gm, graph)


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    inputs = list(node.all_input_nodes)
    place = {argument: number for number, argument in enumerate(inputs)}

    def attention(*values: Any) -> Any:
        given: Any = fx.map_arg((node.args, node.kwargs), lambda argument: values[place[argument]])
        return ATTENTION(*given[0], **given[1])

    # "pre-dispatch" keeps linear as linear; the fakes carry Dynamo's symbolic sizes along
    traced = make_fx(attention, pre_dispatch=True)(*(_stand_in(value_of(one)) for one in inputs))
    env = dict(zip((one for one in traced.graph.nodes if one.op == "placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                _replace(graph, node, fx.map_arg(inner.args[0], env.__getitem__))
            elif inner.op != "placeholder":
                env[inner] = graph.node_copy(inner, env.__getitem__)
                give_value(env[inner])


def _stand_in(value: Any) -> Any:
    """A plain tensor in place of a packed weight, which would have its own product traced in place of `linear`."""
    if not isinstance(value, Float8Sparse24Tensor):
        return value
    return value.qdata.new_empty_strided(value.shape, value.stride(), dtype=value.dtype)


def _replace(graph: fx.Graph, node: fx.Node, results: Any) -> None:
    """The node gives (output, weights or None): hand each `getitem` its part."""
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
