import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from hwpq_fx.kernels import (
    Float8Sparse24Tensor,
    linear24,
    pack24,
    packed,
    quantize_rows,
    quantize_weight_rows,
    unpack24,
)
from hwpq_fx.kernels.linear24 import cpu_product_dtype

N, K = 24, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("dynamic", "none")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make(rows=N, cols=K, activation="dynamic", dtype=torch.float32, expanded=True):
    weight = Float8Sparse24Tensor.from_hp(torch.randn(rows, cols).to(dtype), activation=activation)
    return weight.expand() if expanded else weight


def same(a, b):
    """Every part and every attribute alike, bit for bit."""
    names, attributes = a.__tensor_flatten__()
    other_names, other_attributes = b.__tensor_flatten__()
    assert (type(a), names, attributes) == (type(b), other_names, other_attributes)
    for name in names:
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.contiguous().view(torch.uint8).equal(theirs.contiguous().view(torch.uint8))


def check(y, x, weight, bias=None):
    """y against x W^T + b in float64, within what float32 sums and the roundings on the way may add.

    The CPU may multiply FP8 in bfloat16: exact on the way in, rounded once on the way out.
    """
    dtype, product_dtype = x.dtype, x.dtype
    dense = weight.dequantize(torch.float64)
    if weight.activation == "dynamic":
        product_dtype = cpu_product_dtype(dtype)
        values, scale = quantize_rows(x)
        x = values.double() * scale.double()
    x, bias = x.double(), torch.zeros(len(dense)).double() if bias is None else bias.double()
    product, size = x @ dense.t(), x.abs() @ dense.abs().t() + bias.abs()
    allowed = (x.shape[-1] + 8) * UNIT[torch.float32] * size + UNIT[product_dtype] * product.abs()
    allowed += 2 * UNIT[dtype] * (product.abs() + bias.abs())
    if weight.activation == "none":  # for many rows the weight itself is rounded to the model's dtype
        allowed += UNIT[dtype] * size
    assert y.dtype is dtype
    assert y.shape == product.shape
    assert ((y.double() - product - bias).abs() <= allowed).all()


class Layer(nn.Module):
    def __init__(self, rows=N, cols=K, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(make(rows, cols, **kwargs), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(rows).to(self.weight.dtype))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


# packing


@st.composite
def weights(draw):
    """[N, 8G] full of ties and zeros."""
    rows, groups = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    entry = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-30]), st.floats(-100, 100, width=32))
    return torch.tensor(draw(st.lists(entry, min_size=rows * groups * 4, max_size=rows * groups * 4))).view(rows, -1)


def best_two(weight):
    """Python's stable sort of every four: the lower index stays on ties."""
    mask = []
    for group in weight.abs().reshape(-1, 4).tolist():
        kept = sorted(range(4), key=lambda i: -group[i])[:2]
        mask += [i in kept for i in range(4)]
    return torch.tensor(mask).view_as(weight)


@settings(deadline=None, max_examples=120)
@given(weights(), st.sampled_from(ACTIVATIONS))
def test_from_hp_keeps_the_two_largest(weight, activation):
    packed_weight = Float8Sparse24Tensor.from_hp(weight, activation=activation)
    mask = best_two(weight)
    values, scale = quantize_weight_rows(weight * mask)
    qdata, sparse_metadata = pack24(values, mask)
    assert packed_weight.qdata.view(torch.uint8).equal(qdata.view(torch.uint8))
    assert packed_weight.sparse_metadata.equal(sparse_metadata)
    assert packed_weight.scale.equal(scale)
    assert (packed_weight.shape, packed_weight.dtype) == (weight.shape, weight.dtype)
    assert (packed_weight.activation, packed_weight.transposed, packed_weight.prepacked) == (activation, False, None)


@settings(deadline=None, max_examples=60)
@given(weights())
def test_dequantize_is_value_times_scale(weight):
    packed_weight = Float8Sparse24Tensor.from_hp(weight)
    values = unpack24(packed_weight.qdata, packed_weight.sparse_metadata)
    exact = packed_weight.dequantize(torch.float64)
    assert exact.equal(values.double() * packed_weight.scale.double())
    assert not exact.masked_select(~best_two(weight)).signbit().any()
    for dtype in DTYPES:
        assert packed_weight.dequantize(dtype).equal((values.float() * packed_weight.scale).to(dtype))
    assert packed_weight.dequantize().dtype is weight.dtype


