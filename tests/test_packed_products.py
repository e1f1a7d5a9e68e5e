"""Products with a packed weight: by whatever name, in attention, under autocast, differentiated and compiled."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hwpq_fx.kernels import Float8Sparse24Tensor, linear24
from weights import ACTIVATIONS, DTYPES, K, Layer, N, check, make

SHAPES = [(K,), (5, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear(activation, dtype, shape):
    weight, x, bias = make(activation=activation, dtype=dtype), torch.randn(shape).to(dtype), torch.randn(N).to(dtype)
    check(F.linear(x, weight), x, weight)
    check(F.linear(x, weight, bias), x, weight, bias)
    check(F.linear(input=x, weight=weight, bias=bias), x, weight, bias)
    bare = weight.bare()
    assert F.linear(x, bare, bias).equal(F.linear(x, weight, bias))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_of_strided_inputs(activation):
    weight, bias = make(activation=activation), torch.randn(N)
    for x in (torch.randn(3, 5, K).transpose(0, 1), torch.randn(K, 5).t(), torch.randn(5, 2 * K)[:, ::2]):
        assert not x.is_contiguous()
        check(F.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_with_the_transpose_are_linear(activation, shape):
    weight, x = make(activation=activation), torch.randn(shape)
    expected = F.linear(x, weight)
    for product in (x @ weight.t(), x.matmul(weight.T), torch.matmul(x, weight.mT), torch.matmul(x, other=weight.t())):
        assert product.equal(expected)
    if x.dim() == 2:
        assert torch.mm(x, weight.t()).equal(expected)
        assert x.mm(weight.transpose(0, 1)).equal(expected)
    strided = torch.randn(2, 4, 3, K).transpose(0, 2)
    assert (strided @ weight.t()).equal(F.linear(strided, weight))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv1d(activation):
    """GPT-2 keeps its weight as [K, N] and multiplies by addmm."""
    weight, x, bias = make(activation=activation), torch.randn(5, K), torch.randn(N)
    kept = nn.Parameter(weight.t(), requires_grad=False)
    assert kept.shape == (K, N)
    expected = F.linear(x, weight, bias)
    assert torch.addmm(bias, x, kept).equal(expected)
    assert bias.addmm(x, kept).equal(expected)
    assert torch.addmm(input=bias, mat1=x, mat2=kept).equal(expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_products_dequantize(activation):
    """What is no linear layer of the packed rows is a product with the dense weight."""
    weight, x, y = make(activation=activation), torch.randn(5, N), torch.randn(K, 5)
    dense = weight.dequantize()
    for ours, theirs in (
        (x @ weight, x @ dense),
        (torch.mm(x, weight), x @ dense),
        (weight @ y, dense @ y),
        (weight @ y[:, 0], dense @ y[:, 0]),
        (weight @ y.expand(2, K, 5), dense @ y),
        (weight @ weight.t(), dense @ dense.t()),
        (F.linear(x, weight.t()), x @ dense),
        (F.linear(weight, dense), dense @ dense.t()),
    ):
        torch.testing.assert_close(ours, theirs.expand_as(ours))
    rows = torch.randn(5, K)
    for bias, factors in (
        (torch.randn(N), {"alpha": 2, "beta": 0.5}),
        (torch.randn(5, N), {}),
        (torch.randn(1), {}),
        (torch.randn(5, 1), {"alpha": 3}),
    ):
        ours = torch.addmm(bias, rows, weight.t(), **factors)
        torch.testing.assert_close(ours, torch.addmm(bias, rows, dense.t(), **factors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast(activation, dtype):
    """x goes to autocast's dtype, and so does the result; the sums of FP8 products must not be made in float16."""
    layer, x = Layer(cols=512, activation=activation), torch.randn(3, 512)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y = layer(x)
        assert y.isfinite().all()
        check(y, x.to(dtype), layer.weight.to(dtype), layer.bias)
        assert torch.addmm(layer.bias, x, layer.weight.t()).equal(y)
        assert (x @ layer.weight.t()).equal(F.linear(x, layer.weight))
    check(layer(x).detach(), x, layer.weight, layer.bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_autocast(activation):
    """Through Inductor's decomposition, where nobody casts a float32 bias."""
    layer, x = Layer(activation=activation), torch.randn(3, K)
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert y.dtype is torch.bfloat16
        assert y.equal(layer(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_must_agree(activation):
    with pytest.raises(RuntimeError, match=r"x is torch.bfloat16, the packed weight torch.float32"):
        F.linear(torch.randn(2, K).bfloat16(), make(activation=activation))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(bad):
    weight, x, bias = make(), torch.randn(4, K), torch.randn(N)
    clean = F.linear(x, weight, bias)
    x[2, 7] = bad
    y = F.linear(x, weight, bias)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].equal(clean[[0, 1, 3]])


def test_meta():
    """Shapes alone, as tools do before the weights are loaded."""
    weight = make().to("meta")
    for x in (torch.randn(2, 3, K, device="meta"), torch.randn(3, K, device="meta")):
        y = F.linear(x, weight, torch.randn(N, device="meta"))
        assert (y.shape, y.device.type) == ((*x.shape[:-1], N), "meta")


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_flow_through(activation, shape):
    """By x's own product with W, rounding ignored; none to the weight."""
    weight, x, bias = make(activation=activation), torch.randn(shape, requires_grad=True), torch.randn(N)
    kept = nn.Parameter(weight.t(), requires_grad=False)
    bias.requires_grad_()
    products = [lambda: F.linear(x, weight, bias), lambda: x @ weight.t() + bias, lambda: x @ kept + bias]
    if x.dim() == 2:
        products.append(lambda: torch.addmm(bias, x, kept))
    grad = torch.randn(*shape[:-1], N)
    for product in products:
        x.grad = bias.grad = None
        product().backward(grad)
        torch.testing.assert_close(x.grad, grad @ weight.dequantize())
        torch.testing.assert_close(bias.grad, grad.reshape(-1, N).sum(0))
    bias.requires_grad_(False)
    with torch.no_grad():
        assert not F.linear(x, weight, bias).requires_grad
    assert not F.linear(x.detach(), weight, bias).requires_grad


@pytest.mark.parametrize(("activation", "dtype"), [("dynamic", torch.bfloat16), ("none", torch.float32)])
def test_inductor(activation, dtype):
    module, other = (
        nn.Sequential(
            Layer(64, K, activation=activation, dtype=dtype),
            nn.GELU(),
            Layer(K, 64, activation=activation, dtype=dtype),
        )
        for _ in range(2)
    )
    x, compiled = torch.randn(2, 5, K).to(dtype), torch.compile(module, fullgraph=True)
    # Inductor keeps float32 between the layers where eager rounds to bfloat16: now and then the next rounding to FP8
    # (2^-4 of a value) falls to the other side
    allowed = 1e-5 if dtype is torch.float32 else 2.0**-5
    with torch.no_grad():
        assert (compiled(x) - module(x)).float().norm() <= allowed * module(x).float().norm()
        module.load_state_dict(other.state_dict())
        assert (compiled(x) - other(x)).float().norm() <= allowed * other(x).float().norm()


@pytest.mark.parametrize(
    ("activation", "mode"),
    [("dynamic", torch.no_grad), ("dynamic", torch.inference_mode), ("none", contextlib.nullcontext)],
)
def test_traced_products(activation, mode):
    """Every form of product, with and without the layout, through AOTAutograd and Inductor's decompositions."""
    weight, bias = make(activation=activation), torch.randn(N)
    kept = nn.Parameter(make(activation=activation, expanded=False).t(), requires_grad=False)

    @torch.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    def products(x):
        turned = x.transpose(0, 1)
        first, second = weight.split([8, 16])
        return (
            F.linear(x, weight, bias), turned @ weight.t(), torch.addmm(bias, x[0], kept), F.linear(turned, first),
            F.linear(x, second), x @ weight.dequantize().t(), F.linear(x, weight.bfloat16().float().contiguous()),
        )  # fmt: skip

    x = torch.randn(4, 3, K)
    eager = products._torchdynamo_orig_callable
    with mode():
        torch.testing.assert_close(products(x), eager(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(products(x[:2]), eager(x[:2]), rtol=1e-5, atol=1e-5)


def pack_both(ours, theirs, activation="none"):
    """Pack the weights of one module, and put them dequantized into its twin."""
    for name, parameter in list(ours.named_parameters(recurse=False)):
        if parameter.dim() == 2:
            weight = Float8Sparse24Tensor.from_hp(parameter, activation=activation).expand()
            ours.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            theirs.register_parameter(name, nn.Parameter(weight.dequantize()))


def attention(batch_first, activation="none", kdim=None):
    """nn.MultiheadAttention with packed projections, and the same with the dequantized ones."""
    ours = nn.MultiheadAttention(64, 4, batch_first=batch_first, kdim=kdim, vdim=kdim).eval()
    theirs = copy.deepcopy(ours)
    pack_both(ours, theirs, activation)
    pack_both(ours.out_proj, theirs.out_proj, activation)
    return ours, theirs


def inputs(kind, batch_first, kdim=None):
    query, key, value = torch.randn(2, 5, 64), torch.randn(2, 7, kdim or 64), torch.randn(2, 7, kdim or 64)
    given = {"self": (query,) * 3, "encoder-decoder": (query, key, key), "all different": (query, key, value)}[kind]
    if batch_first:
        return given
    made = {id(one): one.transpose(0, 1) for one in (query, key, value)}
    return tuple(made[id(one)] for one in given)


KINDS = ["self", "encoder-decoder", "all different"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind, batch_first, mode):
    ours, theirs = attention(batch_first)
    given = inputs(kind, batch_first)
    mask = torch.zeros(2, given[1].shape[1 if batch_first else 0], dtype=torch.bool)
    mask[1, 3:] = True
    for arguments in ({}, {"need_weights": False}, {"key_padding_mask": mask}):
        with mode():
            y, weights = ours(*given, **arguments)
            expected, expected_weights = theirs(*given, **arguments)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "products"), zip(KINDS, (2, 3, 4), strict=True))
def test_attention_projects_equal_inputs_at_once(kind, products, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "hwpq_fx.kernels.packed_products.linear24", lambda *given: calls.append(given) or linear24(*given)
    )
    attention(True)[0](*inputs(kind, True))
    assert len(calls) == products


def test_attention_with_other_key_width_and_unbatched():
    ours, theirs = attention(True, kdim=32)
    given = inputs("all different", True, 32)
    torch.testing.assert_close(ours(*given), theirs(*given), rtol=1e-5, atol=1e-5)
    ours, theirs = attention(False)
    given = (torch.randn(5, 64),) * 3
    torch.testing.assert_close(ours(*given), theirs(*given), rtol=1e-5, atol=1e-5)
    named = dict(zip(("query", "key", "value"), given, strict=True))
    torch.testing.assert_close(ours(**named), theirs(**named), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_gradients(kind):
    ours, theirs = attention(True)
    given = inputs(kind, True)
    grads = []
    for one in (ours, theirs):
        leaves = {id(x): x.clone().requires_grad_() for x in given}
        one(*(leaves[id(x)] for x in given))[0].square().sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()] + [one.in_proj_bias.grad, one.out_proj.bias.grad])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_with_fp8_inputs(kind):
    """The inputs' rounding, 2^-4 at most of each, is all that separates it from the dequantized reference."""
    ours, theirs = attention(True, "dynamic")
    given = inputs(kind, True)
    with torch.no_grad():
        y, expected = ours(*given)[0], theirs(*given)[0]
    assert 0 < (y - expected).norm() / expected.norm() < 0.1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = ours(*given)[0]
    assert (y - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_transformer_layers(mode):
    """Their fast paths, which would hand the raw weights to one fused kernel, stand aside."""
    for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        ours = kind(64, 4, 128, batch_first=True).eval()
        theirs = copy.deepcopy(ours)
        for packed_one, dense_one in zip(ours.modules(), theirs.modules(), strict=True):
            pack_both(packed_one, dense_one)
        x = torch.randn(2, 5, 64)
        given = (x,) if kind is nn.TransformerEncoderLayer else (x, torch.randn(2, 7, 64))
        with mode():
            torch.testing.assert_close(ours(*given), theirs(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_traced_attention(kind):
    ours, theirs = attention(True)
    compiled = torch.compile(ours, backend="aot_eager_decomp_partition", fullgraph=True)
    given = inputs(kind, True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given)[0], theirs(*given)[0], rtol=1e-5, atol=1e-5)


def test_a_shape_that_does_not_fit_is_told():
    for shape in ((0,), (), (3, K + 8)):
        with pytest.raises(RuntimeError, match=rf"does not fit a packed weight of {K} input channels"):
            F.linear(torch.randn(shape), make())


def test_autocast_leaves_float64():
    weight, x = make(dtype=torch.float64), torch.randn(3, K, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, weight).dtype is torch.float64


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_flops_are_those_of_the_dense_product(activation):
    with FlopCounterMode(display=False) as counter:
        F.linear(torch.randn(2, 5, K), make(activation=activation))
    assert counter.get_total_flops() == 2 * 10 * K * N
