"""Products that share an input become one: the counts that are due, the same numbers, and right ones whatever is done
to the weights afterwards."""

import copy
import gc
import logging
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import compile_fx

import hwpq_fx
from graphs import BOTH_WAYS, autocast
from hwpq_fx.explain import op_counts
from hwpq_fx.passes import PASSES, HwpqBackend, merge, merged_of, rewrite
from models import bert, call, gpt2, llama, pack, saved, tokens

K, N = 64, 32


def packed(model, activation="dynamic"):
    """Every nn.Linear packed, and nobody else holds the weights."""
    pack(model, activation)
    gc.collect()  # torch 2.11 leaves copies in cycles
    return model


class Attention(nn.Module):
    """q with more rows than k and v, as grouped-query attention has them."""

    def __init__(self, bias=(True, True, True)):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n, bias=b) for n, b in zip((K, N, N), bias, strict=True))
        self.o = nn.Linear(K, K)

    def forward(self, x):
        q, k, v = (one.unflatten(-1, (-1, 16)).transpose(-2, -3) for one in (self.q(x), self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(-2, -3).flatten(-2))


class Backend:
    """Merge and lower, keep the graphs, and run what came out as `inner` does."""

    def __init__(self, inner="eager"):
        self.graphs, self.given = [], []

        def compiled(gm, inputs):
            gm.graph.lint()
            self.graphs.append(gm)
            return torch._dynamo.lookup_backend(inner)(gm, inputs)

        self.backend = HwpqBackend(compiled)

    def __call__(self, gm, inputs):
        self.given.append(op_counts(gm))
        return self.backend(gm, inputs)

    def count(self, name="hwpq_fx.linear24"):
        return [op_counts(gm)[name] for gm in self.graphs]

    def names(self):
        return [one.names for gm in self.graphs for one in merged_of(gm)]


def run(model, *args, inner="eager", **settings):
    backend = Backend(inner)
    return torch.compile(model, backend=backend, **settings)(*args), backend


def same(actual, expected):
    # one product with more rows may sum in another order
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["dynamic", "none"])
@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ((True, True, True), [("q", "k", "v")]),
        ((False, False, False), [("q", "k", "v")]),
        ((True, False, True), [("q", "v")]),
        ((True, False, False), [("k", "v")]),
    ],
)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_queries_keys_and_values(activation, bias, expected, inner):
    model, x = packed(Attention(bias), activation), torch.randn(2, 5, K)
    with torch.no_grad():
        y, backend = run(model, x, inner=inner)
        same(y, model(x))
    assert backend.names() == expected and backend.count() == [5 - len(expected[0])]
    assert backend.count("cat") == [int(bias[0] and bias[2])]


@pytest.mark.parametrize(
    ("make", "products", "merged"),
    [(llama, 8, 4), (bert, 9, 2), (gpt2, 8, 0)],
    ids=["llama", "bert", "gpt2"],
)
def test_models(make, products, merged):
    model, batch = make(), tokens()
    hwpq_fx.convert(model, [batch])
    expected = call(model, batch)
    backend = Backend()
    same(call(torch.compile(model, backend=backend), batch), expected)
    assert sum(backend.count()) == products and len(backend.names()) == merged
    if make is llama:
        layer = "model.layers.1."
        assert tuple(f"{layer}self_attn.{one}_proj" for one in "qkv") in backend.names()
        assert (f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj") in backend.names()
        # strided parts are all that rotary embeddings, attention and the gate need
        assert backend.count("contiguous") == [counts["contiguous"] for counts in backend.given]


def test_the_graph():
    model, x = packed(Attention()), torch.randn(2, 5, K)
    seen = []

    def backend(gm, inputs):
        given = str(gm.graph)
        after = merge(gm, inputs)
        assert str(gm.graph) == given, "Dynamo's graph was changed"
        counts = (op_counts(gm), op_counts(after))
        assert [one["linear"] for one in counts] == [4, 2]
        inputs_of = [Counter(node.op for node in one.graph.nodes)["placeholder"] for one in (gm, after)]
        assert inputs_of == [9, 7], "q, k and v are no inputs any more"
        kept = {node.name: node for node in after.graph.nodes}
        for node in gm.graph.nodes:
            if node.target is torch._C._nn.linear:
                assert kept[node.name].meta["stack_trace"] == node.meta["stack_trace"]
        assert merge(after, inputs) is after
        seen.append(merged_of(after))
        return gm

    addresses = [one.weight.qdata.data_ptr() for one in (model.q, model.k, model.v)]
    torch.compile(model, backend=backend)(x)
    ((siblings,),) = seen
    assert siblings.names == ("q", "k", "v") and siblings.rows == (K, N, N)
    assert [one.weight.qdata.data_ptr() for one in (model.q, model.k, model.v)] == addresses, "only looked at"


def test_nothing_to_merge_is_the_graph_itself():
    def backend(gm, inputs):
        assert merge(gm, inputs) is gm
        return gm

    torch.compile(nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)), backend=backend)(torch.randn(2, K))
    torch.compile(packed(nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))), backend=backend)(torch.randn(2, K))