@settings(deadline=None, max_examples=60)
@given(weights(), st.integers(-40, 40))
def test_a_power_of_two_changes_neither_mask_nor_values(weight, power):
    weight = torch.where(weight.abs() < 1e-20, 0, weight)
    weight[:, 0] += weight[:, 0].sign() + (weight[:, 0] == 0)  # a row that is not all zeros
    a, b = Float8Sparse24Tensor.from_hp(weight), Float8Sparse24Tensor.from_hp(weight * 2.0**power)
    assert a.qdata.view(torch.uint8).equal(b.qdata.view(torch.uint8))
    assert a.sparse_metadata.equal(b.sparse_metadata)
    assert b.scale.equal(a.scale * 2.0**power)


def test_from_hp_obeys_mask_and_factor():
    weight = torch.randn(N, K)
    mask = ~best_two(weight)
    factor = torch.rand(N) + 0.5
    plain, scaled = (Float8Sparse24Tensor.from_hp(weight, mask, factor=f) for f in (None, factor))
    kept = unpack24(plain.qdata, plain.sparse_metadata).float()
    assert kept[~mask].eq(0).all()
    # what is kept is off by half a step of e4m3: 2^-4 of itself, or 2^-10 scales near zero
    error = (plain.dequantize() - weight)[mask].abs()
    assert (error <= torch.maximum(weight.abs() * 2.0**-4, plain.scale * 2.0**-10)[mask] * 1.0001).all()
    assert scaled.qdata.view(torch.uint8).equal(plain.qdata.view(torch.uint8))
    assert scaled.scale.equal(plain.scale * factor.view(-1, 1))
    assert Float8Sparse24Tensor.from_hp(weight, mask, factor=factor.double()).scale.dtype is torch.float32


def test_from_hp_takes_any_strides_and_drops_gradients():
    weight = nn.Parameter(torch.randn(K, N))
    turned = Float8Sparse24Tensor.from_hp(weight.t(), factor=torch.ones(N, requires_grad=True))
    same(turned, Float8Sparse24Tensor.from_hp(weight.detach().t().contiguous()))
    for name in turned.tensor_data_names:
        assert getattr(turned, name).is_contiguous()
        assert not getattr(turned, name).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda w: {"weight": w[0]}, "2-D floating point"),
        (lambda w: {"weight": w.int()}, "2-D floating point"),
        (lambda w: {"weight": w.to(torch.float8_e4m3fn)}, "2-D floating point"),
        (lambda w: {"weight": w[:, :12]}, "K = 12 is not a multiple of 8"),
        (lambda w: {"weight": w.index_fill(1, torch.tensor(3), float("nan"))}, "NaN or Inf"),
        (lambda w: {"weight": w.index_fill(1, torch.tensor(3), float("inf"))}, "NaN or Inf"),
        (lambda w: {"weight": w, "activation": "static"}, "'static' is not one of"),
        (lambda w: {"weight": w, "mask": best_two(w)[1:]}, r"mask is \(23, 32\)"),
        (lambda w: {"weight": w, "mask": best_two(w)[:1]}, r"mask is \(1, 32\)"),
        (lambda w: {"weight": w, "mask": best_two(w).float()}, "mask is .* torch.float32"),
        (lambda w: {"weight": w, "mask": torch.ones(N, K, dtype=torch.bool)}, "exactly two of every four"),
        (lambda w: {"weight": w, "factor": torch.ones(1)}, r"factor is \(1,\), the weight has 24 rows"),
    ],
)
def test_from_hp_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        Float8Sparse24Tensor.from_hp(**arguments(torch.randn(N, K)))


