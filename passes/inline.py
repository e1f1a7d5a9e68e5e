"""The inline pass: `F.multi_head_attention_forward`, which Dynamo keeps as one node, becomes its aten ops.

before   %y = multi_head_attention_forward(%q, %k, %v, ..., %in_proj_weight, ..., %out_proj_weight, ...)
after    %s = split_with_sizes(%in_proj_weight, [64, 128])     %a = linear(%q, %s[0])     ...
         %y = linear(%o, %out_proj_weight, %out_proj_bias)     so that the products inside can be seen
"""

from typing import Any

import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from hwpq_fx.kernels import Float8Sparse24Tensor

from .values import as_traced, copy_of, give_value, rewritten, value_of

ATTENTION: Any = F.multi_head_attention_forward


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
