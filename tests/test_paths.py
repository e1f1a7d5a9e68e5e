"""Which path serves what, and that the op, the subclass and the lowered graph all run the one that was chosen."""

import sys

import pytest
import torch
import torch.nn.functional as F

from hwpq_fx.kernels import Float8Sparse24Tensor, linear24, packed, packed_products, paths, quantize_rows, table
from hwpq_fx.kernels.paths import EITHER, FP8, HP, PATHS, Target, best_layout, choose, describe
from hwpq_fx.kernels.table import DEFAULT, Table
from hwpq_fx.passes import lower
from hwpq_fx.passes.values import op_name, value_of

lower_module = sys.modules["hwpq_fx.passes.lower"]

HOPPER, AMPERE, ADA = Target(90, "NVIDIA H100 80GB HBM3"), Target(80, "NVIDIA A100"), Target(89, "NVIDIA L40S")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _choose_anew():
    choose.cache_clear()
    yield
    choose.cache_clear()


def chosen(target, m, activation=EITHER, prepacked_for="", table=DEFAULT, dtype=BF16, n=4096, k=4096):
    return choose(target, m, n, k, dtype, activation, prepacked_for, table).name


def test_default_choice(monkeypatch):
    for name in ("cusparselt", "cutlass"):
        monkeypatch.setitem(PATHS, name, PATHS[name]._replace(why_not=lambda arch, *_: "" if arch == 90 else "no"))
    assert [chosen(HOPPER, m) for m in (1, 8, 9, 64, 65)] == ["gemv", "gemv", "tiles", "tiles", "tiles_fp8"]
    assert [chosen(HOPPER, 65, prepacked_for=name) for name in ("cutlass", "cusparselt")] == ["cutlass", "cusparselt"]
    # what is quantized already stays so, what may not be quantized is not
    assert [chosen(HOPPER, m, FP8) for m in (1, 4096)] == ["tiles_fp8", "tiles_fp8"]
    assert [chosen(HOPPER, m, HP, "cutlass") for m in (1, 4096)] == ["gemv", "tiles"]
    # no e4m3 in the hardware: many rows run in 16 bit
    assert [chosen(AMPERE, m) for m in (1, 64, 4096)] == ["gemv", "tiles", "tiles"]
    assert [chosen(ADA, m) for m in (1, 64, 4096)] == ["gemv", "tiles", "tiles_fp8"]


def test_measured_table_rules():
    measured = Table({(4096, 4096): {1: {"tiles": 1.0, "gemv": 2.0}, 64: {"cutlass": 1.0, "tiles_fp8": 2.0}}})
    assert chosen(HOPPER, 1, table=measured) == "tiles"
    assert chosen(HOPPER, 64, table=measured) == "tiles_fp8"  # cutlass has no layout here
    # a path that was not measured, since it failed, is not taken, and another form of x is not either
    assert chosen(HOPPER, 64, HP, table=measured) == "reference"


def test_reference_when_nothing_serves(monkeypatch):
    for name, path in PATHS.items():
        monkeypatch.setitem(PATHS, name, path._replace(why_not=lambda *_: "no"))
    assert [chosen(HOPPER, 1, activation) for activation in (HP, FP8, EITHER)] == ["reference"] * 3
    assert [choose(HOPPER, 1, 8, 8, BF16, activation, "", DEFAULT).fp8 for activation in (HP, FP8)] == [False, True]


def test_no_triton(monkeypatch):
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    assert chosen(HOPPER, 1) == "reference"
    assert PATHS["gemv"].why_not(90, BF16, 8, 8) == "Triton is not installed"


def test_describe(monkeypatch):
    def told(target, activation=EITHER, prepacked_for=""):
        return describe(target, 4096, 4096, BF16, activation, prepacked_for)

    assert told(HOPPER, HP) == "gemv to 8 rows, tiles above"
    assert told(HOPPER) == "gemv to 8 rows, tiles to 64 rows, tiles_fp8 above"
    only = Table({(4096, 4096): {1: {"gemv": 1.0}}})
    monkeypatch.setattr(paths, "table_of", lambda name: only)
    assert told(HOPPER) == "gemv"