def test_bytes():
    weight = make(64, 128, expanded=False)
    assert weight.packed_nbytes() == 64 * 128 * 5 // 8 + 64 * 4
    assert weight.layout_nbytes() == 0
    expanded = make(64, 128, activation="none").expand()
    assert expanded.packed_nbytes() == weight.packed_nbytes()
    assert expanded.layout_nbytes() == 64 * 128 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_expand(dtype):
    """The layout for CPU products: FP8 values as they are, or the weight in the model's dtype."""
    weight = make(dtype=dtype, expanded=False)
    values = unpack24(weight.qdata, weight.sparse_metadata)
    assert weight.expand().prepacked.dtype is cpu_product_dtype(dtype)
    assert weight.expand().prepacked.float().equal(values.float())
    weight = make(dtype=dtype, activation="none", expanded=False)
    assert weight.expand().prepacked.equal(weight.dequantize())
    assert weight.to("meta").expand().prepacked is None


def test_repr():
    text = (
        "Float8Sparse24Tensor(shape=(24, 32), dtype=torch.bfloat16, device=cpu, activation='none', "
        "prepacked_for='dense')"
    )
    weight = make(dtype=torch.bfloat16, activation="none")
    assert repr(weight) == text
    assert text in repr(nn.Parameter(weight, requires_grad=False))


# products


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


# views


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_are_cut_without_copying(activation):
    weight, x = make(activation=activation), torch.randn(3, K)
    dense, y = weight.dequantize(), F.linear(x, weight)
    for rows in (slice(2, 9), slice(-5, None), slice(0, 0), slice(None), slice(1, None, 3)):
        part = weight[rows]
        assert isinstance(part, Float8Sparse24Tensor)
        assert part.dequantize().equal(dense[rows])
        assert part.prepacked.equal(weight.prepacked[rows])
        torch.testing.assert_close(F.linear(x, part), y[:, rows])
    assert weight[2:9].qdata.data_ptr() == weight.qdata[2].data_ptr()
    assert weight.narrow(0, 3, 4).dequantize().equal(dense[3:7])
    assert weight.t()[:, 2:9].dequantize().equal(dense.t()[:, 2:9])
    assert weight[:, :].dequantize().equal(weight[:, -K:].dequantize())


def test_cut_into_pieces():
    weight = make()
    dense = weight.dequantize()
    for pieces, expected in (
        (weight.chunk(3), dense.chunk(3)),
        (weight.chunk(5), dense.chunk(5)),
        (weight.split(7), dense.split(7)),
        (weight.split([8, 16]), dense.split([8, 16])),
        (weight.split(10, dim=-2), dense.split(10)),
        (weight.tensor_split(5), dense.tensor_split(5)),
        (weight.t().split([8, 16], 1), dense.t().split([8, 16], 1)),
        (weight.t().chunk(3, -1), dense.t().chunk(3, -1)),
    ):
        assert [p.shape for p in pieces] == [p.shape for p in expected]
        assert all(p.dequantize().equal(e) for p, e in zip(pieces, expected, strict=True))
    with pytest.raises(RuntimeError, match="do not add up to 24"):
        weight.split([8, 8])


@pytest.mark.parametrize(
    "cut",
    [
        lambda w: w[:, 4:],
        lambda w: w[:, :-6],
        lambda w: w[:, ::2],
        lambda w: w.narrow(1, 8, 12),
        lambda w: w.split(12, 1),
        lambda w: w.t()[1:],
    ],
)
def test_columns_that_are_packed_together_are_not_cut(cut):
    with pytest.raises(NotImplementedError, match="at multiples of 8 only"):
        cut(make())


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_columns_are_cut_without_copying(activation, expanded):
    weight = make(activation=activation)
    weight = weight.expand() if expanded else weight.bare()
    dense = weight.dequantize()
    for part, expected in (
        (weight[:, 8:], dense[:, 8:]),
        (weight[:, :-8], dense[:, :-8]),
        (weight[:, 16:8], dense[:, 16:8]),
        (weight.narrow(1, 8, 16), dense[:, 8:24]),
        (weight.split(16, 1)[-1], dense.split(16, 1)[-1]),
        (weight.chunk(2, dim=-1)[0], dense.chunk(2, dim=-1)[0]),
        (weight.t()[8:].t(), dense[:, 8:]),
        (weight[2:9, 8:16], dense[2:9, 8:16]),
    ):
        assert part.shape == expected.shape
        assert part.dequantize().equal(expected)
        assert (part.prepacked is not None) is expanded
        x = torch.randn(9, part.shape[1])
        if x.numel():
            y = F.linear(x, part)
            assert (y - x @ expected.t()).norm() < 0.05 * y.norm()
            assert y.equal(F.linear(x, copy.deepcopy(part)))
    assert weight[:, 8:].qdata.data_ptr() == weight.qdata[:, 4:].data_ptr()