def linears(*rows, **settings):
    return packed(nn.ModuleList(nn.Linear(K, n, **settings) for n in rows))


def merged(function, *args, **settings):
    """What is merged where `function` runs; its result is compared as well."""
    gc.collect()
    y, backend = run(function, *args, **settings)
    for one, other in zip(y, function(*args), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    return sum(len(one) for one in backend.names()), sum(backend.count())


def test_an_input_written_to_between_is_another():
    layers = linears(N, N, N)

    def forward(x):
        x = x * 2
        a, b = layers[0](x), layers[1](x)
        x.mul_(-3)
        return a, b, layers[2](x)

    with torch.no_grad():
        assert merged(forward, torch.randn(3, K)) == (2, 2)


def test_different_activations_dtypes_and_ignored_layers():
    layers = linears(*(N,) * 6)
    layers[2], layers[3] = packed(nn.ModuleList(nn.Linear(K, N) for _ in range(2)), "none")
    layers[4] = nn.Linear(K, N)
    with torch.no_grad():
        assert merged(lambda x: [one(x) for one in layers], torch.randn(3, K)) == (5, 2)


def test_rows_that_would_not_start_aligned(caplog):
    layers = linears(3, N)
    with torch.no_grad(), caplog.at_level(logging.INFO, "hwpq_fx"):
        assert merged(lambda x: [one(x) for one in layers], torch.randn(3, K)) == (0, 2)
    assert "multiple of 16 bytes" in caplog.text


def test_a_layer_used_again_with_the_same_siblings():
    """As where layers are shared: the weights are joined once."""
    layers = linears(N, N)

    def forward(x):
        return [one(y) for y in (x, torch.relu(x)) for one in layers]

    with torch.no_grad():
        assert merged(forward, torch.randn(3, K)) == (2, 2)


def test_a_layer_used_again_with_others_stays_by_itself():
    layers = linears(N, N, N, N)

    def forward(x):
        y = torch.relu(x)
        return layers[0](x), layers[1](x), layers[0](y), layers[2](y), layers[2](x.abs()), layers[3](x.abs())

    with torch.no_grad():
        assert merged(forward, torch.randn(3, K)) == (0, 6)


def test_a_weight_that_is_read_otherwise_stays_by_itself():
    layers = linears(N, N)
    with torch.no_grad():
        assert (
            merged(lambda x: (layers[0](x), layers[1](x), layers[1].weight.dequantize() * 2), torch.randn(2, K))[0] == 0
        )


USES = {
    "returned": (lambda y: y, 1),
    "flattened": (lambda y: y.view(-1) + 1, 1),
    "reshaped": (lambda y: y.reshape(-1).mul_(2) + 0 * y.flatten(), 1),
    "heads": (lambda y: y.view(*y.shape[:-1], 2, 16).transpose(1, 2) * 2, 0),
    "rows": (lambda y: y.view(-1, N).neg(), 0),
    "gate": (lambda y: F.silu(y) * y, 0),
    "cast": (lambda y: y.float().view(-1) * 2, 1),
    "written": (lambda y: y.mul_(3).view(-1), 1),
    "strides": (lambda y: y.as_strided((4,), (1,)), 1),
    "product": (lambda y: y @ torch.ones(N, 3), 1),
}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("name", USES)
def test_whoever_depends_on_strides_gets_a_contiguous_part(name, inner):
    use, copies = USES[name]
    layers, x = linears(N, N), torch.randn(2, 5, K)

    def forward(x):
        a, b = layers[0](x), layers[1](x)
        return use(a), b * 2

    with torch.no_grad():
        y, backend = run(forward, x, inner=inner)
        for one, other in zip(y, forward(x), strict=True):
            same(one, other)
            assert one.stride() == other.stride()
    assert backend.count() == [1] and backend.count("contiguous") == [copies]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_dynamic_shapes(inner):
    model, backend = packed(Attention()), Backend(inner)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for lead in [(2, 5), (3, 4), (6, 9)]:
            x = torch.randn(*lead, K)
            same(compiled(x), model(x))
    assert backend.count() == [2]


@BOTH_WAYS
def test_autocast(inside):
    backend = Backend()
    with torch.no_grad():
        y, expected = autocast(packed(Attention()), torch.randn(2, 5, K), backend, inside)
    assert y.dtype is torch.bfloat16 and backend.count() == [2]
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("activation", ["dynamic", "none"])
def test_gradients(activation, inner):
    model, x = packed(Attention(), activation), torch.randn(2, 5, K, requires_grad=True)
    model.train()
    wanted, cotangent = [x, model.q.bias, model.k.bias, model.v.bias], torch.randn(2, 5, K)
    expected = torch.autograd.grad(model(x), wanted, cotangent)
    gc.collect()
    y, backend = run(model, x, inner=inner)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, cotangent), expected, rtol=1e-4, atol=1e-5)
    assert backend.count() == [2]


