import sys

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import decompositions
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode

from hwpq_fx.kernels import Float8Sparse24Tensor, linear24, quantize_rows
from hwpq_fx.kernels.linear24 import DENSE, cpu_product_dtype, dense_layout, linear24_reference

N, K = 24, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "x_scale", "qdata", "sparse_metadata", "scale", "bias", "prepacked", "x_hp", "out_dtype", "prepacked_for")


def arguments(fp8, dtype=torch.float32, shape=(3, K), bias=True, dense=True, contiguous=True):
    """What `linear24` takes, by name."""
    x = torch.randn(shape).to(dtype)
    x = x if contiguous else x.transpose(0, -2).contiguous().transpose(0, -2)
    values, x_scale = quantize_rows(x) if fp8 else (x, None)
    weight = Float8Sparse24Tensor.from_hp(torch.randn(N, shape[-1]), activation="dynamic" if fp8 else "none")
    parts = (weight.qdata, weight.sparse_metadata, weight.scale)
    dense = dense_layout(*parts, dtype, fp8) if dense else None
    bias = torch.randn(N).to(dtype) if bias else None
    return dict(zip(NAMES, (values, x_scale, *parts, bias, dense, None, dtype, DENSE), strict=True))


def call(op, given):
    return op(*(given[name] for name in NAMES))


def dense_weight(given):
    """W [N, K] in float64, by the format alone."""
    metadata, rows = given["sparse_metadata"], given["qdata"].shape[0]
    indices = torch.stack([metadata >> shift & 3 for shift in (0, 2, 4, 6)], -1).view(rows, -1, 2).long()
    dense = torch.zeros(rows, indices.shape[1], 4, dtype=torch.float64)
    dense.scatter_(-1, indices, given["qdata"].double().view(indices.shape))
    return dense.view(rows, -1) * given["scale"].double()


def reference(given):
    """y in float64, and how far from it float32 accumulation and the roundings on the way may end."""
    out, fp8 = given["out_dtype"], given["x_scale"] is not None
    x = given["x"].double() * (given["x_scale"].double() if fp8 else 1)
    weight = dense_weight(given)
    bias = torch.zeros(len(weight), dtype=torch.float64) if given["bias"] is None else given["bias"].double()
    product, size = x @ weight.t(), x.abs() @ weight.abs().t() + bias.abs()
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    # every sum in float32, in whatever order; the product once in its own dtype; the bias and the result in `out`
    allowed = (x.shape[-1] + 8) * unit[torch.float32] * size + 2 * unit[out] * (product.abs() + bias.abs())
    allowed += unit[cpu_product_dtype(out) if fp8 else out] * product.abs()
    allowed += 0 if fp8 else unit[out] * size  # for many rows the weight itself is rounded
    return product + bias, allowed


def check(y, given):
    expected, allowed = reference(given)
    assert y.dtype is given["out_dtype"]
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= allowed).all()