def test_kernels_get_parts_without_gaps(monkeypatch):
    weight = make(expanded=False)
    for part in (weight[:, 8:24], weight[::2]):
        given = []
        monkeypatch.setattr("hwpq_fx.kernels.packed.linear24", lambda *args, given=given: given.append(args))
        F.linear(torch.randn(3, part.shape[1]), part)
        assert not part.qdata.is_contiguous()
        assert all(one.is_contiguous() for one in given[0][2:5])


@pytest.mark.parametrize("expanded", [False, True])
def test_pieces_are_joined(expanded):
    weight, other = (one.expand() if expanded else one.bare() for one in (make(), make()))
    for dim in (0, 1, -1):
        joined = torch.cat(weight.chunk(2, dim), dim)
        same(joined, weight)
        assert (joined.prepacked is not None) is expanded
        assert joined.scale.data_ptr() != weight.scale.data_ptr()
    same(torch.cat(weight.t().chunk(3, 1), 1), weight.t())
    assert torch.cat([weight, other]).dequantize().equal(torch.cat([weight.dequantize(), other.dequantize()]))
    with pytest.raises(NotImplementedError, match="only where they have the same scales"):
        torch.cat([weight, other], 1)
    for odd in (weight.t(), weight.bfloat16(), weight.dequantize(), make(activation="none")):
        with pytest.raises(NotImplementedError, match="of one activation, orientation and dtype"):
            torch.cat([weight, odd])


def test_transposes():
    weight = make()
    dense = weight.dequantize()
    for turned in (
        weight.t(), weight.T, weight.mT, weight.transpose(0, 1), weight.transpose(-1, 0), weight.permute(1, 0),
        weight.permute(-1, -2),
    ):  # fmt: skip
        assert turned.transposed
        assert turned.dequantize().equal(dense.t())
        assert turned.qdata.data_ptr() == weight.qdata.data_ptr()
    for unturned in (weight.t().t(), weight.permute(0, 1), weight.transpose(1, 1), weight.transpose(0, -2)):
        same(unturned, weight)
    for call in (lambda: weight.transpose(0, 2), lambda: weight.permute(-3, 0)):
        with pytest.raises(IndexError, match="2 dimensions"):
            call()


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_mode(activation, made_inside):
    """There torch hands composite ops over whole, and views of normal tensors are normal tensors."""
    with torch.inference_mode(made_inside):
        weight = make(activation=activation)
    x, bias, dense = torch.randn(5, 3, K).transpose(0, 1), torch.randn(N), weight.dequantize()
    expected = F.linear(x, weight, bias)
    with torch.inference_mode():
        assert F.linear(x, weight, bias).equal(expected)
        torch.testing.assert_close(x @ weight.t() + bias, expected)
        torch.testing.assert_close(x @ weight.mT + bias, expected)
        assert torch.addmm(bias, x[0], weight.T).equal(F.linear(x[0], weight, bias))
        for piece, part in zip(weight.chunk(3), dense.chunk(3), strict=True):
            assert piece.dequantize().equal(part)
        assert weight.narrow(0, 2, 4).dequantize().equal(dense[2:6])
        assert weight.tensor_split(3)[1].dequantize().equal(dense[8:16])
        assert weight[3:5].t().is_inference() is made_inside
        with torch._C.DisableTorchFunctionSubclass():  # as inside attention
            assert F.linear(x, weight, bias).equal(expected)
        same(weight.detach(), weight)
        same(copy.deepcopy(weight), weight)
        same(nn.Parameter(weight, requires_grad=False).data, weight)
        assert weight.to(torch.bfloat16).dtype is weight.bfloat16().dtype is torch.bfloat16
        assert weight.to("cpu", copy=True).dequantize().equal(dense)
        assert weight.to("meta").is_meta
    same(weight.t().t(), weight)