def test_gradients_are_for_those_products_that_want_them():
    layers = linears(N, N, N)

    def forward(x):
        with torch.no_grad():
            a = layers[0](x)
        return a, layers[1](x), layers[2](x)

    x = torch.randn(3, K, requires_grad=True)
    y, backend = run(forward, x)
    assert [one.requires_grad for one in y] == [False, True, True] and backend.count() == [2]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_parameter_replaced_after_compiling(inner):
    model, x = packed(Attention()), torch.randn(2, 5, K)
    backend = Backend(inner)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        before = compiled(x)
        model.k.weight = packed(nn.Linear(K, N)).weight
        gc.collect()
        after = compiled(x)
        same(after, model(x))
        assert not torch.allclose(before, after, atol=1e-3)
        # in place, through the module, and by loading
        model.v.weight.copy_(packed(nn.Linear(K, N)).weight)
        model.q.weight.scale.mul_(2)
        model.load_state_dict(packed(Attention()).state_dict(), assign=True)
        gc.collect()
        same(compiled(x), model(x))
        whole = [one.weight.qdata for one in (model.q, model.k, model.v)]
        assert whole[1].data_ptr() == whole[0].data_ptr() + whole[0].nbytes, "joined anew"
    assert backend.count() == [2]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_weights_that_others_hold_run_apart(inner):
    model, x = packed(Attention()), torch.randn(2, 5, K)
    backend = Backend(inner)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
        state = packed(Attention()).state_dict()
        model.load_state_dict(state, assign=True)
        for _ in range(2):
            same(compiled(x), model(x))
            state["q.weight"].scale.mul_(2)
        assert backend.count() == [2, 4], "the second one was compiled unmerged"
        del state
        same(compiled(x), model(x))
    assert len(backend.graphs) == 2