def test_best_layout(monkeypatch):
    for name in ("cusparselt", "cutlass"):
        monkeypatch.setitem(PATHS, name, PATHS[name]._replace(why_not=lambda arch, *_: "" if arch == 90 else "no"))
    assert best_layout(HOPPER, 4096, 4096, BF16) == "cusparselt"
    assert best_layout(AMPERE, 4096, 4096, BF16) == ""
    rows = {4: {"cutlass": 1.0, "gemv": 2.0}, 8: {"gemv": 1.0}, 4096: {"cusparselt": 1.0, "cutlass": 2.0}}
    monkeypatch.setattr(paths, "table_of", lambda name: Table({(4096, 4096): rows}))
    assert best_layout(HOPPER, 4096, 4096, BF16) == "cusparselt"  # 2^4 to 2^14 against 1, 2 and 4 rows
    monkeypatch.setattr(paths, "table_of", lambda name: Table({(4096, 4096): {1: {"gemv": 1.0, "cutlass": 1.5}}}))
    assert best_layout(HOPPER, 4096, 4096, BF16) == ""


@pytest.fixture
def as_gpu(monkeypatch):
    """The CPU passes for a Hopper GPU; what runs is noted, and is the plain-torch product."""
    ran = []

    def product_of(name):
        def product(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype):
            fp8 = name not in ("gemv", "tiles")
            assert x.dim() == 2 and x.is_contiguous()
            assert (x.dtype is torch.float8_e4m3fn) == fp8 == (x_scale is not None)
            assert x_scale is None or x_scale.shape == (len(x), 1)
            assert (layout is not None) == (name == "cutlass")
            ran.append((name, len(x)))
            return paths.REFERENCE[fp8].product(x, x_scale, qdata, sparse_metadata, scale, bias, None, out_dtype)

        return product

    for name, path in PATHS.items():
        monkeypatch.setitem(
            PATHS,
            name,
            path._replace(
                why_not=lambda *_, name=name: "no" if name == "cusparselt" else "",
                product=product_of(name),
                make_layout=None if path.make_layout is None else (lambda qdata, metadata: torch.zeros(16)),
                inline=None,
            ),
        )
    for module in (paths, packed, packed_products):
        monkeypatch.setattr(module, "target_of", lambda device: HOPPER)
    monkeypatch.setattr(table, "user_table_file", lambda device: table.Path("/nowhere"))
    return ran


def weight_and_reference(activation="dynamic"):
    weight = Float8Sparse24Tensor.from_hp(torch.randn(24, 64), activation=activation)
    return weight, weight.dequantize()


def run_on_gpu(*args):
    """The op's CUDA implementation, on the CPU."""
    return paths.linear24_cuda(*args)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64), (70, 64)])
def test_op_runs_what_was_chosen(as_gpu, shape):
    weight, dense = weight_and_reference()
    weight = weight.expand()
    assert weight.prepacked_for == "cutlass"
    parts = (weight.qdata, weight.sparse_metadata, weight.scale)
    x, bias = torch.randn(shape), torch.randn(24)
    values, scale = quantize_rows(x)
    rows = x.numel() // 64
    y = run_on_gpu(values, scale, *parts, bias, weight.prepacked, x, x.dtype, "cutlass")
    name, only_fp8, only_hp = (
        ("gemv", "tiles_fp8", "gemv") if rows <= 8 else
        ("tiles", "tiles_fp8", "tiles") if rows <= 64 else ("cutlass", "cutlass", "tiles")
    )  # fmt: skip
    expected = F.linear(values.float() * scale if name == "cutlass" else x, dense, bias)
    assert not y._is_view(), "in-place changes of it would fail while gradients are recorded"
    # FP8 values may be multiplied in bfloat16 here
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item() if rows else 0)
    # with one form of x that one can be taken only
    run_on_gpu(values, scale, *parts, bias, weight.prepacked, None, x.dtype, "cutlass")
    run_on_gpu(x, None, *parts, bias, weight.prepacked, None, x.dtype, "cutlass")
    assert as_gpu == [(name, rows), (only_fp8, rows), (only_hp, rows)]