# copies, casts, files


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_copies(expanded, transposed):
    weight = make(dtype=torch.bfloat16, activation="none", expanded=expanded)
    weight = weight.t() if transposed else weight
    pickled = pickle.loads(pickle.dumps(weight))
    for other in (weight.clone(), copy.deepcopy(weight), weight.to(weight.dtype, copy=True), pickled):
        same(other, weight)
        assert other.qdata.data_ptr() != weight.qdata.data_ptr()
    for other in (weight.detach(), weight.data, weight.contiguous(), copy.copy(weight), weight.requires_grad_(False)):
        same(other, weight)
        assert other.qdata.data_ptr() == weight.qdata.data_ptr()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_parameter(requires_grad):
    parameter = nn.Parameter(make(), requires_grad=requires_grad)
    for one in (parameter, copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert type(one) is Float8Sparse24Tensor
        assert isinstance(one, nn.Parameter)
        assert one.requires_grad is requires_grad
        same(one, parameter)
    shared = nn.ModuleList([Layer(), Layer()])
    shared[1].weight = shared[0].weight
    twin = copy.deepcopy(shared)
    assert twin[0].weight is twin[1].weight is not shared[0].weight


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtype_and_device(activation):
    weight = make(activation=activation)
    for cast, dtype in (
        (weight.half(), torch.float16),
        (weight.bfloat16(), torch.bfloat16),
        (weight.to(torch.bfloat16, memory_format=torch.preserve_format), torch.bfloat16),
        (weight.to("cpu", torch.float16), torch.float16),
        (weight.to(torch.zeros(1).bfloat16()), torch.bfloat16),
        (weight.type(torch.float16), torch.float16),
        (weight.double(), torch.float64),
    ):
        assert cast.dtype is dtype
        assert cast.scale.equal(weight.scale)
        same(cast, weight._with(dtype=dtype).expand())
    assert weight.to("cpu") is weight
    assert weight.to(torch.float32) is weight
    assert make(expanded=False).half().prepacked is None
    meta = weight.to("meta")
    assert {meta.device.type, meta.qdata.device.type, meta.scale.device.type} == {"meta"}
    assert meta.prepacked is None
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(NotImplementedError, match="dequantize"):
            weight.to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_like(activation):
    weight = make(activation=activation)
    empty = torch.empty_like(weight, dtype=torch.bfloat16)
    assert (type(empty), empty.shape, empty.dtype) == (Float8Sparse24Tensor, weight.shape, torch.bfloat16)
    assert empty.prepacked.dtype is weight.bfloat16().prepacked.dtype
    assert torch.empty_like(weight, device="meta").prepacked is None
    assert torch.empty_like(weight.to("meta"), device="cpu").prepacked is not None
    assert torch.empty_like(weight.bare()).prepacked is None


def test_odds_and_ends():
    weight = make()
    assert (weight.shape, weight.size(), weight.stride()) == ((N, K), (N, K), (K, 1))
    assert (weight.dim(), weight.numel()) == (2, N * K)
    assert weight.is_floating_point()
    assert weight.is_contiguous()
    assert weight.is_pinned() is False
    assert weight.share_memory_() is weight
    assert weight.qdata.is_shared()
    with pytest.raises(NotImplementedError):
        weight.abs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_module_casts(activation, dtype):
    layer = Layer(activation=activation)
    qdata = layer.weight.qdata.view(torch.uint8).clone()
    layer.to(dtype)
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.weight, Float8Sparse24Tensor)
    assert (layer.weight.dtype, layer.weight.requires_grad) == (dtype, False)
    assert layer.weight.qdata.view(torch.uint8).equal(qdata)
    x = torch.randn(3, K).to(dtype)
    check(layer(x).detach(), x, layer.weight, layer.bias)
    state = layer.state_dict()
    layer.to("meta").to_empty(device="cpu").load_state_dict(state)
    same(layer.weight.data, state["weight"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_file(activation):
    """Weights only, and only the packed ones: the layout for the CPU is made again."""
    layer = Layer(256, 256, activation=activation)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert layer.weight.layout_nbytes() > 2 * len(file.getvalue())
    assert layer.weight.packed_nbytes() < len(file.getvalue()) < layer.weight.packed_nbytes() + 5000
    file.seek(0)
    state = torch.load(file, weights_only=True)
    same(state["weight"], layer.weight.data)
    x = torch.randn(3, 256)
    for assign in (False, True):
        other = Layer(256, 256, activation=activation)
        assert not other(x).equal(layer(x))
        other.load_state_dict(state, assign=assign)
        assert isinstance(other.weight, nn.Parameter)
        same(other.weight.data, layer.weight.data)
        assert other(x).equal(layer(x))
    file.seek(0)
    assert torch.load(file, weights_only=True, map_location="meta")["weight"].prepacked is None


def test_a_weight_from_another_device_gets_its_layout():
    rebuild, arguments = make().to("meta").__reduce_ex__(2)
    on_cpu = make(expanded=False)
    parts = [getattr(on_cpu, name) for name in on_cpu.tensor_data_names]
    same(rebuild(*parts, *arguments[3:]), on_cpu.expand())


@pytest.mark.parametrize("swap", [False, True])
def test_loading_refreshes_the_layout(swap):
    """`prepacked` is what the CPU multiplies by: it must follow, also where it is a view into another one's."""
    ours, theirs = Layer(), Layer()
    rows = None if swap else ours.weight[4:8]
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        ours.load_state_dict(theirs.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    same(ours.weight.data, theirs.weight.data)
    if rows is not None:
        same(rows, theirs.weight[4:8])
    bare = make(expanded=False)
    bare.copy_(theirs.weight)
    assert bare.prepacked is None
    assert bare.dequantize().equal(theirs.weight.dequantize())
    half = make(dtype=torch.float16, activation="none")
    half.copy_(make(activation="none"))
    assert half.prepacked.equal(half.dequantize())


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (make, lambda: torch.randn(N, K), "dense tensor cannot be copied into a packed"),
        (lambda: torch.zeros(N, K), make, "packed 2:4 weight cannot be copied into a dense"),
        (make, lambda: make(rows=8), "differ"),
        (make, lambda: make(activation="none"), "differ"),
        (lambda: make(rows=K).t(), lambda: make(rows=K), "differ"),
    ],
)
def test_copy_refuses(target, source, message):
    target = target()
    before = target.clone()
    with pytest.raises(ValueError, match=message):
        target.copy_(source())
    if isinstance(target, Float8Sparse24Tensor):
        same(target, before)


def test_a_dense_checkpoint_does_not_load_and_none_loads_into_a_dense_model():
    with pytest.raises(RuntimeError, match="dense tensor cannot be copied into a packed"):
        Layer().load_state_dict(nn.Linear(K, N).state_dict())
    with pytest.raises(RuntimeError, match="packed 2:4 weight cannot be copied into a dense"):
        nn.Linear(K, N).load_state_dict(Layer().state_dict())


# torch.compile


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


def test_cache_key(monkeypatch):
    """What a compiled product depends on is part of AOTAutograd's key: parts, attributes, and our own source."""
    weight = make()
    others = [
        make(activation="none"), make(rows=8), make(cols=64), make(expanded=False), make(dtype=torch.bfloat16),
        weight.t(), weight._with(prepacked=weight.prepacked.double()), nn.Parameter(weight), weight.to("meta"),
        weight._with(sparse_metadata=weight.sparse_metadata.t().contiguous().t()),
    ]  # fmt: skip
    keys = [one._stable_hash_for_caching() for one in (weight, *others)]
    assert len(set(keys)) == len(keys)
    assert make()._stable_hash_for_caching() == keys[0]
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(weight)
        assert fake._stable_hash_for_caching() == keys[0]
        assert keys[0] in fake.__reduce_ex__(2)[1]  # how torch 2.11 makes its key
    assert len(weight.__reduce_ex__(2)[1]) < len(fake.__reduce_ex__(2)[1])  # a file does not hold it
    monkeypatch.setattr(packed, "_source_hash", lambda: "edited")
    assert weight._stable_hash_for_caching() != keys[0]


# attention


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
    monkeypatch.setattr("hwpq_fx.kernels.packed.linear24", lambda *given: calls.append(given) or linear24(*given))
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
