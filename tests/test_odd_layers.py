"""Layers that are not what their class or place suggests: forwards of their own, unusual products, compiled parts."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_

import hwpq_fx
from hwpq_fx import Float8Sparse24Tensor, HWPQConfig, ModelError, convert, report

K = 64
X = torch.linspace(-1, 1, 6 * K).view(6, K)


class Standardized(nn.Linear):
    """Multiplies by something else than its weight."""

    def forward(self, x):
        return F.linear(x, (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(1, keepdim=True))


class Scaled(nn.Linear):
    """Multiplies by its weight, and more."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """No forward of its own."""


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def layers(model):
    return {line.name: line for line in report(model).layers}


def test_without_calibration_a_forward_of_ones_own_is_left_alone():
    model = nn.Sequential(Standardized(K, K), Scaled(K, K), Named(K, K), Attention(K, 4), nn.Linear(K, 32)).eval()
    convert(model)
    found = layers(model)
    for name, kind in (("0", "Standardized"), ("1", "Scaled"), ("3.in_proj_weight", "Attention")):
        assert found[name].status == "dense" and found[name].reason.startswith(f"{kind} has a forward of its own")
    assert [name for name, line in found.items() if line.status != "dense"] == ["2", "3.out_proj", "4"]
    assert model(torch.randn(2, 5, K)).shape == (2, 5, 32)


def test_with_calibration_what_was_seen_counts():
    model = nn.Sequential(Standardized(K, K), Scaled(K, K), Attention(K, 4)).eval()
    convert(model, [torch.randn(2, 5, K)])
    found = layers(model)
    assert [name for name, line in found.items() if line.status == "dense"] == ["0"]
    assert found["0"].reason.startswith("also used by ")
    assert model(torch.randn(2, 5, K)).shape == (2, 5, K)


def test_quantize_does_not_see_forwards(caplog):
    model = nn.Sequential(Scaled(K, K), nn.Linear(K, K)).eval()
    with caplog.at_level(logging.WARNING, "hwpq_fx"):
        quantize_(model, HWPQConfig())
    assert not isinstance(model[0].weight, Float8Sparse24Tensor) and isinstance(model[1].weight, Float8Sparse24Tensor)
    assert "Scaled 64x64 stays dense: Scaled has a forward of its own" in caplog.text
    quantize_(model := nn.Sequential(Scaled(K, K)), HWPQConfig(step="prepare_for_loading"))
    assert isinstance(model[0].weight, Float8Sparse24Tensor), "there is no room for what convert packed"


class Bare(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.w, self.table, self.product = nn.Parameter(torch.randn(K, K)), nn.Parameter(torch.randn(5, K)), product

    def forward(self, x):
        return self.product(x + self.table[0], self.w)


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (lambda x, w: x @ w[:, :32], "multiplied through a view that is neither rows of it nor its transpose"),
        (lambda x, w: w @ x.t(), "multiplied by matmul on its left (W @ x)"),
    ],
    ids=["columns", "left"],
)
def test_a_bare_parameter_that_is_multiplied_otherwise_has_a_line(product, reason):
    with pytest.raises(ModelError) as raised:
        convert(Bare(product).eval(), [X])
    assert str(raised.value) == f"nothing is left to convert (w: {reason})"
    model = nn.Sequential(nn.Linear(K, K), Bare(product)).eval()
    assert {name: line.reason for name, line in layers(convert(model, [X])).items()} == {"0": "", "1.w": reason}


@pytest.mark.parametrize("calib", [None, [X]], ids=["data-free", "calibrated"])
def test_parts_that_are_compiled_keep_their_names(calib):
    def build():
        part = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, 32))
        wrapped = nn.ModuleDict({"part": torch.compile(part, backend="eager"), "one": torch.compile(nn.Linear(K, K))})

        class Parts(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = wrapped

            def forward(self, x):
                return self.parts["part"](self.parts["one"](x))

        return Parts().eval()

    assert list(layers(convert(build(), calib))) == ["parts.part.0", "parts.part.2", "parts.one"]
    model = convert(build(), calib, HWPQConfig(targets=["parts.part.0", "one"]))
    assert [name for name, line in layers(model).items() if line.status != "dense"] == ["parts.part.0", "parts.one"]
    plan = hwpq_fx.plan(build(), calib)
    assert len(report(convert(build(), calib, plan=plan)).layers) == 3


@pytest.mark.parametrize("compiled", [False, True])
def test_an_encoder_whose_first_layer_stays_dense(compiled):
    """torch would make nested tensors of padded inputs, by a look at the first layer alone."""
    layer = nn.TransformerEncoderLayer(K, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.arange(8) >= torch.tensor([[8], [5]])
    batch = {"src": torch.randn(2, 8, K), "src_key_padding_mask": padding}
    convert(model, [batch], HWPQConfig(ignore=["re:layers.0.*"]))
    run = torch.compile(model, backend="hwpq") if compiled else model
    with torch.no_grad():
        y = run(**batch)
    with torch.enable_grad():  # torch takes no fast path there
        expected = model(**batch)
    torch.testing.assert_close(y[~padding], expected[~padding], rtol=1e-2, atol=1e-2)