def test_eager_product_quantizes_only_what_needs_it(as_gpu, monkeypatch):
    weight, dense = weight_and_reference()
    given = []
    monkeypatch.setattr(packed_products, "linear24", lambda *args: given.append(args) or linear24(*args))
    for rows in (4, 100):
        x = torch.randn(rows, 64, requires_grad=True)
        F.linear(x, weight).sum().backward()
        torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))
    few, many = given
    assert (few[0].dtype, few[1], few[7]) == (torch.float32, None, None)
    assert many[0].dtype is torch.float8_e4m3fn and many[7] is not None


def test_paths_are_told(as_gpu):
    weight, _ = weight_and_reference()
    assert weight.paths() == "gemv to 8 rows, tiles to 64 rows, tiles_fp8 above"
    assert weight.expand().paths() == "gemv to 8 rows, tiles to 64 rows, cutlass above"
    weight, _ = weight_and_reference("none")
    assert weight.expand().prepacked is None
    assert weight.paths() == "gemv to 8 rows, tiles above"


def test_rows_of_a_library_layout_cannot_be_cut(as_gpu):
    weight, dense = weight_and_reference()
    part = weight.expand()[3:9]
    assert (part.prepacked, part.prepacked_for) == (None, "")
    assert part.dequantize().equal(dense[3:9])


class Lowered:
    """A Dynamo backend: lower the graph as on the GPU, keep it, run it eagerly."""

    def __init__(self, monkeypatch):
        self.graphs = []
        monkeypatch.setattr(lower_module, "target_of", lambda device: HOPPER)

    def __call__(self, gm, inputs):
        self.graphs.append(lower(gm))
        return self.graphs[-1]

    def ops(self):
        return [str(node.target) for node in self.graphs[-1].graph.nodes if "hwpq_fx" in str(node.target)]

    def quantizes(self):
        return sum(op_name(node) == "amax" for node in self.graphs[-1].graph.nodes)


class Linear(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(len(weight)))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("rows", [(3,), (2, 8), (96,)])
def test_lowered_graph_fixes_the_path(rows, monkeypatch):
    """Kernels that Inductor can see through stand in the graph, and what is not wanted is not quantized."""
    for name in ("cusparselt", "cutlass"):
        monkeypatch.setitem(PATHS, name, PATHS[name]._replace(why_not=lambda *_: "no"))
    weight, dense = weight_and_reference()
    module, backend = Linear(weight), Lowered(monkeypatch)
    x = torch.randn(*rows, 64)
    with torch.no_grad():
        y = torch.compile(module, backend=backend, dynamic=False)(x)
    count = x.numel() // 64
    name = "gemv24" if count <= 8 else "tiles24"
    assert backend.ops() == [f"hwpq_fx.{name}.default"]
    assert backend.quantizes() == (count > 64)
    expected = F.linear(x, dense, module.bias)
    tolerance = (0.05 if count > 64 else 2e-3) * expected.std().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=5 * tolerance)


def test_lowered_graph_with_gradients_keeps_the_op_that_has_them(monkeypatch):
    weight, dense = weight_and_reference()
    module, backend = Linear(weight), Lowered(monkeypatch)
    x = torch.randn(3, 64, requires_grad=True)
    torch.compile(module, backend=backend, dynamic=False)(x).sum().backward()
    assert backend.ops() == ["hwpq_fx.linear24.default"]
    assert backend.quantizes() == 0  # gemv takes x as it is
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))


def test_lowered_graph_leaves_unknown_rows_to_the_run(monkeypatch):
    weight, _ = weight_and_reference()
    module, backend = Linear(weight), Lowered(monkeypatch)
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=True)(torch.randn(5, 64))
    (call,) = (node for node in backend.graphs[-1].graph.nodes if "hwpq_fx" in str(node.target))
    x, x_scale, *_, x_hp, out_dtype, prepacked_for = call.args
    assert (value_of(x).dtype, value_of(x_hp).dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (value_of(x_scale).dtype, out_dtype, prepacked_for) == (torch.float32, torch.float32, "")
