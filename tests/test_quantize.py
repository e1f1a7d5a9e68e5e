"""torchao's quantize_: the same masks and bits as convert, and at home among torchao's own configs."""

import copy
import logging

import pytest
import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, quantize_

from hwpq_fx import CalibrationError, ConfigError, HWPQConfig, ModelError, convert
from hwpq_fx.curvature import GramMatrix
from hwpq_fx.kernels import Float8Sparse24Tensor
from models import MODELS, call


def packed_of(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, Float8Sparse24Tensor)}


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for name, weight in ours.items():
        for part in weight.tensor_data_names:
            a, b = getattr(weight, part), getattr(theirs[name], part)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{name}.{part}"


def not_the_head(module, name):
    return isinstance(module, nn.Linear) and name != "lm_head"


@pytest.mark.parametrize("config", [{}, {"compensation": "energy"}, {"saliency": "contribution", "activation": "none"}])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_same_bits_as_convert(name, config):
    build, batch_of, _ = MODELS[name]
    model = build()
    other, batches = copy.deepcopy(model), [batch_of(2, 12), batch_of(3, 9)]
    for batch in batches:  # no padding: a module does not see the mask
        if isinstance(batch, dict) and "attention_mask" in batch:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    convert(model, batches, HWPQConfig(sequential=False, **config))
    quantize_(other, HWPQConfig(step="prepare", **config), filter_fn=not_the_head)
    with torch.no_grad():
        for batch in batches:
            call(other, batch)
    quantize_(other, HWPQConfig(step="convert", **config), filter_fn=not_the_head)
    same_bits(packed_of(model), packed_of(other))
    assert not any(module._forward_pre_hooks or "_hwpq_observer" in vars(module) for module in other.modules())
    torch.testing.assert_close(call(model, batches[0]), call(other, batches[0]), rtol=0, atol=0)


def test_data_free_in_one_step():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    other = copy.deepcopy(model)
    convert(model, None, HWPQConfig())
    quantize_(other, HWPQConfig())
    same_bits(packed_of(model), packed_of(other))
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(other)(x), other(x), rtol=1e-2, atol=1e-2)


def test_room_for_a_converted_state_dict():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)).eval()
    other = copy.deepcopy(model)
    quantize_(model, HWPQConfig())
    quantize_(other, HWPQConfig(step="prepare_for_loading"))
    x = torch.randn(3, 64)
    other.load_state_dict(model.state_dict())
    same_bits(packed_of(model), packed_of(other))
    assert torch.equal(other(x), model(x))
    on_meta = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)).to("meta")
    quantize_(on_meta, HWPQConfig(step="prepare_for_loading"))
    on_meta.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(on_meta(x), model(x))


def test_beside_torchaos_own_configs():
    model = nn.ModuleDict({"attention": nn.Linear(64, 64), "mlp": nn.Linear(64, 64)}).bfloat16().eval()
    quantize_(model, FqnToConfig({"attention": Float8WeightOnlyConfig(), "mlp": HWPQConfig()}), filter_fn=None)
    kinds = [type(model[name].weight).__name__ for name in ("attention", "mlp")]
    assert kinds == ["Float8Tensor", "Float8Sparse24Tensor"]


def test_what_the_format_cannot_hold_stays(caplog):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 20), nn.Linear(20, 8))
    with caplog.at_level(logging.WARNING, "hwpq_fx"):
        quantize_(model, HWPQConfig())
    assert [isinstance(layer.weight, Float8Sparse24Tensor) for layer in model] == [True, True, False]
    assert "Linear 8x20 stays dense: in_features 20 is not a multiple of 8" in caplog.text


def test_the_bound_on_memory_is_for_all_modules_together():
    model = nn.Sequential(*(nn.Linear(512, 16) for _ in range(3))).eval()
    bound = 4 * 512 * 512 + 4 * 512 * 300
    quantize_(model, HWPQConfig(step="prepare", curvature_bytes=bound))
    kinds = [module._hwpq_observer.statistics.curvature for module in model]
    assert isinstance(kinds[0], GramMatrix) and kinds[1].capacity == 300 and kinds[2] is None
    with torch.no_grad():
        for module in model:
            module(torch.randn(2, 512))
    quantize_(model, HWPQConfig(step="convert", curvature_bytes=bound))
    again = nn.Sequential(nn.Linear(512, 16)).eval()
    quantize_(again, HWPQConfig(step="prepare", curvature_bytes=bound))
    assert isinstance(again[0]._hwpq_observer.statistics.curvature, GramMatrix), "what was taken was given back"


def test_a_layer_that_is_called_inside_vmap():
    """All its rows are observed, whichever dimension they run over."""
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(3, 8, 64)
    bits = []
    for forward in (
        lambda one: one(x),
        lambda one: torch.vmap(one)(x),
        lambda one: torch.vmap(one, in_dims=1)(x.transpose(0, 1)),
        lambda one: torch.vmap(torch.vmap(one))(x),
        lambda one: torch.func.grad(lambda x: one(x).sum())(x),
    ):
        copied = copy.deepcopy(model)
        quantize_(copied, HWPQConfig(step="prepare"))
        forward(copied)
        assert vars(copied[0])["_hwpq_observer"].statistics.rows == 24
        quantize_(copied, HWPQConfig(step="convert"))
        bits.append(copied[0].weight.dequantize())
    assert all(torch.equal(one, bits[0]) for one in bits)


def test_errors():
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    for config in (HWPQConfig(targets=["0"]), HWPQConfig(ignore=[])):
        with pytest.raises(ConfigError, match="filter_fn or by FqnToConfig"):
            quantize_(model, config)
    with pytest.raises(ConfigError, match=r"use hwpq_fx\.convert"):
        quantize_(model, HWPQConfig(max_loss=1.0))
    with pytest.raises(ConfigError, match=r"is for torchao\.quantize_"):
        convert(model, [torch.randn(2, 64)], HWPQConfig(step="prepare"))
    with pytest.raises(CalibrationError, match="has no observer"):
        quantize_(model, HWPQConfig(step="convert"))
    quantize_(model, HWPQConfig(step="prepare"))
    with pytest.raises(CalibrationError, match="prepared already"):
        quantize_(model, HWPQConfig(step="prepare"))
    with pytest.raises(CalibrationError, match="has seen no batch"):
        quantize_(model, HWPQConfig(step="convert"))
    model(torch.full((2, 64), torch.nan))
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        quantize_(model, HWPQConfig(step="convert"))
    assert type(model[0].weight) is nn.Parameter
    model[0].weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match="weight holds NaN or Inf"):
        quantize_(model, HWPQConfig())
