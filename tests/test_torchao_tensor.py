"""Packed weights as torchao's own 2:4 tensor and back; `packing_format`. torchao's op itself waits for a GPU."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Float8Tensor, PerRow, quantize_
from torchao.quantization.quantize_.workflows import Float8Sparse2x4_2DData2DMetadataTensor as Theirs
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from torchao.quantization.quantize_.workflows.float8.float8_packing_format import Float8PackingFormat

import hwpq_fx
from hwpq_fx import ConfigError, Float8Sparse24Tensor, HWPQConfig, ModelError, from_torchao, to_torchao, torchao_tensor
from hwpq_fx.kernels.pack24 import PATTERNS
from models import gpt2, llama, mlp, tokens

PARTS = ("qdata", "sparse_metadata", "scale")


def make(n=128, k=160, dtype=torch.bfloat16, **options):
    return Float8Sparse24Tensor.from_hp(torch.randn(n, k, dtype=dtype), **options)


@pytest.fixture
def hopper(monkeypatch):
    """As on a machine where torchao's op runs, up to calling it."""
    monkeypatch.setattr("hwpq_fx.compress.why_not_on", lambda device: "")


@settings(max_examples=20, deadline=None)
@given(
    n=st.one_of(st.integers(1, 8).map(lambda i: 8 * i), st.integers(1, 4).map(lambda i: 64 * i)),
    k=st.integers(1, 12).map(lambda i: 32 * i),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    expanded=st.booleans(),
)
def test_there_and_back_bit_for_bit(n, k, dtype, expanded):
    weight = make(n, k, dtype)
    theirs = to_torchao(weight.expand() if expanded else weight)
    assert type(theirs) is Theirs
    assert theirs.shape == weight.shape and theirs.dtype is dtype
    # through a copy: nothing may lie outside of what torchao copies and saves
    back = from_torchao(theirs.clone())
    assert (back.activation, back.transposed, back.dtype, back.prepacked) == ("dynamic", False, dtype, None)
    for part in PARTS:
        ours, again = getattr(weight, part), getattr(back, part)
        assert again.dtype is ours.dtype and again.is_contiguous()
        assert again.view(torch.uint8).equal(ours.view(torch.uint8)), part


def test_it_is_what_torchaos_op_takes():
    """Shapes that torchao 0.18 asks for, and what its own `from_hp` gives beside them."""
    weight = make(8, 160)
    theirs = to_torchao(nn.Parameter(weight, requires_grad=False))
    assert theirs.sparse_metadata.shape == (64, 32)  # max(N, 64), K / 8 in blocks of 16 bytes
    assert set(torch.stack((theirs.sparse_metadata & 15, theirs.sparse_metadata >> 4)).unique().tolist()) <= {*PATTERNS}
    assert theirs.scale.shape == (8, 1) and theirs.block_size == [1, 160]
    assert theirs.qdata.data_ptr() == weight.qdata.data_ptr()
    assert theirs.act_quant_kwargs == QuantizeTensorToFloat8Kwargs(granularity=PerRow())
    # byte 20 of row 3 is in the second block: 64 rows of 16 bytes further on
    large = make(128, 256)
    flat = to_torchao(large).sparse_metadata.flatten()
    assert flat[128 * 16 + 3 * 16 + 4] == large.sparse_metadata[3, 20]


def test_what_torchao_calls_is_given_our_numbers(monkeypatch):
    """Its linear, with a double of its op that reads memory as CUTLASS does (`test_cutlass24`)."""
    import test_cutlass24
    from torchao.quantization.quantize_.workflows.float8 import float8_sparse_2x4_2d_data_2d_metadata_tensor as module

    monkeypatch.setattr(module, "rowwise_scaled_linear_sparse_cutlass_f8f8", test_cutlass24.torchao_op)
    weight, x, bias = make(128, 160), torch.randn(5, 160).bfloat16(), torch.randn(128).bfloat16()
    expected = x.float() @ weight.dequantize(torch.float32).t() + bias
    # FP8 inputs, each its own way of rounding them
    assert (F.linear(x, to_torchao(weight), bias) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda: torch.randn(64, 64), "not a Tensor"),
        (lambda: make(activation="none"), "its inputs are quantized per row"),
        (lambda: make().t(), r"\.t\(\) first"),
        (lambda: make(dtype=torch.float32), "not torch.float32"),
        (lambda: make(64, 40), "K = 40 is not a multiple of 32"),
        (lambda: make(72, 64), "N = 72 is not a multiple of 64"),
        (lambda: make(12, 64), "N = 12 is not"),
    ],
)
def test_what_does_not_go_there(weight, says):
    with pytest.raises(ValueError, match=says):
        to_torchao(weight())


