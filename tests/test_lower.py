"""Products on packed weights become quantization and one custom op: the same numbers, the counts that are due."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphs import BOTH_WAYS, Checked, autocast, written
from hwpq_fx.explain import op_counts
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.passes import HwpqBackend, lower
from hwpq_fx.passes.values import op_name
from models import Attention, dequantized, pack

N, K = 24, 16
LINEAR24, QUANTIZED = "hwpq_fx.linear24", "amax"  # one amax in each quantization


def packed(rows=N, cols=K, activation="dynamic", dtype=torch.float32, transposed=False):
    weight = Float8Sparse24Tensor.from_hp(torch.randn(rows, cols, dtype=dtype), activation=activation).expand()
    return nn.Parameter(weight.t() if transposed else weight, requires_grad=False)


class Product(nn.Module):
    def __init__(self, function, weight, bias=True):
        super().__init__()
        self.function, self.w = function, weight
        outputs = weight.shape[1] if weight.transposed else weight.shape[0]
        self.b = nn.Parameter(torch.randn(outputs, dtype=weight.dtype)) if bias else None

    def forward(self, x):
        return self.function(x, self.w, self.b)


def unpacked(model):
    """The same model on the dense weights that the packed ones stand for, in float64."""
    return dequantized(model, torch.float64).double()


class Lowered:
    """A Dynamo backend that lowers, checks the graph, and runs it eagerly against what its metadata says."""

    def __init__(self, inner=None):
        self.before, self.after, self.inner = [], [], inner

    def __call__(self, gm, inputs):
        given = written(gm.graph)
        after = lower(gm)
        assert written(gm.graph) == given, "Dynamo's graph was changed"
        after.graph.lint()
        self.before.append(op_counts(gm))
        self.after.append(op_counts(after))
        unused = [{node.name for node in graph.nodes if not node.users} for graph in (gm.graph, after.graph)]
        assert unused[1] <= unused[0], "dead nodes are left over"
        if self.inner:
            return self.inner(after, inputs)
        return Checked(after)

    def counts(self, *names):
        return tuple(sum(after[name] for after in self.after) for name in names)


def run(model, *args, backend=None, **settings):
    backend = backend or Lowered()
    return torch.compile(model, backend=backend, **settings)(*args), backend


def close(actual, expected, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol)


# how a weight [N, K] may be kept and used: (function, kept as [K, N])
WAYS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), False),
    "t": (lambda x, w, b: x @ w.t() + b, False),
    "T": (lambda x, w, b: torch.matmul(x, w.T) + b, False),
    "transpose": (lambda x, w, b: x.matmul(other=w.transpose(0, 1)) + b, False),
    "matmul": (lambda x, w, b: x @ w + b, True),
    "linear of t": (lambda x, w, b: F.linear(x, w.t(), b), True),
}
FLAT = {
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), True),
    "addmm of t": (lambda x, w, b: torch.addmm(b, x, w.t()), False),
    "method addmm": (lambda x, w, b: b.addmm(mat1=x, mat2=w), True),
    "mm": (lambda x, w, b: torch.mm(x, w) + b, True),
}


@pytest.mark.parametrize("activation", ["dynamic", "none"])
@pytest.mark.parametrize("way", [*WAYS, *FLAT])
def test_every_way_to_multiply(way, activation):
    function, transposed = (WAYS | FLAT)[way]
    model = Product(function, packed(activation=activation, transposed=transposed))
    backend = Lowered()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for lead in [(3,)] if way in FLAT else [(), (1,), (3,), (2, 3), (2, 1, 3)]:
            x = torch.randn(*lead, K)
            y = compiled(x)
            assert y.shape == (*lead, N)
            torch.testing.assert_close(y, model(x), rtol=0, atol=0)
            exact = unpacked(model)(x.double())
            close(y, exact) if activation == "none" else close(y, exact, 0.1, 0.5)
    for before, after in zip(backend.before, backend.after, strict=True):
        assert after[LINEAR24] == 1 and before[LINEAR24] == 0
        assert after[QUANTIZED] == (activation == "dynamic")
        assert not any(after[name] for name in ("linear", "matmul", "addmm", "mm"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_dtypes_and_bias(dtype, bias):
    model = Product(F.linear, packed(dtype=dtype), bias)
    x = torch.randn(3, K, dtype=dtype)
    with torch.no_grad():
        y, backend = run(model, x)
        torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    assert y.dtype is dtype and backend.counts(LINEAR24, "linear") == (1, 0)
    close(y.float(), unpacked(model)(x.double()).float(), 0.1, 0.5)


@pytest.mark.parametrize(("activation", "quantized"), [("dynamic", 2), ("none", 0)])
def test_a_shared_input_is_quantized_once(activation, quantized):
    model, x = pack(Attention(K), activation), torch.randn(2, 5, K)
    with torch.no_grad():
        y, backend = run(model, x)
        torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    assert backend.before[0]["linear"] == 4
    assert backend.counts(LINEAR24, QUANTIZED, "linear", "detach", "to") == (4, quantized, 0, 0, quantized)


def test_products_that_follow_each_other():
    model, x = pack(nn.Sequential(nn.Linear(K, N), nn.Linear(N, 8), nn.Linear(8, K))), torch.randn(2, K)
    with torch.no_grad():
        y, backend = run(model, x)
        torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    assert backend.counts(LINEAR24, QUANTIZED, "linear") == (3, 3, 0)


def test_an_input_written_to_between_is_quantized_again():
    class Between(Attention):
        def forward(self, x):
            x = x * 2
            q, k = self.q(x), self.k(x)
            x.mul_(-3)
            v = self.v(x)
            x[0] = 100
            return q + k + v + self.o(x)

    model, x = pack(Between(K)), torch.randn(2, K)
    with torch.no_grad():
        y, backend = run(model, x)
        torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    assert backend.counts(LINEAR24, QUANTIZED) == (4, 3)


def test_one_input_and_two_kinds_of_activation():
    model = Attention(K)
    pack(model.q), pack(model.k, "none"), pack(model.v), pack(model.o, "none")
    x = torch.randn(2, 5, K)
    with torch.no_grad():
        y, backend = run(model, x)
        torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    assert backend.counts(LINEAR24, QUANTIZED) == (4, 1)


def test_dense_and_packed_side_by_side():
    model = pack(Attention(K))
    model.k = nn.Linear(K, K)
    with torch.no_grad():
        y, backend = run(model, x := torch.randn(2, 5, K))
        torch.testing.assert_close(y, model(x), rtol=0, atol=0)
    assert backend.counts(LINEAR24, QUANTIZED, "linear") == (3, 2, 1)


@pytest.mark.parametrize(
    ("function", "transposed"),
    [
        (lambda x, w, _: F.linear(x, w), True),
        (lambda x, w, _: x @ w, False),
        (lambda x, w, _: F.linear(x, w.t()), False),
    ],
    ids=["linear", "matmul", "linear of t"],
)
def test_what_the_format_cannot_serve_stays_and_is_right(function, transposed):
    """The weight is packed along the side that the product does not sum over. A product beside it is rewritten."""
    model = Product(function, packed(K, N, "none", transposed=transposed), bias=False)
    beside = pack(nn.Linear(K, N), "none")
    x = torch.randn(3, K)
    with torch.no_grad():
        (y, other), backend = run(lambda x: (model(x), beside(x)), x)
        close(y, unpacked(model)(x.double()))
        close(other, unpacked(beside)(x.double()))
    assert backend.counts(LINEAR24) == (1,)
    assert sum(backend.counts("linear", "matmul")) == 1


@pytest.mark.parametrize("activation", ["dynamic", "none"])
def test_rows_of_a_packed_weight(activation):
    """As cross attention uses its packed projection."""

    def parts(x, w, b):
        first, second = w.chunk(2)
        return torch.cat([F.linear(x, first), F.linear(x, second, b[N // 2 :]), x @ w[8:].t()], -1)

    model, x = Product(parts, packed(activation=activation)), torch.randn(3, K)
    with torch.no_grad():
        y, backend = run(model, x)
        torch.testing.assert_close(y, model(x), rtol=0, atol=0)
        z, _ = run(model, x, backend=Lowered(torch._dynamo.lookup_backend("aot_eager")))
        torch.testing.assert_close(z, y, rtol=0, atol=0)
    assert backend.counts(LINEAR24, QUANTIZED, "linear", "matmul") == (3, int(activation == "dynamic"), 0, 0)
    exact = unpacked(model)(x.double())
    close(y, exact) if activation == "none" else close(y, exact, 0.1, 0.5)


@pytest.mark.parametrize("activation", ["dynamic", "none"])
@BOTH_WAYS
def test_autocast(inside, activation):
    backend = Lowered()
    with torch.no_grad():
        y, expected = autocast(pack(Attention(K), activation), torch.randn(2, 5, K), backend, inside)
    assert y.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    dynamic = activation == "dynamic"
    # x is cast once for q, k and v; each quantization casts to FP8
    assert backend.counts(LINEAR24, QUANTIZED, "to", "linear") == (4, 2 * dynamic, 1 + 2 * dynamic, 0)


def test_the_same_input_inside_and_outside_of_autocast():
    layers = pack(nn.ModuleList(nn.Linear(K, K) for _ in range(3)))

    def forward(x):
        outside = layers[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            inside = layers[1](x)
        return outside, inside, layers[2](x)

    x = torch.randn(3, K)
    with torch.no_grad():
        y, backend = run(forward, x)
        torch.testing.assert_close(y, forward(x), rtol=2e-2, atol=2e-2)
    assert [one.dtype for one in y] == [torch.float32, torch.bfloat16, torch.float32]
    assert backend.counts(LINEAR24, QUANTIZED) == (3, 2)


def straight_through(model, x, cotangent):
    """The gradient that rounding passed over gives: that of the dense products."""
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(unpacked(model)(x), x, cotangent.double())[0]


@pytest.mark.parametrize("inner", [None, "aot_eager"])
@pytest.mark.parametrize("activation", ["dynamic", "none"])
def test_gradients(activation, inner):
    model = pack(nn.Sequential(nn.Linear(K, N), nn.Linear(N, 8)), activation)
    x, cotangent = torch.randn(2, 3, K, requires_grad=True), torch.randn(2, 3, 8)
    backend = Lowered(inner and torch._dynamo.lookup_backend(inner))
    wanted = [x, model[0].bias, model[1].bias]

    y = model(x)
    expected = torch.autograd.grad(y, wanted, cotangent)
    z = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(torch.autograd.grad(z, wanted, cotangent), expected)
    close(expected[0], straight_through(model, x, cotangent))
    assert backend.counts(LINEAR24, QUANTIZED) == (2, 2 * (activation == "dynamic"))


def test_gradients_of_a_shared_input_through_no_grad_and_autocast():
    layers = pack(nn.ModuleList(nn.Linear(K, K) for _ in range(4)))

    def forward(x):
        with torch.no_grad():
            a = layers[0](x)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                b = layers[1](x)
            c = layers[2](x)
        return layers[3](x) + a + b.float() + c.float()

    x = torch.randn(3, K, requires_grad=True)
    y, backend = run(forward, x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(forward(x).sum(), x)
    torch.testing.assert_close(gradient, expected)
    reference = sum(layers[i].weight.dequantize(torch.float64).sum(0) for i in (2, 3))
    close(gradient, reference.expand(3, K), 1e-2, 1e-2)
    assert backend.counts(LINEAR24) == (4,)


@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_gradients_asked_for_inside_a_call_without(inner):
    layer = pack(nn.Linear(K, N))

    def forward(x):
        with torch.enable_grad():
            return layer(x)

    x = torch.randn(3, K, requires_grad=True)
    with torch.no_grad():
        y, backend = run(forward, x, backend=Lowered(inner and torch._dynamo.lookup_backend(inner)))
    close(torch.autograd.grad(y.sum(), x)[0], layer.weight.dequantize(torch.float64).sum(0).expand(3, K))
    assert backend.counts(LINEAR24) == (1,)


def test_without_grad_nothing_is_kept_for_it():
    model, x = pack(Attention(K)), torch.randn(2, 5, K, requires_grad=True)
    with torch.no_grad():
        _, backend = run(model, x)
    assert backend.counts(LINEAR24, "detach") == (4, 0)
    _, backend = run(model, x)
    assert backend.counts(LINEAR24, "detach") == (4, 2)


def test_names_and_traces_stay():
    model = pack(Attention(K))

    def backend(gm, _):
        after = lower(gm)
        products = [node for node in gm.graph.nodes if op_name(node) == "linear"]
        rewritten = {node.name: node for node in after.graph.nodes if op_name(node) == "hwpq_fx.linear24"}
        assert [node.name for node in products] == list(rewritten) and len(products) == 4
        for node in products:
            for key in ("stack_trace", "nn_module_stack"):
                assert rewritten[node.name].meta[key] == node.meta[key]
        return after

    x = torch.randn(2, 5, K)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))


def test_an_unconverted_graph_comes_back_as_it_is():
    same = []

    def backend(gm, _):
        same.append(lower(gm) is gm)
        return gm

    for model in (Attention(K), pack(Attention(K))):
        torch.compile(model, backend=backend)(torch.randn(2, 5, K))
    assert same == [True, False]


def test_lowering_twice_changes_nothing_more():
    def backend(gm, _):
        once = lower(gm)
        assert lower(once) is once and op_counts(once)[LINEAR24] == 4
        return once

    torch.compile(pack(Attention(K)), backend=backend)(torch.randn(2, 5, K))


def test_a_weight_with_and_without_its_dense_layout():
    """Dynamo tells them apart, so what was compiled for one never runs on the other."""
    layer, x = pack(nn.Linear(K, N)), torch.randn(3, K)
    backend = Lowered()
    compiled = torch.compile(layer, backend=backend)
    with torch.no_grad():
        y = compiled(x)
        layer.weight = nn.Parameter(Float8Sparse24Tensor.from_hp(layer.weight.dequantize()), requires_grad=False)
        torch.testing.assert_close(compiled(x), y)
    assert [after["getattr"] for after in backend.after] == [4, 3]


@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_dynamic_shapes(inner):
    model, backend = pack(Attention(K)), Lowered(inner and torch._dynamo.lookup_backend(inner))
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for lead in [(2, 5), (3, 4), (6, 9)]:
            x = torch.randn(*lead, K)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-6, atol=1e-6)
    assert len(backend.after) == 1 and backend.counts(LINEAR24, QUANTIZED) == (4, 2)


def test_rows_from_1_to_64_take_two_compiles():
    model, backend = pack(nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))), Lowered()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for rows in range(1, 65):
            x = torch.randn(rows, K)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert len(backend.after) == 2 and backend.counts(LINEAR24) == (4,)


def test_inductor():
    """Each kind of product once more, down to compiled code."""

    class Everything(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.attention = pack(Attention(K), activation)
            self.conv1d = packed(activation=activation, transposed=True)
            self.bias = nn.Parameter(torch.randn(N))
            self.out = packed(K, N, activation=activation)

        def forward(self, x):
            x = torch.addmm(self.bias, self.attention(x).flatten(0, 1), self.conv1d)
            return torch.cat([F.linear(x, part) for part in self.out.chunk(2)], -1)

    for activation in ("none", "dynamic"):
        model = Everything(activation)
        backend = Lowered(torch._dynamo.lookup_backend("inductor"))
        compiled = torch.compile(model, backend=HwpqBackend(backend), dynamic=True)
        with torch.no_grad():
            for lead in [(2, 5), (4, 3)]:
                x = torch.randn(*lead, K)
                exact = unpacked(model)(x.double())
                y = compiled(x)
                if activation == "none":
                    close(y, exact, 1e-4, 1e-4)
                else:
                    # one rounding of FP8 may fall the other way and move what depends on it
                    assert (y - model(x)).norm() < 0.02 * y.norm()
                    assert (y - exact).norm() < 0.1 * exact.norm()
        # q, k and v are one by then
        assert len(backend.before) == 1 and backend.before[0][LINEAR24] == 5
