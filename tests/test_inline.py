"""Attention written out: the same numbers, and every product inside in sight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphs import BOTH_WAYS, Checked, autocast, written
from hwpq_fx.explain import op_counts
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.passes import inline_attention, lower
from hwpq_fx.passes.products import products

E = 16
ATTENTION = "multi_head_attention_forward"


class Inlined:
    """A Dynamo backend that runs the inlined graph and keeps the counts before and after."""

    def __init__(self, *passes):
        self.before, self.after = [], []
        self.passes = (inline_attention, *passes)

    def __call__(self, gm, _):
        after = gm
        for run in self.passes:
            after = run(after)
        assert after is not gm
        after.graph.lint()
        self.before.append(op_counts(gm))
        self.after.append(op_counts(after))
        self.products = len(list(products(after.graph)))
        return Checked(after)


def compiled(model, *args, backend=None, **kwargs):
    backend = backend or Inlined()
    return torch.compile(model, backend=backend)(*args, **kwargs), backend


class Call(nn.Module):
    """One attention module, called as told."""

    def __init__(self, attention, **kwargs):
        super().__init__()
        self.attention, self.kwargs = attention, kwargs

    def forward(self, *inputs):
        query, key, value = inputs if len(inputs) == 3 else (inputs[0], *inputs[-1:] * 2)
        return self.attention(query, key, value, **self.kwargs)


BLOCKED = torch.zeros(5, 5, dtype=torch.bool).triu(1)
BIAS = torch.randn(5, 5)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
SELF = {
    "weights": ({}, {}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "no weights": ({}, {"need_weights": False}),
    "sequence first": ({"batch_first": False}, {}),
    "no bias": ({"bias": False}, {"need_weights": False}),
    "bool mask": ({}, {"attn_mask": BLOCKED}),
    "float mask": ({}, {"attn_mask": BIAS, "need_weights": False}),
    "mask per head": ({}, {"attn_mask": BLOCKED.expand(8, 5, 5), "need_weights": False}),
    "padding": ({}, {"key_padding_mask": PADDING}),
    "padding and mask": ({}, {"key_padding_mask": PADDING, "attn_mask": BLOCKED, "need_weights": False}),
    "causal": ({}, {"attn_mask": BLOCKED, "is_causal": True, "need_weights": False}),
    "bias_kv": ({"add_bias_kv": True}, {"key_padding_mask": PADDING}),
    "zero_attn": ({"add_zero_attn": True}, {"attn_mask": BLOCKED}),
    "everything": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": PADDING, "attn_mask": BIAS > 9}),
}


@pytest.mark.parametrize("name", SELF)
def test_self_attention(name):
    options, kwargs = SELF[name]
    options = {"batch_first": True} | options
    model = Call(nn.MultiheadAttention(E, 4, **options), **kwargs).eval()
    x = torch.randn(2, 5, E) if options["batch_first"] else torch.randn(5, 2, E)
    expected = model(x)
    result, backend = compiled(model, x)
    torch.testing.assert_close(result, expected)
    assert (result[1] is None) == (kwargs.get("need_weights") is False)
    assert backend.before[0][ATTENTION] == 1 and backend.after[0][ATTENTION] == 0
    assert backend.after[0]["aten.linear"] == 2 == backend.products


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("options", "width", "linears"),
    [({}, E, 3), ({"kdim": 8, "vdim": 8}, 8, 4)],
    ids=["packed weight", "separate weights"],
)
def test_cross_attention(options, width, linears, need_weights):
    model = Call(nn.MultiheadAttention(E, 4, batch_first=True, **options), need_weights=need_weights).eval()
    x, memory = torch.randn(2, 5, E), torch.randn(2, 7, width)
    expected = model(x, memory)
    result, backend = compiled(model, x, memory)
    torch.testing.assert_close(result, expected)
    # with one packed weight, the keys' and values' rows of it are one product where their input is one
    assert backend.products == linears and backend.after[0][ATTENTION] == 0


def test_three_inputs_and_three_widths():
    model = Call(nn.MultiheadAttention(E, 4, kdim=8, vdim=12, batch_first=True)).eval()
    inputs = torch.randn(2, 5, E), torch.randn(2, 7, 8), torch.randn(2, 7, 12)
    expected = model(*inputs)
    result, backend = compiled(model, *inputs)
    torch.testing.assert_close(result, expected)
    assert backend.products == 4


def test_without_a_batch():
    model = Call(nn.MultiheadAttention(E, 4)).eval()
    x = torch.randn(5, E)
    result, backend = compiled(model, x)
    torch.testing.assert_close(result, model(x))
    # torch no longer knows here that query, key and value are one
    assert backend.products == 4 and backend.after[0][ATTENTION] == 0


def test_dynamic_shapes():
    model = Call(nn.MultiheadAttention(E, 4, batch_first=True), need_weights=False).eval()
    backend = Inlined()
    run = torch.compile(model, backend=backend, dynamic=True)
    for batch, length in [(2, 5), (3, 9), (7, 4), (6, 11)]:
        x = torch.randn(batch, length, E)
        torch.testing.assert_close(run(x)[0], model(x)[0])
    assert len(backend.before) == 1, "the inlined graph holds for one shape only"
    assert backend.after[0][ATTENTION] == 0 and backend.products == 2


def test_gradients():
    model = Call(nn.MultiheadAttention(E, 4, batch_first=True)).eval()
    x = torch.randn(2, 5, E, requires_grad=True)

    def gradients(run):
        y, weights = run(x)
        return torch.autograd.grad(y.square().sum() + weights.square().sum(), [x, *model.parameters()])

    expected = gradients(model)
    backend = Inlined()
    torch.testing.assert_close(gradients(torch.compile(model, backend=backend)), expected)
    assert backend.after[0][ATTENTION] == 0 and backend.products == 2


@BOTH_WAYS
def test_autocast(inside):
    """Every value the new nodes carry has the dtype that they have under autocast (`Checked`)."""
    model = Call(nn.MultiheadAttention(E, 4, batch_first=True)).eval()
    backend = Inlined()
    result, expected = autocast(model, torch.randn(2, 5, E), backend, inside)
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    assert result[0].dtype is torch.bfloat16
    assert backend.after[0][ATTENTION] == 0 and backend.products == 2


def test_modes_are_as_they_were_afterwards():
    model = Call(nn.MultiheadAttention(E, 4, batch_first=True)).eval()

    def modes():
        return torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()

    seen = []

    class Watching(Inlined):
        def __call__(self, gm, inputs):
            seen.append(modes())
            run = super().__call__(gm, inputs)
            seen.append(modes())
            return run

    def regions(x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = model(x)[0]
        return y.float() + model(x)[0]

    result, backend = compiled(regions, torch.randn(2, 5, E), backend=Watching())
    assert seen == [(False, True)] * 2
    assert result.requires_grad and backend.products == 4


def test_packed_weights_inside_are_rewritten():
    attention = nn.MultiheadAttention(E, 4, batch_first=True).eval()
    reference = nn.MultiheadAttention(E, 4, batch_first=True).eval()
    reference.load_state_dict(attention.state_dict())
    for owner, name in [(attention, "in_proj_weight"), (attention.out_proj, "weight")]:
        packed = Float8Sparse24Tensor.from_hp(getattr(owner, name).detach(), activation="none")
        other = reference if owner is attention else reference.out_proj
        setattr(owner, name, nn.Parameter(packed, requires_grad=False))
        setattr(other, name, nn.Parameter(packed.dequantize(), requires_grad=False))
    x, memory = torch.randn(2, 5, E), torch.randn(2, 7, E)
    with torch.no_grad():
        for inputs, count in [((x,), 2), ((x, memory), 3)]:
            result, backend = compiled(Call(attention), *inputs, backend=Inlined(lower))
            torch.testing.assert_close(result, Call(reference)(*inputs))
            assert backend.after[0]["hwpq_fx.linear24"] == count
            assert backend.after[0]["aten.linear"] == backend.after[0][ATTENTION] == 0


def test_several_attentions_in_one_graph():
    layer = nn.TransformerDecoderLayer(E, 4, 32, batch_first=True).eval()
    x, memory = torch.randn(2, 5, E), torch.randn(2, 7, E)
    expected = layer(x, memory)
    result, backend = compiled(layer, x, memory)
    torch.testing.assert_close(result, expected)
    assert backend.before[0][ATTENTION] == 2 and backend.after[0][ATTENTION] == 0
    assert backend.products == 2 + 3 + 2


def test_a_graph_without_attention_comes_back_as_it_is():
    same = []

    def backend(gm, _):
        same.append(inline_attention(gm) is gm)
        return gm

    torch.compile(nn.Linear(E, E), backend=backend)(torch.randn(2, E))
    torch.compile(Call(nn.MultiheadAttention(E, 4)).eval(), backend=backend)(torch.randn(2, 5, E))
    assert same == [True, False]


def test_the_graph_given_is_not_touched():
    model = Call(nn.MultiheadAttention(E, 4, batch_first=True)).eval()
    x = torch.randn(2, 5, E)

    def backend(gm, _):
        before = written(gm.graph)
        assert inline_attention(gm) is not gm
        assert written(gm.graph) == before
        assert op_counts(gm)[ATTENTION] == 1
        return gm

    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert F.multi_head_attention_forward.__name__ == ATTENTION