def theirs(**changes):
    one = to_torchao(make(64, 128))
    names = (*PARTS, "block_size", "act_quant_kwargs", "dtype")
    return Theirs(**{name: getattr(one, name) for name in names} | changes)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (lambda: make(), "not a Float8Sparse24Tensor"),
        (lambda: Float8Tensor.from_hp(torch.randn(64, 64)), "not a Float8Tensor"),
        (lambda: theirs(act_quant_kwargs=None), "quantized per row"),
        (lambda: theirs(act_quant_kwargs=QuantizeTensorToFloat8Kwargs()), ""),
        (lambda: theirs(act_quant_kwargs=QuantizeTensorToFloat8Kwargs(hp_value_ub=1.0)), "quantized per row"),
        (lambda: theirs(scale=torch.ones(1)), "1 scales"),
        (lambda: theirs(qdata=torch.zeros(64, 64).to(torch.float8_e5m2)), "float8_e5m2"),
        (lambda: theirs(sparse_metadata=torch.full((64, 32), 0x44).byte()), "metadata is"),
        (lambda: theirs(sparse_metadata=torch.zeros(64, 16).byte()), "repeated or out of order, in row 0"),
    ],
)
def test_what_does_not_come_back(weight, says):
    if says:
        with pytest.raises(ValueError, match=says):
            from_torchao(weight())
    else:
        assert from_torchao(weight()).activation == "dynamic"


def test_a_torchao_without_it_is_named(monkeypatch):
    monkeypatch.delattr(sys.modules[Theirs.__module__.rsplit(".", 2)[0]], Theirs.__name__)
    with pytest.raises(ConfigError, match="this version of torchao has no sparse FP8 tensor"):
        to_torchao(make())


def test_convert_makes_it_directly(hopper):
    model, other = llama().bfloat16(), llama().bfloat16()
    other.load_state_dict(model.state_dict())
    batches = [tokens()]
    hwpq_fx.convert(model, batches, HWPQConfig(packing_format=Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA))
    hwpq_fx.convert(other, batches)
    ours = dict(other.named_parameters())
    made = {name: one for name, one in model.named_parameters() if isinstance(one, Theirs)}
    assert len(made) == 14
    for name, one in made.items():
        back = from_torchao(one)
        assert all(getattr(back, part).equal(getattr(ours[name], part)) for part in PARTS), name
    line = hwpq_fx.report(model).converted[0]
    assert "sparse_2d_data_2d_metadata" in line.paths
    first = made["model.layers.0.self_attn.q_proj.weight"]
    assert line.packed_bytes == sum(getattr(first, part).nbytes for part in PARTS)
    assert line.layout_bytes == 0
    assert "sparse_2d_data_2d_metadata" in str(hwpq_fx.report(model))


def test_quantize_makes_it_and_room_for_it(hopper):
    model, room = mlp().bfloat16(), mlp().bfloat16()
    quantize_(model, HWPQConfig(packing_format="sparse_2d_data_2d_metadata"))
    quantize_(room, HWPQConfig(packing_format="sparse_2d_data_2d_metadata", step="prepare_for_loading"))
    assert isinstance(model[0].weight, Theirs)
    room.load_state_dict(model.state_dict())
    for part in PARTS:
        assert getattr(room[2].weight, part).equal(getattr(model[2].weight, part))


def test_layers_it_cannot_hold_stay_dense(hopper):
    config = HWPQConfig(packing_format="sparse_2d_data_2d_metadata")
    model = nn.Sequential(nn.Linear(64, 72), nn.Linear(72, 64), nn.Linear(64, 64)).bfloat16().eval()
    hwpq_fx.convert(model, config=config)
    reasons = [layer.reason for layer in hwpq_fx.report(model).layers]
    assert "N = 72" in reasons[0] and "K = 72" in reasons[1] and not reasons[2]
    with pytest.raises(ModelError, match="Conv1D: torchao's sparse FP8 tensor is for"):
        hwpq_fx.convert(gpt2().bfloat16(), config=config)
    with pytest.raises(ModelError, match=r"not torch\.float32"):
        hwpq_fx.convert(mlp(), config=config)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"activation": "none"}])
def test_combinations_refused(hopper, options):
    with pytest.raises(ConfigError, match='is for sparsity "2:4" and activation "dynamic"'):
        hwpq_fx.convert(mlp(), config=HWPQConfig(packing_format="sparse_2d_data_2d_metadata", **options))


def test_not_on_the_cpu():
    model, config = mlp().bfloat16(), HWPQConfig(packing_format="sparse_2d_data_2d_metadata")
    before = dict(model.named_parameters())
    for call in (hwpq_fx.convert, hwpq_fx.prepare, hwpq_fx.plan):
        with pytest.raises(ConfigError, match=r"compute capability 9\.0, not on cpu"):
            call(model, config=config)
    with pytest.raises(ConfigError, match=r"hwpq_fx\.to_torchao"):
        quantize_(model, config)
    assert all(one is before[name] for name, one in model.named_parameters())
    assert torchao_tensor.why_not_on(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or bool(torchao_tensor.why_not_on(torch.device("cuda"))), reason="needs sm_90"
)
def test_on_hopper():
    """torchao's linear on what we made is ours; what its compressor made comes over with the same values."""
    weight = make(256, 512).to("cuda")
    x = torch.randn(64, 512, dtype=torch.bfloat16, device="cuda")
    dense = weight.dequantize()
    expected = x.float() @ dense.float().t()
    y = F.linear(x, to_torchao(weight)).float()
    assert (y - expected).norm() < 0.05 * expected.norm()
    made = Theirs.from_hp(dense, act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow()))
    torch.testing.assert_close(from_torchao(made).dequantize(), dense, rtol=0.07, atol=1e-3)