CASES = {
    "plain": {},
    "no bias": {"bias": False},
    "no dense": {"dense": False},
    "vector": {"shape": (K,)},
    "batch": {"shape": (2, 3, K)},
    "4-D": {"shape": (2, 1, 3, K)},
    "empty": {"shape": (0, K)},
    "empty batch": {"shape": (2, 0, K)},
    "strided": {"shape": (2, 3, K), "contiguous": False},
    "long sums": {"shape": (4, 4096)},
    "one long sum": {"shape": (1, 4096)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [True, False])
def test_definition(fp8, dtype, case):
    given = arguments(fp8, dtype, **CASES[case])
    check(call(linear24, given), given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [True, False])
def test_dense_changes_nothing(fp8, dtype):
    given = arguments(fp8, dtype, shape=(2, 3, 256))
    assert call(linear24, given).equal(call(linear24, given | {"prepacked": None}))


@pytest.mark.parametrize("native", [True, False])
def test_product_dtype_holds_fp8_products(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    cpu_product_dtype.cache_clear()
    try:
        other = torch.bfloat16 if native else torch.float32
        assert [cpu_product_dtype(dtype) for dtype in DTYPES] == [other, torch.bfloat16, other]
        given = arguments(True, torch.float16, dense=False)
        check(call(linear24, given), given)
        given["x_scale"] = given["x_scale"] * 2.0**-20
        given["x"] = torch.full_like(given["x"], 448.0)  # sums beyond float16
        check(call(linear24, given), given)
    finally:
        cpu_product_dtype.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp8", [True, False])
def test_autocast_outside_changes_nothing(fp8, dtype):
    """Its callers have obeyed it; in float16 the sums of FP8 products would overflow."""
    given = arguments(fp8, shape=(3, 256))
    y = call(linear24, given)
    with torch.autocast("cpu", dtype):
        assert call(linear24, given).equal(y)


def test_bias_of_another_dtype():
    for fp8 in (True, False):
        given = arguments(fp8, torch.bfloat16)
        given["bias"] = torch.randn(N)
        check(call(linear24, given), given)


# what is wrong, and the message; each is rejected by the op, its fake, its reference and Inductor's decomposition
WRONG = {
    "x of another width": (True, {"x": lambda g: g["x"][:, :-8].contiguous()}, "does not fit qdata"),
    "x without dimensions": (False, {"x": lambda g: torch.zeros(())}, "does not fit qdata"),
    "qdata 1-D": (True, {"qdata": lambda g: g["qdata"].flatten()}, "does not fit qdata"),
    "e4m3 without x_scale": (True, {"x_scale": lambda g: None}, "an e4m3 x needs x_scale"),
    "x_scale without e4m3": (False, {"x_scale": lambda g: torch.ones(3, 1)}, "an e4m3 x needs x_scale"),
    "x not of out_dtype": (False, {"out_dtype": lambda g: torch.bfloat16}, "x is torch.float32, the output"),
    "x_scale of another shape": (True, {"x_scale": lambda g: torch.ones(1, 1)}, "x_scale is"),
    "x_scale bf16": (True, {"x_scale": lambda g: g["x_scale"].bfloat16()}, "x_scale is"),
    "qdata bytes": (True, {"qdata": lambda g: g["qdata"].view(torch.uint8)}, "qdata is"),
    "metadata too short": (True, {"sparse_metadata": lambda g: g["sparse_metadata"][:, 1:]}, "sparse_metadata is"),
    "metadata int32": (True, {"sparse_metadata": lambda g: g["sparse_metadata"].int()}, "sparse_metadata is"),
    "scale 1-D": (True, {"scale": lambda g: g["scale"].flatten()}, "scale is"),
    "scale float64": (True, {"scale": lambda g: g["scale"].double()}, "scale is"),
    "bias too long": (True, {"bias": lambda g: torch.ones(N + 1)}, "bias is"),
    "bias of one": (False, {"bias": lambda g: torch.ones(1)}, "bias is"),
    "dense of another shape": (True, {"prepacked": lambda g: g["prepacked"][:, 1:]}, "prepacked is"),
    "dense float16": (True, {"prepacked": lambda g: g["prepacked"].half()}, "prepacked is"),
    "dense of another dtype": (False, {"prepacked": lambda g: g["prepacked"].bfloat16()}, "prepacked is"),
    "x_hp of another shape": (True, {"x_hp": lambda g: torch.ones(1, K)}, "x_hp is"),
    "x_hp of another dtype": (True, {"x_hp": lambda g: torch.ones(3, K).half()}, "x_hp is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_rejected_everywhere(case):
    fp8, changes, message = WRONG[case]
    given = arguments(fp8)
    given |= {name: change(given) for name, change in changes.items()}
    overload = torch.ops.hwpq_fx.linear24.default
    for op in (linear24, linear24_reference, decompositions[overload]):
        with pytest.raises(RuntimeError, match=f"linear24: .*{message}"):
            call(op, given)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
        with pytest.raises(RuntimeError, match=f"linear24: .*{message}"):
            call(linear24, fakes)


@pytest.mark.parametrize(
    ("gradients", "case"),
    [(True, case) for case in ("plain", "no bias", "no dense", "vector", "empty", "strided")] + [(False, "batch")],
)
@pytest.mark.parametrize("fp8", [True, False])
def test_opcheck(fp8, gradients, case):
    given = arguments(fp8, **CASES[case])
    if gradients:
        if fp8:
            given["x_hp"] = torch.randn(given["x"].shape, requires_grad=True)
        else:
            given["x"].requires_grad_()
        if given["bias"] is not None:
            given["bias"].requires_grad_()
    # torch's schema check compares arguments before and after, which FP8 cannot do
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(linear24, tuple(given.values()), test_utils=tests)


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (0, K)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [True, False])
def test_gradients(fp8, dtype, shape):
    """To x, or straight through the rounding to what x was, and to the bias; in their own dtypes."""
    given = arguments(fp8, dtype, shape=shape)
    source = "x_hp" if fp8 else "x"
    given[source] = torch.randn(shape).to(dtype).requires_grad_()
    given["bias"].requires_grad_()
    y = call(linear24, given)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    grad, weight, unit = grad.double(), dense_weight(given), torch.finfo(dtype).eps
    allowed = 1e-5 * (grad.abs() @ weight.abs()) + unit * (grad @ weight).abs()
    assert given[source].grad.dtype is dtype
    assert ((given[source].grad.double() - grad @ weight).abs() <= allowed).all()
    rows = grad.reshape(-1, N)
    assert given["bias"].grad.dtype is dtype
    assert ((given["bias"].grad.double() - rows.sum(0)).abs() <= 1e-6 + unit * rows.abs().sum(0)).all()


@pytest.mark.parametrize("fp8", [True, False])
def test_gradients_only_where_wanted(fp8, monkeypatch):
    given = arguments(fp8)
    assert not call(linear24, given).requires_grad
    given["bias"].requires_grad_()
    # only a gradient of x needs the weight
    monkeypatch.setattr(sys.modules["hwpq_fx.kernels.linear24"], "unpack24", None)
    call(linear24, given).sum().backward()
    assert given["bias"].grad.eq(3).all()


class Packed(torch.nn.Module):
    def __init__(self, activation, dtype=torch.float32, out=N, width=K):
        super().__init__()
        weight = Float8Sparse24Tensor.from_hp(torch.randn(out, width).to(dtype), activation=activation)
        self.weight = torch.nn.Parameter(weight.expand(), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(out).to(dtype))

    def forward(self, x):
        return F.gelu(F.linear(x, self.weight, self.bias), approximate="tanh")


@pytest.mark.parametrize(("activation", "kernels"), [("dynamic", 2), ("none", 1)])
def test_inductor_sees_through_the_op(activation, kernels):
    """On the CPU the op dissolves: one product, and around it only the scaling kernels that fuse with what follows."""
    module = Packed(activation, out=64, width=64)
    x = torch.randn(5, 64)
    with torch.no_grad():
        eager = module(x)
        compiled, (code,) = run_and_get_code(torch.compile(module), x)
    assert "torch.ops.hwpq_fx" not in code
    assert code.count("async_compile.cpp_pybinding(") == kernels
    assert code.count("extern_kernels.") + code.count("torch.ops.mkl") == 1
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_other_devices_keep_the_op():
    overload = torch.ops.hwpq_fx.linear24.default
    given = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in arguments(True).items()}
    assert call(decompositions[overload], given) is NotImplemented


@pytest.mark.parametrize(("activation", "dtype"), [("dynamic", torch.float32), ("none", torch.bfloat16)])
def test_compiled_gradients(activation, dtype):
    """Forward and backward under Inductor, for a second batch size too, are eager's."""
    module = Packed(activation, dtype)
    compiled = torch.compile(module, dynamic=True)
    for rows in (3, 5):
        grads = []
        x, grad = torch.randn(2, rows, K).to(dtype), torch.randn(2, rows, N).to(dtype)
        for one in (module, compiled):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            one(leaf).backward(grad)
            grads.append((leaf.grad, module.bias.grad.clone()))
        tolerance = 1e-5 if dtype is torch.float32 else 2.0**-5
        torch.testing.assert_close(grads[1], grads[0], rtol=tolerance, atol=tolerance)
        assert grads[0][0].abs().sum() > 0


@pytest.mark.parametrize("activation", ["dynamic", "none"])
def test_compiled_rejects_what_eager_rejects(activation):
    module = Packed(activation)
    module.bias = torch.nn.Parameter(torch.zeros(N + 8))
    for one in (module, torch.compile(module)):
        with pytest.raises(RuntimeError, match="linear24: bias is"):
            one(torch.randn(2, K))


@pytest.mark.parametrize("shape", [(K,), (1, K), (9, K), (2, 1, K), (2, 9, K)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("fp8", [True, False])
def test_the_output_can_be_written_to_while_gradients_are_recorded(fp8, dense, bias, shape):
    given = arguments(fp8, shape=shape, bias=bias, dense=dense)
    source = "x_hp" if fp8 else "x"
    given[source] = torch.randn(shape).requires_grad_()
    y = call(linear24, given)
    assert not y._is_view() and y.shape == (*shape[:-1], N)
    y.mul_(2).sum().backward()
    assert given[source].grad is not None


def test_float64_is_computed_in_float64():
    weight = Float8Sparse24Tensor.from_hp(torch.randn(N, K).double(), activation="none")
    exact = weight.dequantize()
    for packed in (weight, weight.expand()):
        x = torch.randn(9, K).double().requires_grad_()
        y = F.linear(x, packed)
        y.sum().backward()
        torch.testing.assert_close(y, F.linear(x, exact), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(x.grad, exact.sum(0).expand_as(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("activation", ["dynamic", "none"])
@pytest.mark.parametrize("backend", ["inductor", "hwpq"])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_only_the_data_tell(activation, backend):
    """As a mixture of experts gives to each."""
    model = Packed(activation)

    def run(x):
        return model(x[x[:, 0] > 0])

    x = torch.randn(40, K)
    y, expected = torch.compile(run, fullgraph=True, backend=backend)(x), run(x)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())