def test_moved_copied_and_saved_models():
    model, x = packed(Attention()), torch.randn(2, 5, K)
    backend = Backend()
    state = {name: value.shape for name, value in model.state_dict().items()}
    size = len(saved(model).getvalue())
    with torch.no_grad():
        y = torch.compile(model, backend=backend)(x)
        assert {name: value.shape for name, value in model.state_dict().items()} == state
        file = saved(model)
        assert len(file.getvalue()) <= size
        twin = copy.deepcopy(model)
        twin.q.weight.scale.zero_()
        same(torch.compile(model, backend=backend)(x), y)
        same(torch.compile(twin, backend=backend)(x), twin(x))
        file.seek(0)
        loaded = Attention().eval()
        loaded.load_state_dict(torch.load(file), assign=True)
        same(torch.compile(loaded, backend=backend)(x), y)
        half = copy.deepcopy(model).to(torch.bfloat16)
        gc.collect()
        z = torch.compile(half, backend=backend)(x.bfloat16())
        torch.testing.assert_close(z, half(x.bfloat16()), rtol=2e-2, atol=2e-2)
    assert set(backend.count()) == {2}


def test_one_graph_for_layers_that_it_was_not_compiled_with():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                torch._dynamo.graph_break()
                x = layer(x)
            return x

    model, x, backend = packed(Stack()), torch.randn(2, 5, K), Backend()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            same(compiled(x), model(x))
    assert set(backend.count()) <= {0, 2}
    for layer in model.layers:
        assert layer.k.weight.scale.data_ptr() == layer.q.weight.scale.data_ptr() + layer.q.weight.scale.nbytes


def test_compilers_take_the_weights_for_parameters():
    """CUDA graphs read these where they lie, and copy everything else at every call."""
    model, x = packed(Attention()), torch.randn(2, 5, K)
    static = []

    def inner_compile(gm, inputs, **settings):
        static.append((len(inputs), len(settings["static_input_idxs"])))
        return gm.forward

    def inductor(gm, inputs):
        return compile_fx.compile_fx(gm, inputs, inner_compile=inner_compile)

    for passes in (None, [one for one in PASSES if one is not merge]):
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.utils.fresh_inductor_cache():
            torch.compile(model, backend=HwpqBackend(inductor, passes))(x)
    # all but x: four biases, and four parts for each weight
    assert static == [(1 + 4 + 2 * 4, 4 + 2 * 4), (1 + 4 + 4 * 4, 4 + 4 * 4)]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode):
    model, x = packed(Attention()), torch.randn(2, 5, K)
    with torch.no_grad():
        compiled = torch.compile(model, backend="hwpq", mode=mode)
        for _ in range(3):
            same(compiled(x), model(x))


def test_the_graph_cache_serves_merged_graphs():
    from torch._dynamo.utils import counters

    model, x = packed(Attention()), torch.randn(2, 5, K)
    counters.clear()
    with torch.no_grad(), torch._inductor.utils.fresh_inductor_cache():
        for _ in range(2):
            torch._dynamo.reset()
            same(torch.compile(model, backend="hwpq")(x), model(x))
    hits = counters["aot_autograd"]["autograd_cache_hit"] or counters["inductor"]["fxgraph_cache_hit"]
    assert hits == 1


def test_it_says_what_it_merged(caplog):
    model, x = packed(Attention()), torch.randn(2, 5, K)
    with caplog.at_level(logging.DEBUG, "hwpq_fx"):
        explanation = hwpq_fx.explain(model, x)
    (graph,) = explanation.graphs
    assert [one.names for one in graph.merged] == [("q", "k", "v")]
    assert "merged: q, k, v" in str(explanation) and "q, k, v" in caplog.text


def test_without_the_pass_nothing_is_merged():
    def backend(gm, inputs):
        after = rewrite(gm, inputs, [one for one in PASSES if one is not merge])
        assert op_counts(after)["hwpq_fx.linear24"] == 4 and not merged_of(after)
        return after

    torch.compile(packed(Attention()), backend=backend)(torch.randn(2, 5, K))
