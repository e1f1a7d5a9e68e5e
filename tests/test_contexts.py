"""Modes that a caller may be in: what is converted in them is what is converted outside; and what goes wrong late."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from hwpq_fx import ConfigError, HWPQConfig, ModelError, convert, plan
from hwpq_fx.kernels import Float8Sparse24Tensor


def model_and_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    return model, [torch.randn(80, 64) for _ in range(2)]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
}
CONFIGS = {
    "cg": HWPQConfig(),
    "sampled": HWPQConfig(curvature_bytes=4 * 96 * 300),
    "in order": HWPQConfig(sequential=True),
    "energy": HWPQConfig(compensation="energy"),
    "unstructured": HWPQConfig(sparsity=0.5),
    "bounded": HWPQConfig(max_loss=1.0),
}


def bits(model):
    parts = ("qdata", "sparse_metadata", "scale")
    return [getattr(w, part).view(torch.uint8) for w in model.parameters() for part in parts if hasattr(w, part)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_hang_on_the_mode(mode, config):
    model, batches = model_and_batches()
    expected = bits(convert(copy.deepcopy(model), batches, CONFIGS[config]))
    if "autocast" in mode:  # its products are of other inputs
        with torch.no_grad():
            expected = bits(convert(copy.deepcopy(model), lambda one: _observed(one, batches, mode), CONFIGS[config]))
    with MODES[mode]():
        made = convert(model, batches, CONFIGS[config])
    assert len(expected) == len(bits(made)) > 0
    for one, other in zip(bits(made), expected, strict=True):
        assert torch.equal(one, other)


def _observed(model, batches, mode):
    with MODES[mode]():
        for batch in batches:
            model(batch)


@pytest.mark.parametrize("mode", MODES)
def test_plans_and_torchao(mode):
    model, batches = model_and_batches()
    with MODES[mode]():
        assert plan(model, batches, HWPQConfig(max_loss=1.0)).error <= 1.0
        quantize_(model, HWPQConfig())
    assert isinstance(model[0].weight, Float8Sparse24Tensor)


def test_a_failure_at_the_very_end_leaves_the_model(monkeypatch):
    model, batches = model_and_batches()
    before = list(model.parameters())
    for name in ("attach", "attach_report"):
        with monkeypatch.context() as patch:
            patch.setattr(f"hwpq_fx.conversion.{name}", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                convert(model, batches)
        assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    convert(model, batches)


def _interrupted(*args):
    raise KeyboardInterrupt


def test_a_plan_of_another_type_is_refused_at_once():
    model, _ = model_and_batches()
    with pytest.raises(TypeError, match="plan is dict"):
        convert(model, (pytest.fail("a batch is taken") for _ in range(1)), plan={"layers": []})


def test_a_plan_is_for_two_of_four():
    model, batches = model_and_batches()
    made = plan(model, batches)
    with pytest.raises(ConfigError, match="sparsity"):
        convert(model, batches, HWPQConfig(sparsity=0.5), plan=made)
    assert all(type(one) is nn.Parameter for one in model.parameters())


def test_quantize_twice():
    model, _ = model_and_batches()
    quantize_(model, HWPQConfig())
    with pytest.raises(ModelError, match="converted or quantized already"):
        quantize_(model, HWPQConfig())
