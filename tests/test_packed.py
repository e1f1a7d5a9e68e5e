"""The packed weight itself: how it is made of a dense one, and its copies, casts, files and cache key."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from hwpq_fx.kernels import Float8Sparse24Tensor, pack24, packed, quantize_weight_rows, unpack24
from hwpq_fx.kernels.linear24 import cpu_product_dtype
from weights import ACTIVATIONS, DTYPES, K, Layer, N, check, make, same


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
        same(cast, weight.replaced(dtype=dtype).expand())
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
    for call in (weight.abs, lambda: weight.mean(0), lambda: weight.div_(2), lambda: nn.init.normal_(weight)):
        with pytest.raises(NotImplementedError, match=r"has no aten\.\w+\.\w+: put weight\.dequantize\(\) in"):
            call()


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


def test_cache_key(monkeypatch):
    """What a compiled product depends on is part of AOTAutograd's key: parts, attributes, and our own source."""
    weight = make()
    others = [
        make(activation="none"), make(rows=8), make(cols=64), make(expanded=False), make(dtype=torch.bfloat16),
        weight.t(), weight.replaced(prepacked=weight.prepacked.double()), nn.Parameter(weight), weight.to("meta"),
        weight.replaced(sparse_metadata=weight.sparse_metadata.t().contiguous().t()),
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
